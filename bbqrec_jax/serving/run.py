"""A run in Python: trained, read back, asked."""

import copy
import functools
import pathlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.interactions import Interactions, from_lengths, select_users
from bbqrec_jax.data.item_ids import nearest
from bbqrec_jax.data.sources import MEMORY, recognise_source
from bbqrec_jax.data.titles import find_titles
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.evaluate import evaluate, make_ranker, rank_held_out
from bbqrec_jax.recommender.schedule import ranking_shapes
from bbqrec_jax.runs import run as runs
from bbqrec_jax.runs.restore import Restored, restore
from bbqrec_jax.runs.workdir import load_results
from bbqrec_jax.serving.recommend import left_out, recommend_all
from bbqrec_jax.utils.files import local_path

Id = str | int


class Scored(NamedTuple):
  """An item by its id, and its score, the higher the better."""

  item: Id
  score: float


class Run:
  """A finished run: what it reached, and what it recommends. Made by `run` and `load_run`.

  Items and users go in and come out by the ids of the data. What JAX compiles for a request serves later ones too, as
  histories are padded to a few batch sizes.

      run = bbqrec_jax.load_run("runs/mine")
      run.results["test"]["ndcg@10"]
      run.recommend([["SKU-1", "SKU-2"]], k=5)[0][0].item
      run.recommend(users=["U17"])
      run.similar(["SKU-1"])

  Attributes:
    workdir: of the run.
    dataset: what it was trained on.
    config: of the run.
    results: what `results.json` holds.
  """

  def __init__(self, workdir: pathlib.Path, restored: Restored):
    """Holds what `restore` gives of a workdir."""
    self.workdir, self._restored = workdir, restored
    self.dataset: Dataset = restored.dataset
    self.config: ml_collections.ConfigDict = restored.config
    self.results: dict[str, Any] = load_results(workdir)

  @functools.cached_property
  def semantic_ids(self) -> dict[Id, tuple[int, ...]]:
    """The codes of each item; empty where the recommender reads none."""
    ids = self._restored.ids
    return {} if ids is None else {ids.item_ids[row]: tuple(codes) for row, codes in enumerate(ids.codes.tolist())}

  def recommend(
    self,
    histories: Sequence[Sequence[Id]] | None = None,
    *,
    users: Iterable[Id] | None = None,
    k: int = 10,
    exclude: Iterable[Id] = (),
    allow: Iterable[Id] | None = None,
    repeat: bool = False,
    times: Sequence[Sequence[float]] | None = None,
  ) -> list[list[Scored]]:
    """The best next items of each history, best first.

    Args:
      histories: items in time order.
      users: in place of histories: users of the data, with all of their items.
      k: how many items; fewer come back if no more are left.
      exclude: items that nobody is to be recommended.
      allow: the only items that may be recommended; all of them if it is None.
      repeat: whether items of the history may be recommended again.
      times: of histories, the second of each interaction, for a recommender with time buckets.

    Raises:
      InputError: if an item or a user is unknown (names the nearest), or the arguments do not go together.
    """
    if (histories is None) == (users is None):
      raise InputError("recommend: expected histories or users, one of the two")
    if k < 1:
      raise InputError(f"recommend: expected k of at least 1, got {k}")
    chosen = self._of_users(users) if users is not None else self._of_histories(histories or [], times)
    model, evaluation = self._restored.model, self.config.evaluation
    if model.settings.time_buckets and chosen.times is None:
      raise InputError("recommend: this recommender looks at the time between interactions, give times of each history")
    found = recommend_all(
      model,
      self._restored.params,
      self._restored.catalogue,
      chosen,
      top=k,
      beam_width=evaluation.beam_width,
      repeat=repeat,
      batch_size=evaluation.batch_size,
      exclude=left_out(
        None if allow is None else self._rows(allow, "allow"),
        self._rows(exclude, "exclude"),
        num_items=self._restored.catalogue.num_items,
      ),
    )
    return [self._scored(items, scores) for _, items, scores in found]

  def similar(self, items: Iterable[Id], k: int = 10) -> list[list[Scored]]:
    """The items nearest to each of some, by the cosine of what the recommender knows them by; not the item itself.

    That is the quantized fused vectors or, where the recommender reads no semantic IDs, its own item vectors.

    Args:
      items: of the catalogue.
      k: how many; fewer come back if the catalogue has fewer.

    Raises:
      InputError: if an item is unknown (names the nearest).
    """
    rows = self._rows(items, "similar")
    cosines = self._unit_vectors[rows] @ self._unit_vectors.T
    cosines[np.arange(len(rows)), rows] = -np.inf
    best = np.argsort(-cosines, axis=1, kind="stable")[:, : min(k, cosines.shape[1] - 1)]
    return [self._scored(own, of[own]) for own, of in zip(best, cosines, strict=True)]

  def find(self, title: str, k: int = 3) -> list[Scored]:
    """The items whose titles are most like some words, in any order and with slips; scores are from 0 to 100."""
    ids = self.dataset.item_ids
    return [Scored(ids[row], likeness) for row, likeness in find_titles(title, self.dataset.titles, count=k)]

  def evaluate(self) -> dict[str, dict[str, float]]:
    """The metrics of the best model on everybody's validation and test items, as in `results`: ranked again."""
    split, restored = self._restored.split, self._restored
    rank = functools.partial(
      evaluate,
      self._ranker,
      restored.params,
      restored.catalogue,
      num_items=restored.catalogue.num_items,
      **ranking_shapes(self.config, split, exact=restored.model.exact),
    )
    return {name: ranking.metrics for name, ranking in rank_held_out(rank, split).items()}

  @functools.cached_property
  def _ranker(self) -> Any:
    return jax.jit(make_ranker(self._restored.model, beam_width=self.config.evaluation.beam_width))

  @functools.cached_property
  def _unit_vectors(self) -> np.ndarray:
    """[N, d] float32 of length one; zero where an item has nothing."""
    model, params, catalogue = self._restored.model, self._restored.params, self._restored.catalogue
    ids = self._restored.ids
    vectors = np.asarray(apply(model, params, "item_vectors", catalogue) if ids is None else ids.vectors("fused"))
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)

  def _scored(self, items: np.ndarray, scores: np.ndarray) -> list[Scored]:
    ids = self.dataset.item_ids
    return [Scored(ids[item], float(score)) for item, score in zip(items.tolist(), scores, strict=True)]

  def _rows(self, ids: Iterable[Id], what: str) -> np.ndarray:
    if isinstance(ids, str):
      raise InputError(f"{what}: expected a list of ids, got {shown(ids)}; give [{shown(ids)}]")
    return self.dataset.item_ids.require(list(map(str, ids)), where=lambda place: f"{what}, place {place}")

  def _of_histories(self, histories: Sequence[Sequence[Id]], times: Sequence[Sequence[float]] | None) -> Interactions:
    """What histories of ids are.

    Raises:
      InputError: if one is empty or has an unknown item, or the times are not theirs.
    """
    rows = [self._rows(history, f"history {place}") for place, history in enumerate(histories)]
    lengths = np.array(list(map(len, rows)), np.int64)
    if np.any(lengths == 0):
      raise InputError(f"history {int(np.argmin(lengths))}: expected at least one item, got none; leave it out")
    seconds = None
    if times is not None:
      if list(map(len, times)) != lengths.tolist():
        raise InputError("times: expected the second of each item of each history, got more or fewer")
      seconds = np.array([one for of in times for one in of], np.float64)
      if not np.isfinite(seconds).all() or any(np.any(np.diff(np.asarray(of)) < 0) for of in times):
        raise InputError("times: expected finite numbers in time order")
    items = np.concatenate([np.zeros(0, np.int32), *rows])
    return from_lengths(items, lengths, np.arange(len(rows)).astype(str), seconds)

  def _of_users(self, users: Iterable[Id]) -> Interactions:
    """The whole histories of users of the data.

    Raises:
      InputError: if one is unknown; names the nearest.
    """
    known = self._user_rows
    asked = list(map(str, [users] if isinstance(users, str) else users))
    for user in asked:
      if user not in known:
        raise InputError(f"users: expected users of the run's data, got {shown(user)}; {nearest(user, list(known))}")
    return select_users(self.dataset.interactions, np.array([known[user] for user in asked], np.int64))

  @functools.cached_property
  def _user_rows(self) -> dict[str, int]:
    return {user: row for row, user in enumerate(self.dataset.interactions.users.tolist())}


