"""Presets: configs by name, for `bbqrec train --config=hybrid` and the like."""

import functools
import importlib.util
import os
from collections.abc import Callable

import ml_collections

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.settings import HEADS, TOWERS, parts_of

SASREC = {"sasrec": ("item",), "sasrec_features": ("features", "item")}  # What these know items by.
SYSTEMS = ("generative", "dense", "parallel", "hybrid", *SASREC)


def is_wide(recommender: ml_collections.ConfigDict) -> bool:
  """Whether a recommender is wider than the default, as all are whose heads score every item."""
  return all(head.exact for head in parts_of(recommender)[1])


def system_config(system: str) -> ml_collections.ConfigDict:
  """The default config with a system's fields; items are known by a linear map of their features, too.

  Args:
    system: "generative", "dense", "parallel" or "hybrid", which is the first and "sasrec_features" in two towers.
      "sasrec" is the dense head without anything semantic, "sasrec_features" the same with the features.

  Raises:
    InputError: for any other name.
  """
  if system not in SYSTEMS:
    raise InputError(f"expected one of {', '.join(SYSTEMS)}, got {system!r}")
  config = default_config()
  recommender = config.recommender
  recommender.head = "dense" if system in SASREC else system
  recommender.item_inputs = SASREC.get(system, ("fused", "modalities", "features", "item"))
  recommender.item_dropout = 0.0 if system == "sasrec" else 0.2
  recommender.candidate_similarity.streams = ("features", "modalities", "fused", "behaviour")
  if system in SASREC:
    recommender.similarity = recommender.candidate_similarity.streams = ()
  if system == "sasrec":  # What is best where items are known by nothing else.
    recommender.update({"cosine": False, "rows": "histories", "positions": "absolute"})
  if is_wide(recommender):
    recommender.width = 128
    recommender.mlp_width = 512
    recommender.dropout = 0.5
  config.evaluation.validation_users = 4096
  if recommender.head in TOWERS:
    config.evaluation.beam_width = 30  # Both towers score what either finds: longer lists rank no better.
    recommender.subtree_logits = False  # The dense tower knows the items under a code: it ranks as well without.
  return config


