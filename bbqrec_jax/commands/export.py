"""Writes a finished run as a bundle: one folder that is all a server needs.

    bbqrec export --workdir=runs/mine --output=runs/bundle
    bbqrec export --workdir=runs/mine --output=runs/bundle --check=1000

`bbqrec serve` answers from it. Whoever reads it needs JAX and safetensors, and none of the training code; `bundle.json`
in the folder says what it holds. `--check` also asks the bundle and the live model about drawn users, and there is no
bundle if they do not answer alike.
"""

from absl import flags

from bbqrec_jax.command_line import define_path, define_run_flags, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, as_given, refuse
from bbqrec_jax.utils.files import check_new, local_path

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _sizes(words: list[str], flag: str) -> list[int]:
  """Numbers of at least 1, ascending.

  Raises:
    InputError: if there is none, or one is none.
  """
  if not words or not all(word.isdecimal() and 0 < int(word) < 10**6 for word in words):
    raise InputError(f"--{flag}: expected whole numbers of at least 1, separated by commas, got {','.join(words)!r}")
  return sorted(set(map(int, words)))


def main(argv: list[str]) -> None:
  """Writes the folder and says what is in it."""
  del argv
  from bbqrec_jax.runs.restore import restore
  from bbqrec_jax.runs.workdir import load_results
  from bbqrec_jax.serving.bundle import require_packages
  from bbqrec_jax.serving.export import read_attributes, write_bundle
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax

  options = quiet_flags()
  settle_jax()
  keep_compiled()
  output = options.output
  try:
    if options.top < 1:
      raise InputError(f"--top must be at least 1, got {options.top}")
    if options.check < 0:
      raise InputError(f"--check must be at least 0, got {options.check}")
    unknown = sorted(set(options.platforms) - set(PLATFORMS))
    if unknown or not options.platforms:
      raise InputError(f"--platforms: expected some of {', '.join(PLATFORMS)}, got {unknown or 'none'}")
    batch_sizes, widths = _sizes(options.batch_sizes, "batch_sizes"), _sizes(options.widths, "widths")
    require_packages()
    check_new(output)
    restored = restore(
      options.workdir,
      data=options.data,
      tokenizer=options.tokenizer,
      features=options.features,
      trusted=options.trust,
    )
    results = load_results(options.workdir)
    source = restored.config.data
    folders = [local_path(source.path, flag="data", use="read")] if source.source == "directory" else []
    folders += [options.features] if options.features else []
    with writing(output):
      note, compared = write_bundle(
        output,
        restored,
        top=options.top,
        platforms=options.platforms,
        batch_sizes=batch_sizes,
        widths=widths,
        attributes=read_attributes(folders, restored.dataset.item_ids),
        about={"data": results["data"], "test": results["test"], "best_step": results["best_step"]},
        users=options.check,
      )
  except InputError as error:
    refuse(error)
  size = sum(path.stat().st_size for path in output.iterdir()) / 2**20
  print(
    f"{as_given(str(output))}: {note['num_items']} items, lists of up to {note['limits']['top']}, {size:.1f} MiB,"
    f" for {', '.join(note['platforms'])}"
  )
  if compared is not None:
    print(
      f"asked about {compared.users} users, bundle and live model give {compared.identical} identical lists and"
      f" {compared.equal} that are the same but for the order of equal scores (difference at most"
      f" {compared.difference:.1g})"
    )


def program() -> None:
  """Defines the flags and runs the program."""
  define_run_flags()
  define_path("output", "The folder that is made.", use="write")
  flags.DEFINE_integer("top", 30, "How many items an answer may have.")
  flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], f"Kinds of devices that it is to run on, of {PLATFORMS}.")
  flags.DEFINE_list("batch_sizes", ["1", "4", "8", "16"], "How many histories are answered at once; each is compiled.")
  flags.DEFINE_list("widths", ["32", "256"], "How many items an answer may leave out; each is compiled.")
  flags.DEFINE_integer("check", 0, "About how many users the bundle is asked beside the live model.")
  define_path("tokenizer", "Semantic IDs that `bbqrec assign` extended by new items.", use="read")
  define_path("features", "The new items' features, for a recommender that reads features.", use="read")
  flags.mark_flag_as_required("output")
  start(main)
