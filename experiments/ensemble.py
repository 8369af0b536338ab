"""What finished runs are worth together: items ranked by the product of the probabilities that each run gives them.

    python experiments/ensemble.py --workdirs=runs/sasrec_features/0,runs/sasrec_features/1 --output=runs/ensemble/0

for runs of one data set whose heads score every item (dense, parallel). Nothing is trained. The output is a folder as
a run leaves it, `results.json` and `ranks.npz`, which `bbqrec compare` puts beside the others: what a
second model by itself is worth, where a recommender has two towers.
"""

import functools
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from bbqrec_jax.command_line import define_path, quiet_flags, show, start
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.recommender.evaluate import evaluate, rank_held_out, rank_scores, with_and_without
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.runs.workdir import format_results, load_results
from bbqrec_jax.utils.files import check_new, local_path
from bbqrec_jax.utils.json_files import write_json


def judge(
  workdirs: list[pathlib.Path], output: pathlib.Path, *, data: pathlib.Path | None = None, trusted: Collection[str] = ()
) -> str:
  """Ranks every user's validation and test item by all runs together; the table.

  Args:
    workdirs: of the runs.
    output: the folder for what they make together.
    data: the folder of their data, where that has moved since.
    trusted: Python modules outside this project that their configs may name heads and backbones from.

  Raises:
    InputError: if a run is not finished, searches, or is of other data than the first, or the output is there already.
  """
  check_new(output)
  runs = [restore(workdir, data=data, trusted=trusted) for workdir in workdirs]
  results = [load_results(workdir) for workdir in workdirs]
  for workdir, run, result in zip(workdirs, runs, results, strict=True):
    if not run.model.exact:
      raise InputError(f"{workdir}: its head searches; give runs whose heads score every item")
    if result["data"]["split_hash"] != results[0]["data"]["split_hash"]:
      raise InputError(f"{workdir} is a run of other data than {workdirs[0]}")
  models = [run.model for run in runs]
  config, split = runs[0].config, runs[0].split

  @jax.jit
  def ranker(params: Any, catalogues: Any, batch: Any) -> dict[str, jax.Array]:
    total = jnp.zeros(())
    for model, own, catalogue in zip(models, params, catalogues, strict=True):
      states = apply(model, own, "last_states", catalogue, batch)
      total = total + jax.nn.log_softmax(apply(model, own, "scores", catalogue, states, model.seen(batch)), axis=-1)
    return with_and_without(lambda exclude: rank_scores(total, batch["targets"], exclude), batch.get("exclude"))

  rank = functools.partial(
    evaluate,
    ranker,
    [run.params for run in runs],
    [run.catalogue for run in runs],
    batch_size=config.evaluation.batch_size,
    max_length=max(model.settings.max_length for model in models),
    num_items=runs[0].dataset.num_items,
  )
  rankings = rank_held_out(rank, split)
  figures = {name: ranking.metrics for name, ranking in rankings.items()}
  seconds = {name: sum(result["seconds"][name] for result in results) for name in ("recommender", "evaluation")}
  together = results[0] | figures | {"model": "ensemble", "seconds": seconds}
  output.mkdir(parents=True)
  np.savez(output / "ranks.npz", **{name: ranking.ranks for name, ranking in rankings.items()})  # type: ignore[arg-type]
  write_json(output / "results.json", together)
  return format_results(together)


def main(argv: list[str]) -> None:
  """Prints the table of what the runs make together."""
  del argv
  options = quiet_flags()

  def answer() -> str:
    workdirs = [local_path(folder, flag="workdirs") for folder in options.workdirs]
    return judge(workdirs, options.output, data=options.data, trusted=options.trust)

  show(answer)


if __name__ == "__main__":
  flags.DEFINE_list("workdirs", None, "The workdirs of finished runs.")
  define_path("output", "The folder for what they make together.")
  define_path("data", "The folder of their data, where that has moved since.")
  flags.DEFINE_list("trust", [], "Python modules of yours that the runs' configs may name heads or backbones from.")
  flags.mark_flags_as_required(["workdirs", "output"])
  start(main)
