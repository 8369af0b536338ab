"""The peers' side of `time_to_quality.py`: each in its own loop and the settings that its makers recommend.

RecBole's SASRec: `SASRec.yaml` and `overall.yaml` as they come (two layers, width 64, dropout 0.5, cross-entropy over
all items, batches of 2,048 histories padded to 50, a validation of all users each epoch, ten without a better one end
it). Told of it are the data, its split, that cross-entropy draws no negatives, and that NDCG@10 decides in place of
MRR@10. Its full ranking of a sequential model leaves no item out but the padding, so its own figures are those of the
curve.

cornac's SASRec: what its authors found best on Beauty (README.md of its TIGER: binary cross-entropy, width 128,
learning rate 0.0005, dropout 0.2, length 50), the best of a validation every five epochs; the number of epochs is not
told there: 100 are given. It does not stop earlier. After each epoch the clock stands still for the ranking of all
users.

cornac's TIGER: `GRID_CONFIG`, the faster of its two recipes, on the text features; it validates 2,000 users.
"""

import contextlib
import importlib.metadata
import json
import logging
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from quality_clock import Curve

CORNAC_SASREC = {
  "loss": "bce", "embedding_dim": 128, "learning_rate": 5e-4, "dropout": 0.2, "max_len": 50, "n_epochs": 100,
  "model_selection": "best", "val_metric": "ndcg", "val_k": 10, "seed": 0,
}  # fmt: skip


def read_histories(data: str) -> list[list[int]]:
  """The items of each user of a data set, in the order of time."""
  lines = pathlib.Path(data, "sequences.txt").read_text(encoding="utf-8").splitlines()
  return [[int(item) for item in line.split()[1:]] for line in lines]


def versions(*packages: str) -> dict[str, str]:
  """Of installed packages."""
  return {name: importlib.metadata.version(name) for name in packages}


def check_split(data: str, whole: Any, train: Any, valid: Any) -> None:
  """Makes sure that RecBole trains and validates on what this project does.

  Args:
    data: the folder of the data set.
    whole: RecBole's dataset of it.
    train: its part to train on, a row for each item that follows others.
    valid: its part to validate on.

  Raises:
    ValueError: if the users' items, or how many there are, differ.
  """
  histories = read_histories(data)

  def rows(part: Any) -> list[tuple[str, str]]:
    columns = (whole.id2token(field, part.inter_feat[field].numpy()) for field in (part.uid_field, part.iid_field))
    return sorted(zip(*map(list, columns), strict=True))

  wanted = {
    "validation": [(str(user), str(items[-2])) for user, items in enumerate(histories)],
    "training": [(str(user), str(item)) for user, items in enumerate(histories) for item in items[1:-2]],
  }
  for name, part in (("validation", valid), ("training", train)):
    if rows(part) != sorted(wanted[name]):
      raise ValueError(f"RecBole's items of {name} are not those of the split")
  if whole.item_num - 1 != len(set().union(*histories)):
    raise ValueError(f"RecBole ranks {whole.item_num - 1} items, the data has {len(set().union(*histories))}")


def recbole_sasrec(curve: Curve, data: str, folder: pathlib.Path, changes: dict[str, Any]) -> None:
  """RecBole's trainer on its SASRec; each validation is a row."""
  import numpy as np

  # RecBole 1.2.1 reads names that NumPy 2 no longer has.
  for name, kind in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
    setattr(np, name, kind)
  from recbole.config import Config
  from recbole.data import create_dataset, data_preparation
  from recbole.model.sequential_recommender.sasrec import SASRec
  from recbole.trainer import Trainer
  from recbole.utils import init_seed

  (folder / "data").mkdir()
  with (folder / "data" / "data.inter").open("w", encoding="utf-8") as file:
    file.write("user_id:token\titem_id:token\ttimestamp:float\n")
    for user, items in enumerate(read_histories(data)):
      file.writelines(f"{user}\t{item}\t{time}\n" for time, item in enumerate(items))
  given = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "train_neg_sample_args": None,
    "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
    "valid_metric": "NDCG@10",
  } | changes  # fmt: skip
  local = {
    "data_path": str(folder), "checkpoint_dir": str(folder / "saved"), "use_gpu": False, "show_progress": False,
  }  # fmt: skip
  config = Config(model="SASRec", dataset="data", config_dict=given | local)
  init_seed(config["seed"], config["reproducibility"])
  logging.basicConfig(level=logging.INFO)
  dataset = create_dataset(config)
  train, valid, _ = data_preparation(config, dataset)
  model = SASRec(config, train.dataset).to(config["device"])
  with curve.stopped():
    check_split(data, dataset, train.dataset, valid.dataset)
  curve.about(versions=versions("recbole", "torch", "numpy", "pandas"), settings=given)

  class Watched(Trainer):
    epochs_done = 0

    def _valid_epoch(self, valid_data, show_progress=False):
      score, result = super()._valid_epoch(valid_data, show_progress=show_progress)
      self.epochs_done += config["eval_step"]
      curve.row(self.epochs_done, ndcg=result["ndcg@10"], recall=result["recall@10"], users=len(valid_data.dataset))
      return score, result

  Watched(config, model).fit(train, valid, saved=True, show_progress=False)


