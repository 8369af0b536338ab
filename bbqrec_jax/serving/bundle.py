"""A bundle: one folder with all that a server needs of a finished run, read without any of the training code.

| file | content |
|---|---|
| `bundle.json` | what the folder holds: shapes, limits, data, metrics, versions, and a checksum of every other file |
| `recommend.bin` | histories in, the best items out: encoding and constrained decoding as one function in StableHLO |
| `weights.safetensors` | what it takes: the parameters, the codes, the trie, and what follows from them alone |
| `similarity.safetensors` | unit vectors of the items by stream, for similar items and for reasons |
| `items.json` | the ids, the titles and the attributes of the items, in the order of their rows |
| `check.json` | histories and what the live model recommends for them, which a loaded bundle has to give again |

`bbqrec_jax.serving.export` writes it. Whoever reads it needs jax, numpy, safetensors and flatbuffers.
"""

import concurrent.futures
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export  # Not a part of what `import jax` brings.
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.serving.attributes import Attributes
from bbqrec_jax.serving.reasons import Addends, Cosines, Reason, filled
from bbqrec_jax.utils.files import check_file
from bbqrec_jax.utils.json_files import read_json

FORMAT = 1
FILES = ("recommend.bin", "weights.safetensors", "similarity.safetensors", "items.json", "check.json")
_AGAIN = "export it again with bbqrec export"
# How far scores of two programs for the same histories may be apart; items whose scores are closer may change places.
TOLERANCE = 1e-3


class Query(NamedTuple):
  """What is asked about one history.

  Attributes:
    history: [n] int, rows of items in time order, at least one; the last `max_length` count.
    exclude: [m] int, rows of items that must not come back.
    allow: [m] int, rows of the only items that may come back; None: all.
    times: [n] the second of each interaction, for a model with time buckets.
    top: how many items; None: as many as the bundle gives.
    reasons: how many items of the history are named for each, as far as they speak for it.
  """

  history: np.ndarray
  exclude: np.ndarray
  allow: np.ndarray | None = None
  times: np.ndarray | None = None
  top: int | None = None
  reasons: int = 0


class Answer(NamedTuple):
  """The best items of a history, best first.

  Attributes:
    items: [k] int, rows.
    scores: [k] float32.
    reasons: of each item; none where none were asked for.
  """

  items: np.ndarray
  scores: np.ndarray
  reasons: Sequence[Sequence[Reason]] = ()


def require_packages() -> None:
  """Refuses to go on without what bundles are kept with.

  Raises:
    InputError: if it is missing.
  """
  for name in ("flatbuffers", "safetensors"):
    if importlib.util.find_spec(name) is None:
      raise InputError(f"bundles are kept with {name}, which is not installed: pip install 'bbqrec_jax[export]'")


