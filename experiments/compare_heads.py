"""Heads side by side, with and without the similarity bias, and SASRec beside them, with and without features.

    python experiments/compare_heads.py --config_file=configs/scientific.py --path=DIR --workdir=runs/heads

trains for every seed (`--seeds`) one tokenizer, and on its IDs every system (`--systems`); what is done already is not
done again, and the work can be split over processes by system once the tokenizers are there. `--report` needs neither
data nor config, and prints the table of whatever is there. Beside the means stands what each system has over the
`--reference` in test NDCG@10, user by user (the mean of the seeds), with the 95 % interval that the spread over users
gives. What a user's history has stays in the ranking here; `results.json` has the figures without it, too.
"""

import importlib.util
import pathlib
from typing import Any

from absl import flags
from compare_tokenizers import change

from bbqrec_jax.command_line import define_path, start, training
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.settings import needs_semantic_ids
from bbqrec_jax.runs.compare import compare, to_markdown
from bbqrec_jax.runs.run import of_any_recommender, run, tokenize
from bbqrec_jax.utils.compilation import keep_compiled
from bbqrec_jax.utils.environment import settle_jax
from bbqrec_jax.utils.host_memory import keep_memory

HEADS = ("generative", "parallel", "dense", "hybrid")
NO_BIAS = "-no_bias"
SYSTEMS = ("sasrec", "sasrec_features", *(head + suffix for head in HEADS for suffix in (NO_BIAS, "")))
PAIR = "sasrec_features-pair"  # Two seeds of it multiplied, by ensemble.py; not trained here.
SHOWN = (*SYSTEMS[:2], PAIR, *SYSTEMS[2:])


def load_config(file: str, system: str, *, path: str, seed: int) -> Any:
  """The config of a system: what the file gives for its head, on the data of `path`.

  Raises:
    InputError: if there is no such file, or it has no such head.
  """
  head = system.removesuffix(NO_BIAS)
  spec = importlib.util.spec_from_file_location("config_file", file)
  if spec is None or spec.loader is None or not pathlib.Path(file).is_file():
    raise InputError(f"--config_file: expected a config with a choice of heads, as configs/scientific.py, got {file!r}")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    config = module.get_config(head)
  except (AttributeError, KeyError, TypeError) as error:
    raise InputError(f"--config_file: {file} has no config for {head!r} ({error!r})") from error
  changes = {"data.path": path, "seed": seed} | ({"recommender.similarity": ()} if system.endswith(NO_BIAS) else {})
  return change(config, changes)


def do(configs: dict[str, Any], workdir: pathlib.Path) -> None:
  """Trains the systems of one seed, the configs by name, if they are not there yet."""
  for system, config in configs.items():
    folder = workdir / system / str(config.seed)
    if not needs_semantic_ids(config):
      run(config, folder)
      continue
    shared = workdir / "tokenizer" / str(config.seed)
    tokenize(of_any_recommender(config), shared)
    run(change(config, {"tokenizer.artefact": str(shared / "tokenizer")}), folder)


def report(workdir: pathlib.Path, *, reference: str) -> str:
  """The table of all that is done.

  Raises:
    InputError: if nothing is, if a `results.json` is none, or if the results are not all of one data set.
  """
  done = {system: sorted(path.parent for path in (workdir / system).glob("*/results.json")) for system in SHOWN}
  done = {system: folders for system, folders in done.items() if folders}
  if not done:
    raise InputError(f"--workdir: expected SYSTEM/SEED/results.json below {workdir}, of one of {', '.join(SYSTEMS)}")
  return to_markdown(*compare(done, reference=reference), reference=reference)


def main(argv: list[str]) -> None:
  """Does the work that the flags ask for, and prints the table."""
  del argv
  keep_memory()
  settle_jax()
  keep_compiled()
  options = flags.FLAGS
  workdir = options.workdir
  with training(workdir):
    for flag, names, known in (("systems", options.systems, SYSTEMS), ("reference", [options.reference], SHOWN)):
      for name in names:
        if name not in known:
          raise InputError(f"--{flag}: expected some of {', '.join(known)}, got {name!r}")
    for seed in options.seeds:
      if not seed.isdecimal():
        raise InputError(f"--seeds: expected whole numbers from 0, got {seed!r}")
    if not options.report:
      for name in ("config_file", "path"):
        if options[name].value is None:
          raise InputError(f"--{name} is needed for what is to be trained; --report alone does without")
      if not options.path.is_dir():
        raise InputError(f"--path={options.path}: expected a folder of data, found none; check the path")
      for seed in map(int, options.seeds):
        do(
          {
            name: load_config(str(options.config_file), name, path=str(options.path), seed=seed)
            for name in options.systems
          },
          workdir,
        )
    print(report(workdir, reference=options.reference))


if __name__ == "__main__":
  define_path("config_file", "A config with a choice of heads.")
  define_path("path", "The folder of its data.")
  define_path("workdir", "Gets a folder for each system and seed.")
  flags.DEFINE_list("systems", list(SYSTEMS), "Which systems.")
  flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of everything random.")
  flags.DEFINE_string("reference", "sasrec", "The system that the others are compared with.")
  flags.DEFINE_bool("report", False, "Train nothing; print the tables of what is there.")
  flags.mark_flags_as_required(["workdir"])
  start(main)
