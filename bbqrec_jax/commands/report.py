"""Shows what a finished run learned and reached: one HTML page that fetches nothing, and a PNG per chart.

    bbqrec report --workdir=runs/mine
    bbqrec report --workdir=runs/mine --output=shared/mine

The page has the data, metrics by history length and item popularity, curves of training, the use of the codebooks, a
map of the items, items whose IDs begin alike, the similarity tables, users served best and worst with titles, config
and versions. Needs `pip install 'bbqrec_jax[report]'`.
"""

from absl import flags

from bbqrec_jax.command_line import define_path, define_run_flags, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, as_given, refuse
from bbqrec_jax.utils.files import check_place


def main(argv: list[str]) -> None:
  """Writes the page and the pictures."""
  del argv
  from bbqrec_jax.reporting.report import gather, write_report
  from bbqrec_jax.runs.restore import restore
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax

  options = quiet_flags()
  settle_jax()
  keep_compiled()
  workdir = options.workdir
  output = options.output or workdir / "report"
  try:
    check_place(output, flag="output")
    run = restore(workdir, data=options.data, trusted=options.trust)
    told = gather(workdir, run)
  except ModuleNotFoundError as error:
    refuse(InputError(f"{error}: the report needs altair, jinja2 and vl-convert; pip install 'bbqrec_jax[report]'"))
  except InputError as error:
    refuse(error)
  with writing(output):
    written = write_report(output, told, pictures=options.pictures)
  print(
    f"{as_given(str(written[0]))}: the page{f', and {len(written) - 1} pictures beside it' if options.pictures else ''}"
  )


def program() -> None:
  """Defines the flags and runs the program."""
  define_run_flags()
  define_path(
    "output", "The folder of the page and the pictures; report/ in the workdir if it is not given.", use="write"
  )
  flags.DEFINE_bool("pictures", True, "Whether the charts are written as PNGs, too.")
  start(main)
