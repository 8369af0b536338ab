"""Writes a finished run as a function for JAX alone.

    bbqrec export --workdir=runs/mine --output=runs/export

Whoever calls it needs JAX and flatbuffers, and nothing of this package. `export.json` in the folder says what it holds.
"""

from absl import flags

from bbqrec_jax.command_line import define_path, define_run_flags, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.utils.files import check_new

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def main(argv: list[str]) -> None:
  """Writes the folder and says what is in it."""
  del argv
  from bbqrec_jax.runs.restore import restore
  from bbqrec_jax.serving.export import require_flatbuffers, write_export
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax

  options = quiet_flags()
  settle_jax()
  keep_compiled()
  output = options.output
  try:
    if options.top < 1:
      raise InputError(f"--top must be at least 1, got {options.top}")
    unknown = sorted(set(options.platforms) - set(PLATFORMS))
    if unknown or not options.platforms:
      raise InputError(f"--platforms: expected some of {', '.join(PLATFORMS)}, got {unknown or 'none'}")
    require_flatbuffers()
    check_new(output)
    restored = restore(
      options.workdir,
      data=options.data,
      tokenizer=options.tokenizer,
      features=options.features,
      trusted=options.trust,
    )
  except InputError as error:
    refuse(error)
  with writing(output):
    note = write_export(
      output,
      restored.model,
      restored.params,
      restored.catalogue,
      top=options.top,
      beam_width=restored.config.evaluation.beam_width,
      platforms=options.platforms,
      item_ids=restored.dataset.item_ids,
      fingerprint=None if restored.ids is None else restored.ids.fingerprint,
    )
    size = (output / "arrays.npz").stat().st_size / 2**20
  print(
    f"{output}: the best {note['top']} of {note['num_items']} items, {size:.1f} MiB of arrays,"
    f" for {', '.join(note['platforms'])}"
  )


def program() -> None:
  """Defines the flags and runs the program."""
  define_run_flags()
  define_path("output", "The folder that is made.")
  flags.DEFINE_integer("top", 10, "How many items a history gets.")
  flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], f"Kinds of devices that it is to run on, of {PLATFORMS}.")
  define_path("tokenizer", "Semantic IDs that `bbqrec assign` extended by new items.")
  define_path("features", "The new items' features, for a recommender that reads features.")
  flags.mark_flag_as_required("output")
  start(main)