def _on_data(
  config: ml_collections.ConfigDict, data: Dataset | str | pathlib.Path | None
) -> tuple[ml_collections.ConfigDict, Dataset | None]:
  """A copy of a config on other data than it names, and that data where it is in memory.

  A data set that was read from a folder is read again by the run, which can so be asked about without this program.
  """
  config = copy.deepcopy(config)
  if data is None:
    return config, None
  if isinstance(data, Dataset) and data.source in (MEMORY, "synthetic"):
    config.data.source, config.data.path = MEMORY, ""
    return config, data
  path = data.source if isinstance(data, Dataset) else data
  config.data.source, config.data.path = recognise_source(path), str(path)
  return config, None


def run(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path, data: Dataset | str | pathlib.Path | None = None
) -> Run:
  """Trains what a config describes, or goes on with it, or finds it done.

      config = bbqrec_jax.preset("sasrec")
      config.recommender.steps = 500
      run = bbqrec_jax.run(config, "runs/mine", data=bbqrec_jax.load_data("DIR"))

  Args:
    config: of `preset`, with fields set.
    workdir: a folder or a URL, gets all that the run leaves; the same one again goes on with it.
    data: what `load_data` gives, or a folder or a URL; None takes what the config names.

  Raises:
    InputError: for anything wrong with the config, the data or the workdir, before anything is computed.
    Diverged: if training came to numbers that are not finite.
    StorageError: if something could not be written.
  """
  config, given = _on_data(config, data)
  runs.run(config, workdir, given)
  return load_run(workdir, data=given)


