"""Shows what a run learned: writes `similarity.png`, the bias of attention by similarity, into its workdir.

    bbqrec report --workdir=runs/mine

Needs matplotlib: `pip install 'bbqrec_jax[report]'`.
"""

from bbqrec_jax.command_line import define_run_flags, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.utils.files import check_place


def main(argv: list[str]) -> None:
  """Writes the figure into the workdir."""
  del argv
  import numpy as np

  from bbqrec_jax.recommender.items import similarity_streams
  from bbqrec_jax.reporting.similarity import learned_tables, similarity_figure
  from bbqrec_jax.runs.restore import restore
  from bbqrec_jax.utils.environment import settle_jax

  options = quiet_flags()
  settle_jax()
  workdir = options.workdir
  try:
    check_place(workdir, flag="workdir")
    run = restore(workdir, data=options.data, trusted=options.trust)
    if not run.model.settings.num_streams:
      raise InputError(
        f"{workdir}: this run's attention is not reweighted by similarity (recommender.similarity is ())"
      )
    streams = similarity_streams(run.config, run.ids)
    names = [streams[a] if a == b else f"{streams[a]} with {streams[b]}" for a, b in run.model.settings.pairs]
    figure = similarity_figure(learned_tables(run.params), np.asarray(run.catalogue.edges), names)
  except ModuleNotFoundError as error:
    refuse(InputError(f"{error}: the report needs matplotlib; pip install 'bbqrec_jax[report]'"))
  except InputError as error:
    refuse(error)
  with writing(workdir / "similarity.png"):
    figure.savefig(workdir / "similarity.png", dpi=120)
  print(f"{workdir / 'similarity.png'}: bias against similarity, by head and stream pair")


def program() -> None:
  """Defines the flags and runs the program."""
  define_run_flags()
  start(main)
