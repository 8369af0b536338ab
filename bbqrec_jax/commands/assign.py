"""Gives semantic IDs to items that came after training, by a tokenizer that no longer learns.

    bbqrec assign --tokenizer=runs/mine/tokenizer --features=NEW --output=runs/extended

No item that has an ID changes it. `recommend` and `export` take the output as their --tokenizer.
"""

import os

from absl import flags

from bbqrec_jax.command_line import define_path, quiet_flags, start, writing
from bbqrec_jax.errors import InputError, as_given, printable, refuse
from bbqrec_jax.utils.files import check_new, unfinished


def main(argv: list[str]) -> None:
  """Writes an artefact with the new items' IDs and prints how many collided."""
  del argv
  from bbqrec_jax.data.directory import read_new_items
  from bbqrec_jax.data.feature_store import FeatureStore, far_features
  from bbqrec_jax.data.features import load_new_items
  from bbqrec_jax.semantic_ids.artefact import SemanticIds
  from bbqrec_jax.semantic_ids.repair import collision_rate
  from bbqrec_jax.tokenizer.inference import settings_from_json
  from bbqrec_jax.tokenizer.new_items import assign
  from bbqrec_jax.utils.compilation import keep_compiled
  from bbqrec_jax.utils.environment import settle_jax, start_devices
  from bbqrec_jax.utils.messages import warn

  options = quiet_flags()
  settle_jax()
  keep_compiled()
  output = options.output
  try:
    check_new(output)
    start_devices()
    ids = SemanticIds.load(options.tokenizer)
    settings = settings_from_json(ids.settings, trusted=options.trust)
    features, present = load_new_items(options.features, dict(settings.modalities))
    count = len(next(iter(present.values())))
    item_ids, _ = read_new_items(options.features, ids.item_ids, count=count)
    extended = assign(ids, features, present, item_ids=item_ids, trusted=options.trust)
    warnings = far_features(FeatureStore(features, present, ids.encoder), num_known=settings.num_items)
  except InputError as error:
    refuse(error)
  with writing(output):
    extended.save(unfinished(output))
    os.rename(unfinished(output), output)  # Whole or not there.
  for warning in warnings:
    warn(warning)
  known, new = len(ids.codes), len(extended.codes) - len(ids.codes)
  called = printable(f"{item_ids[known]} to {item_ids[known + new - 1]}")
  where = as_given(str(output))
  print(f"{new} new items after {known} known ones, {called}, in {where}, fingerprint {extended.fingerprint}")
  print(f"collisions of the new items after repair: {collision_rate(extended.codes[known:]):.1%}")


def program() -> None:
  """Defines the flags and runs the program."""
  define_path("tokenizer", "The tokenizer/ folder of a run.", use="read")
  define_path(
    "features",
    "Folder with <modality>_features.npy, a row for each new item, and items.jsonl, their ids.",
    use="read",
  )
  flags.DEFINE_list("trust", [], "Python modules of yours that the tokenizer's parts may be imported from.")
  define_path("output", "Folder for the IDs of the known and the new items together.", use="write")
  flags.mark_flags_as_required(["tokenizer", "features", "output"])
  start(main)