def file_digest(path: pathlib.Path) -> str:
  """The SHA-256 of a file."""
  with path.open("rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


class Bundle:
  """A bundle that answers: all of its programs are compiled when it is made, and none later.

  Attributes:
    folder: that it was read from.
    about: what `bundle.json` says.
    item_ids: of the N items.
    titles: [N]; "" where the data has none.
    attributes: brand, category and price of the items, as far as the data has them.
    streams: names of the vectors that items are compared by; the last one is that of `similar`.
    limits: `max_length`, `top` (most items of an answer), `batch_sizes`, and `widths`, how many items may be left out
      of the answers of a batch; one query alone may leave out any number.
  """

  def __init__(self, folder: pathlib.Path):
    """Reads a folder, makes sure that it is whole, and compiles what it holds.

    XLA's persistent cache, where JAX has one, makes the second time short.

    Raises:
      InputError: if the folder holds no bundle, or one that was changed, is of another version or does not give what
        the live model gave; or a package is missing.
    """
    require_packages()
    from safetensors.numpy import load_file

    self.folder, self.about = folder, read_json(folder / "bundle.json", mend=_AGAIN)
    if self.about.get("format") != FORMAT:
      raise InputError(
        f"{folder / 'bundle.json'} field format: expected {FORMAT}, got {self.about.get('format')!r}; {_AGAIN}"
      )
    for name in FILES:
      check_file(folder / name)
      if file_digest(folder / name) != self.about["files"].get(name):
        raise InputError(f"{folder / name}: expected the file that bundle.json names, got a changed one; {_AGAIN}")
    items = read_json(folder / "items.json", mend=_AGAIN)
    self.item_ids, self.titles = ItemIds.from_json(items["ids"]), tuple(items["titles"])
    self.limits: dict[str, Any] = self.about["limits"]
    similarity = load_file(folder / "similarity.safetensors")
    self.streams: tuple[str, ...] = tuple(self.about["streams"])
    self._vectors = Cosines({name: similarity[name] for name in self.streams}, max_length=self.limits["max_length"])
    self.attributes = Attributes(items.get("attributes", {}), num_items=len(items["ids"]))
    arrays = load_file(folder / "weights.safetensors")
    self._held = [jnp.asarray(arrays[name]) for name in self.about["arrays"]]
    self._addends = self._of_similarity(arrays)
    try:
      function = jax.export.deserialize(bytearray((folder / "recommend.bin").read_bytes()))
      self._programs = self._compiled(function)
    except Exception as error:  # Another version of JAX, or another kind of device.
      raise InputError(
        f"{folder}: made with JAX {self.about['jax']} for {', '.join(self.about['platforms'])}, JAX {jax.__version__}"
        f" on {jax.default_backend()} cannot use it ({type(error).__name__}: {error}); {_AGAIN}"
      ) from error
    self.check()
    self._try_all()

  @property
  def num_items(self) -> int:
    """N."""
    return len(self.item_ids)

  @property
  def timed(self) -> bool:
    """Whether the model looks at the time between interactions."""
    return "times" in self.about["inputs"]

  @functools.cached_property
  def version(self) -> str:
    """16 hexadecimal digits that change with anything in the folder."""
    return hashlib.sha256("".join(sorted(self.about["files"].values())).encode()).hexdigest()[:16]

  def _of_similarity(self, arrays: Mapping[str, np.ndarray]) -> Addends | None:
    """The addends of a model with candidate similarity, from the arrays that its function takes where it takes them."""
    compared = self.about.get("candidate_similarity")
    if compared is None:
      return None
    held = dict(zip(self.about["arrays"], self._held, strict=True))
    own = {name: np.asarray(held.get(path, arrays[path])) for name, path in compared["arrays"].items()}
    return Addends(compared["streams"], own, max_length=self.limits["max_length"])

  def _compiled(self, function: jax.export.Exported) -> dict[tuple[int, int], Any]:
    """A program for every batch size and width, and one for a query that leaves out whatever it likes."""
    held = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self._held]

    def one(key: tuple[int, int]) -> Any:
      rows, width = key
      of_items = jax.ShapeDtypeStruct((rows, self.limits["max_length"]), jnp.int32)
      shapes = [of_items, jax.ShapeDtypeStruct((rows, width), jnp.int32)] + [of_items] * self.timed
      return jax.jit(function.call).lower(held, *shapes).compile()

    keys = [(rows, width) for rows in self.limits["batch_sizes"] for width in self.limits["widths"]]
    keys += [(1, self.num_items)] * (self.num_items > self.limits["widths"][-1])
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:  # XLA itself uses the cores there are.
      return dict(zip(keys, pool.map(one, keys), strict=True))

  def answer(self, queries: Sequence[Query]) -> list[Answer]:
    """The best items of each history, `top` of them or as many as are asked for or left, and the reasons asked for.

    Raises:
      InputError: if a history is empty, or lacks times that the model reads.
    """
    if not all(len(query.history) for query in queries):
      raise InputError("history: expected at least one item, got none")
    if self.timed and any(query.times is None for query in queries):
      raise InputError("times: this recommender looks at the time between interactions, give that of each")
    lists = [self._excluded(query) for query in queries]
    widest, largest = self.limits["widths"][-1], self.limits["batch_sizes"][-1]
    usual = [place for place, own in enumerate(lists) if len(own) <= widest]
    batches = [usual[first : first + largest] for first in range(0, len(usual), largest)]
    batches += [[place] for place, own in enumerate(lists) if len(own) > widest]
    answers: dict[int, Answer] = {}
    for places in batches:
      found = self._run([queries[place] for place in places], [lists[place] for place in places])
      answers |= zip(places, found, strict=True)
    for place, query in enumerate(queries):
      answers[place] = Answer(answers[place].items[: query.top], answers[place].scores[: query.top])
    most = max((query.reasons for query in queries), default=0)
    if most:  # Of all at once: it is many small steps, which take no longer for sixteen queries than for one.
      told = self.reasons(
        [query.history for query in queries], [answers[place].items for place in range(len(queries))], count=most
      )
      for place, query in enumerate(queries):
        answers[place] = answers[place]._replace(reasons=[own[: query.reasons] for own in told[place]])
    return [answers[place] for place in range(len(queries))]

  def _excluded(self, query: Query) -> np.ndarray:
    """Rows of all items that an answer must not have, each once."""
    if query.allow is None:
      return np.array(sorted(set(query.exclude.tolist())), np.int64)  # A fifth of what np.unique takes.
    out = np.ones(self.num_items, bool)
    out[query.allow] = False
    out[query.exclude] = True
    return np.flatnonzero(out)

  def _run(self, queries: Sequence[Query], lists: Sequence[np.ndarray]) -> list[Answer]:
    """One call of a program: as many queries as a batch may have, and what each of them leaves out."""
    length = self.limits["max_length"]
    sizes, widths, widest = self.limits["batch_sizes"], self.limits["widths"], max(map(len, lists))
    width = next((size for size in widths if size >= widest), self.num_items)
    rows = next(size for size in sizes if size >= len(queries)) if width in widths else 1
    grids = [
      filled([query.history[-length:] for query in queries], num_rows=rows, width=length),
      filled(lists, num_rows=rows, width=width),
    ]
    if self.timed:  # Counted from the first one that is looked at: an int32 does not hold every calendar.
      seconds = [np.asarray(query.times, np.float64)[-length:] for query in queries]
      grids.append(filled([np.minimum(own - own[0], 2**31 - 1) for own in seconds], num_rows=rows, width=length))
    items, scores = jax.device_get(self._programs[rows, width](self._held, *grids))
    return [Answer(own[own >= 0], of[own >= 0]) for own, of in zip(items, scores, strict=True)][: len(queries)]

  def _try_all(self) -> None:
    """Runs each program once: the first run of one takes several times as long as any other."""
    item, times = np.zeros(1, np.int64), np.zeros(1) if self.timed else None
    for rows, width in self._programs:
      self._run([Query(item, item, times=times)] * rows, [np.arange(min(width, self.num_items))] * rows)

  def similar(self, item: int, *, count: int, stream: str | None = None) -> Answer:
    """The items nearest to one by the cosine of their vectors in a stream; not the item itself.

    Args:
      item: its row.
      count: how many.
      stream: one of `streams`; the last if None.
    """
    vectors = self._vectors[stream or self.streams[-1]]
    cosines = vectors @ vectors[item]
    cosines[item] = -np.inf
    count = min(count, self.num_items - 1)
    near = np.argpartition(-cosines, min(count, self.num_items - 1))[:count]
    near = near[np.argsort(-cosines[near], kind="stable")]
    return Answer(near, cosines[near])

  def reasons(
    self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray], *, count: int = 2
  ) -> list[list[list[Reason]]]:
    """Which items of its history speak most for each recommended one of each user, the first most; each of them once.

    By what the model adds to the score for them where it has candidate similarity, see `reasons.Addends`; otherwise by
    likeness alone, see `reasons.Cosines`.
    """
    return (self._addends or self._vectors)(histories, items, count=count)

  def check(self) -> None:
    """Answers the histories of `check.json` again.

    Raises:
      InputError: if the answers are not those of the live model.
    """
    known = read_json(self.folder / "check.json", mend=_AGAIN)["queries"]
    queries = [
      Query(
        np.array(one["history"]),
        np.array(one["history"]),
        times=None if one["times"] is None else np.array(one["times"]),
      )
      for one in known
    ]
    for place, (one, own) in enumerate(zip(known, self.answer(queries), strict=True)):
      expected = Answer(np.array(one["items"], np.int64), np.array(one["scores"], np.float32))
      if not same(own, expected):
        raise InputError(
          f"{self.folder / 'check.json'} query {place}: expected the items {expected.items[:5].tolist()} ..., the"
          f" bundle gives {own.items[:5].tolist()} ...; {_AGAIN}"
        )


def same(one: Answer, other: Answer) -> bool:
  """Whether two answers are the same list, but for items whose scores hardly differ and that may change places."""
  if len(one.items) != len(other.items) or not np.allclose(one.scores, other.scores, rtol=TOLERANCE, atol=TOLERANCE):
    return False
  moved = one.items != other.items
  if not moved.any():
    return True
  # The last ones of a list may have changed places with items that are in neither.
  last = other.scores >= other.scores[-1] + TOLERANCE
  scores = dict(zip(other.items.tolist(), other.scores.tolist(), strict=True))
  near = [abs(scores.get(item, np.inf) - score) < TOLERANCE for item, score in zip(one.items, one.scores, strict=True)]
  return bool(np.all(np.array(near)[moved & last]))
