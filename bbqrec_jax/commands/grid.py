"""Trains a grid of runs, data x system x seed, and prints the tables that compare them; what is done is not done again.

    bbqrec grid --data=scientific,beauty --system=sasrec --system=hybrid --seeds=0,1,2 --workdir=runs/grid
    bbqrec grid --data=shop --system=dense --system='no_ids: dense recommender.item_inputs=("item",)' --workdir=runs/ids

A system is a preset, or a name with a config (preset, FILE or FILE:CHOICE) and changes of its fields. Systems whose
tokenizers are configured alike share one. Every cell is a run of its own, WORKDIR/DATA/SYSTEM/SEED, which goes on where
it was stopped, and which every other command reads. `--records` gets a JSON file of each: its figures, config, seconds
and device. `bbqrec compare` makes LaTeX and a picture of any of them.
"""

from absl import flags

from bbqrec_jax.command_line import define_path, ready_to_train, start, training
from bbqrec_jax.errors import InputError


def main(argv: list[str]) -> None:
  """Does the runs, and prints the tables."""
  del argv
  from bbqrec_jax.runs.grid import parse_system, run_grid
  from bbqrec_jax.utils.files import local_path

  options = flags.FLAGS
  ready_to_train()
  with training(options.workdir):
    systems = [parse_system(text) for text in options.system]
    folders = [local_path(word, flag="data", use="read") for word in options.data]
    data = {folder.resolve().name: folder for folder in folders}
    if len(data) < len(folders):
      raise InputError(f"--data: expected folders of different names, got {', '.join(map(str, folders))}")
    for seed in options.seeds:
      if not seed.isdecimal():
        raise InputError(f"--seeds: expected whole numbers from 0, got {seed!r}")
    seeds = [int(seed) for seed in options.seeds]
    tables = run_grid(systems, data, seeds, options.workdir, records=options.records)
    print("\n\n".join(tables.values()))


def program() -> None:
  """Defines the flags and runs the program."""
  flags.DEFINE_list("data", None, "Folders of data sets.")
  flags.DEFINE_multi_string("system", None, "A preset, or 'NAME: CONFIG field=value ...'; given once for each.")
  flags.DEFINE_list("seeds", ["0"], "Seeds of everything random.")
  define_path("workdir", "Gets a folder DATA/SYSTEM/SEED for each run.")
  define_path("records", "A folder that gets a JSON file of each run.")
  flags.mark_flags_as_required(["data", "system", "workdir"])
  start(main)