def cornac_data(data: str, **content: Any) -> Any:
  """A data set as cornac's evaluation with the last item left out has it."""
  from cornac.eval_methods import NextItemEvaluation

  events = [
    (str(user), str(item), 1.0, time)
    for user, items in enumerate(read_histories(data))
    for time, item in enumerate(items)
  ]
  return NextItemEvaluation.leave_last_out(events, fmt="UIRT", exclude_unknowns=False, **content)


def cornac_sasrec(curve: Curve, data: str, folder: pathlib.Path, changes: dict[str, Any]) -> None:
  """Calls cornac's own `fit`; after each epoch, the clock stopped, all users are ranked."""
  del folder
  import numpy as np
  import torch
  from cornac.models import SASRec
  from cornac.models.sasrec import recom_sasrec

  method = cornac_data(data)
  settings = CORNAC_SASREC | changes
  system = SASRec(**settings)
  sessions = [list(map(int, items)) for _, _, (items,) in method.val_set.si_iter(batch_size=1, shuffle=False)]
  curve.about(versions=versions("cornac", "torch", "numpy"), settings=settings)
  batches, done = recom_sasrec.session_seq_iter, 0

  @torch.no_grad()
  def ranks() -> np.ndarray:
    """Of each user's validation item among all items, from 0; items of the same score stand before it."""
    model, pad, length = system.model.eval(), system.pad_idx, system.max_len
    rows = [[pad] * (length - len(items[:-1][-length:])) + items[:-1][-length:] for items in sessions]
    targets = torch.tensor([items[-1] for items in sessions])
    found = []
    for first in range(0, len(rows), 512):
      hidden = model._encode(torch.tensor(rows[first : first + 512]))
      scores, wanted = hidden @ model.item_emb.weight[: system.total_items].T, targets[first : first + 512, None]
      found.append(((scores >= scores.gather(1, wanted)).sum(1) - 1).numpy())
    return np.concatenate(found)

  def watched(*args: Any, **options: Any) -> Any:
    nonlocal done
    yield from batches(*args, **options)
    done += 1
    with curve.stopped():
      found = ranks()
    hits = found < 10
    ndcg = np.where(hits, 1 / np.log2(found + 2.0), 0.0).mean()
    curve.row(done, ndcg=float(ndcg), recall=float(hits.mean()), users=len(found))

  recom_sasrec.session_seq_iter = watched
  system.fit(method.train_set, method.val_set)


def cornac_tiger(curve: Curve, data: str, folder: pathlib.Path, changes: dict[str, Any]) -> None:
  """Calls cornac's own `fit`; each of its validations, of a sample of users, is a row."""
  del folder
  import numpy as np
  from cornac.data import FeatureModality
  from cornac.metrics import NDCG, Recall
  from cornac.models import TIGER
  from cornac.models.tiger import GRID_CONFIG

  features = np.load(pathlib.Path(data, "text_features.npy"), allow_pickle=False).astype(np.float32)
  content = FeatureModality(features=features, ids=[str(item) for item in range(len(features))])
  method = cornac_data(data, item_feature=content)
  settings = {**GRID_CONFIG, "seed": 0} | changes
  curve.about(versions=versions("cornac", "torch", "transformers", "numpy"), settings=settings)

  class Watched(TIGER):
    epochs_done = 0

    def _validate(self, val_sessions, metric):
      found = []

      class Both(NDCG):
        """NDCG@10, which notes Recall@10 on the way."""

        def compute(self, **given):
          found.append(Recall(k=10).compute(**given))
          return super().compute(**given)

      score = super()._validate(val_sessions, Both(k=10))
      self.epochs_done += self.val_eval_every
      curve.row(self.epochs_done, ndcg=score, recall=float(np.mean(found)), users=len(val_sessions))
      return score

  Watched(**settings).fit(method.train_set, method.val_set)


PEERS: dict[str, Callable[[Curve, str, pathlib.Path, dict[str, Any]], None]] = {
  "recbole_sasrec": recbole_sasrec,
  "cornac_sasrec": cornac_sasrec,
  "cornac_tiger": cornac_tiger,
}


def main(system: str, data: str, output: str, *changes: str) -> None:
  """Trains a peer.

  Args:
    system: of PEERS.
    data: the folder of a data set.
    output: where the curve is written.
    changes: FIELD=JSON, settings that differ from the recommended ones.
  """
  given = {name: json.loads(value) for name, _, value in (change.partition("=") for change in changes)}
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # RecBole logs where it is.
    PEERS[system](Curve(output), data, pathlib.Path(folder), given)


if __name__ == "__main__":
  main(*sys.argv[1:])