def tokenize(
  config: ml_collections.ConfigDict, workdir: str | pathlib.Path, data: Dataset | str | pathlib.Path | None = None
) -> dict[str, Any]:
  """Stage 1 alone: the tokenizer of a run; `run` on the same workdir then does the rest.

  Args:
    config: as for `run`, and so are the others.
    workdir: see there.
    data: see there.

  Returns:
    How healthy its codes are, what `tokenizer/health.json` holds.

  Raises:
    InputError, Diverged, StorageError: as `run`.
  """
  config, given = _on_data(config, data)
  return runs.tokenize(config, workdir, given)


def load_run(
  workdir: str | pathlib.Path,
  *,
  data: Dataset | str | pathlib.Path | None = None,
  tokenizer: str | pathlib.Path | None = None,
  features: str | pathlib.Path | None = None,
  trusted: Collection[str] = (),
) -> Run:
  """A finished run of a workdir; none of its files is run.

  Args:
    workdir: of the run, a folder or a URL.
    data: its data, where that was in memory; or the folder of it, where that has moved since.
    tokenizer: semantic IDs that `bbqrec assign` extended by new items.
    features: the folder of the new items' features.
    trusted: Python modules of yours that the config may name its head and backbone from.

  Raises:
    InputError: if the run is not finished, or the data is not what it was trained on.
  """
  given = data if isinstance(data, Dataset) and data.source in (MEMORY, "synthetic") else None
  folder = data.source if isinstance(data, Dataset) else data
  restored = restore(
    workdir,
    data=None if given is not None else folder,
    given=given,
    tokenizer=tokenizer,
    features=features,
    trusted=trusted,
  )
  return Run(local_path(workdir, flag="workdir", use="read"), restored)