def packed_recipe(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Sets the training recipe of the first tables in docs/results: packed rows, a fixed number of steps, no average.

  The recommender's steps, and what else was chosen for a data set, are left to the caller.
  """
  config.tokenizer.hold_out_last = False
  config.evaluation.validation_users = 0
  config.recommender.update({
    "rows": "packed", "positions": "absolute", "norm": "pre", "batch_rows": 32, "length_buckets": (), "average": 0.0,
    "evaluate_every": 500, "patience": 5, "dropout": 0.3, "cosine": False, "num_negatives": 0,
  })  # fmt: skip
  config.recommender.optimizer.b2 = 0.98
  config.recommender.candidate_similarity.streams = ()
  return config


def quickstart_config() -> ml_collections.ConfigDict:
  """Synthetic data of 2,000 users, 600 items and two modalities; small codebooks, a small sequence model."""
  config = default_config()
  config.data.source = "synthetic"
  config.tokenizer.num_codes = 64
  config.tokenizer.num_levels = 3
  config.tokenizer.hidden = (128, 64)
  config.tokenizer.steps = 800
  config.tokenizer.warmup_steps = 100
  config.tokenizer.batch_items = 256
  config.tokenizer.batch_rows = 8
  config.tokenizer.evaluate_every = 400
  config.recommender.epochs = 10
  return config


# TIGER's sequence model, whole and at a quarter of its width: fields of the recommender.
_T5 = {
  "backbone": "encoder_decoder", "item_inputs": ("fused",), "similarity": (), "softmax_over": "all",
  "subtree_logits": False, "seen_item_bias": False,
}  # fmt: skip
_TIGER = {
  "full": _T5 | {"width": 128, "num_layers": 4, "num_heads": 6, "head_width": 64, "mlp_width": 1024},
  "small": _T5 | {"width": 64, "num_layers": 2, "num_heads": 2, "head_width": 32, "mlp_width": 256},
}


def tiger_config(size: str = "full") -> ml_collections.ConfigDict:
  """TIGER's recipe: nothing is bound to behaviour, and attention is left as it is.

  Args:
    size: "full" for an accelerator; "small" for a CPU, which is not what TIGER's figures were measured with.
  """
  config = default_config()
  config.data.modalities = ("text",)
  config.tokenizer.update({"num_levels": 3, "repair": "suffix", "item_id": "none", "specific_dropout": 1.0})
  config.tokenizer.weights.update({"contrast": 0.0, "modality_contrast": 0.0, "disentangle": 0.0})
  steps = {"full": (256, 20_000, 2000), "small": (128, 4000, 500)}[size]
  config.recommender.update(_TIGER[size])
  config.recommender.update(dict(zip(("batch_rows", "steps", "evaluate_every"), steps, strict=True), patience=5))
  config.recommender.update({"length_buckets": (2, 5, 10), "dropout": 0.1})
  config.evaluation.validation_users = 2048
  return config


# Of the recommender: width, layers, heads, rows and length of a batch; of the data: items, width of a modality.
_BENCHMARK = {
  "small": {"width": 64, "layers": 2, "heads": 2, "rows": 16, "length": 50, "items": 5_000, "features": 384},
  "paper": {"width": 128, "layers": 2, "heads": 2, "rows": 64, "length": 50, "items": 12_101, "features": 768},
  "large": {"width": 1024, "layers": 8, "heads": 16, "rows": 256, "length": 64, "items": 100_000, "features": 768},
}


def benchmark_config(size: str = "small") -> ml_collections.ConfigDict:
  """What `bbqrec benchmark` times: sizes and windows, and the config of the run whose parts are timed.

  Args:
    size: "small" (a laptop), "paper" (the paper's sizes) or "large" (an accelerator).
  """
  chosen = _BENCHMARK[size]
  config = ml_collections.ConfigDict()
  config.name = size
  config.num_users = 20_000  # Of random histories, 3 items or more, 8 on average.
  config.num_items = chosen["items"]
  config.modalities = {"text": chosen["features"], "image": chosen["features"]}  # Name: width.
  config.windows = 10  # Timed windows of each benchmark.
  config.window_seconds = 0.3  # About how long each is.

  config.run = run = default_config()
  run.tokenizer.batch_items = 8192 if size == "large" else 1024
  run.recommender.update({
    "width": chosen["width"], "mlp_width": 4 * chosen["width"], "num_layers": chosen["layers"],
    "num_heads": chosen["heads"], "batch_rows": chosen["rows"], "max_length": chosen["length"],
    "row_length": chosen["length"], "rows": "packed", "num_negatives": 0,
    "dtype": "bfloat16" if size == "large" else "float32",
  })  # fmt: skip
  run.evaluation.batch_size = 64
  # By backbone and head: which fields of `run.recommender` differ.
  config.recommenders = {f"causal/{head}": {"head": head} for head in HEADS}
  t5 = _TIGER["small" if size == "small" else "full"]
  rows = 16 if size == "small" else 64
  config.recommenders["encoder_decoder/generative"] = t5 | {"batch_rows": rows, "max_length": 20, "row_length": 20}
  return config


PRESETS: dict[str, Callable[[], ml_collections.ConfigDict]] = {
  "quickstart": quickstart_config,
  **{system: functools.partial(system_config, system) for system in SYSTEMS},
  "tiger": tiger_config,
  "tiger_small": functools.partial(tiger_config, "small"),
  "benchmark": benchmark_config,
  "benchmark_paper": functools.partial(benchmark_config, "paper"),
  "benchmark_large": functools.partial(benchmark_config, "large"),
}


def preset(name: str) -> ml_collections.ConfigDict:
  """A config by name, whose fields can be set.

      config = bbqrec_jax.preset("hybrid")
      config.recommender.steps = 500

  Args:
    name: of PRESETS.

  Raises:
    InputError: if there is none of that name; names those that there are.
  """
  if name not in PRESETS:
    raise InputError(f"expected one of the presets {', '.join(PRESETS)}, got {name!r}")
  return PRESETS[name]()


def load_config(name: str) -> ml_collections.ConfigDict:
  """The config of a preset, or of a file, as FILE or FILE:CHOICE.

  Raises:
    InputError: if there is none, or the file's `get_config` does not give one.
  """
  if name in PRESETS:
    return PRESETS[name]()
  file, _, choice = name.partition(":")
  if not file.endswith(".py"):
    return preset(name)
  spec = importlib.util.spec_from_file_location("config_file", file)
  if spec is None or spec.loader is None or not os.path.isfile(file):
    raise InputError(f"expected a preset or a config file, got {file!r}; check the path")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  try:
    config = module.get_config(choice) if choice else module.get_config()
  except (AttributeError, KeyError, TypeError) as error:
    raise InputError(f"{file} has no config {choice!r} ({error!r})") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise InputError(f"{file}: expected get_config to give a ConfigDict, got {type(config).__name__}")
  return config


get_config = preset  # This file is a config file itself.
