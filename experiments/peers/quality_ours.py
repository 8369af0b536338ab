"""This project's side of `time_to_quality.py`: a preset as it is, in this process.

The run picks its model by the validation items of `evaluation.validation_users` users. After each such ranking the
clock stands still, and all users' validation items are ranked by the same model: these are the figures of the curve.
"""

import importlib.metadata
import json
import sys
import tempfile
from typing import Any

from quality_clock import Curve

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def watch(curve: Curve, targets) -> None:
  """From now on every validation of a recommender's training is a row of the curve.

  Args:
    curve: see there.
    targets: [U] int, the validation items. A base for candidate similarity, which is trained first, is validated on
      other targets: its figures would not be comparable.
  """
  import numpy as np

  from bbqrec_jax.recommender import train
  from bbqrec_jax.training.logging import MetricsLog

  evaluate, write, whole = train.evaluate, MetricsLog.write, {}

  def watched(ranker, params, shared, histories, wanted, *, users=None, **options):
    ranking = evaluate(ranker, params, shared, histories, wanted, users=users, **options)
    if users is not None and np.array_equal(wanted, targets):
      with curve.stopped():
        everybody = ranking
        if len(users) < len(wanted):
          everybody = evaluate(ranker, params, shared, histories, wanted, **options)
        whole.update(everybody.metrics)
    return ranking

  def logged(self, stage, kind, step, values):
    write(self, stage, kind, step, values)
    if kind == "validation" and stage == "recommender":
      curve.row(
        step, ndcg=whole["ndcg@10"], recall=whole["recall@10"], users=len(targets),
        **{"sampled ndcg@10": round(values["ndcg@10"], 5)},
      )  # fmt: skip

  train.evaluate, MetricsLog.write = watched, logged  # type: ignore[assignment, method-assign]


def main(system: str, data: str, output: str, *changes: str) -> dict[str, Any]:
  """Runs a preset.

  Args:
    system: the preset's name.
    data: the folder of a data set.
    output: where the curve is written.
    changes: FIELD=JSON, fields of the config.

  Returns:
    As `run`.
  """
  curve = Curve(output)
  from bbqrec_jax import command_line

  command_line.ready_to_train()
  from bbqrec_jax.data.sources import recognise_source
  from bbqrec_jax.presets import preset
  from bbqrec_jax.runs.run import read_data, run

  config = preset(system)
  config.data.path, config.data.source = data, recognise_source(data)
  given = {name: json.loads(value) for name, _, value in (change.partition("=") for change in changes)}
  config.update_from_flattened_dict(given)
  with curve.stopped():
    _, split, _ = read_data(config)
    watch(curve, split.validation_target)
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  curve.about(versions=versions, settings={"preset": system, **given})
  with tempfile.TemporaryDirectory() as workdir:
    return run(config, workdir + "/run")


if __name__ == "__main__":
  main(*sys.argv[1:])
