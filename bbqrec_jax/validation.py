"""The checks of a config that need no data."""

import itertools
from typing import Any

import ml_collections

from bbqrec_jax.config import default_config, flatten
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.heads import HEADS
from bbqrec_jax.recommender.items import trains_tokenizer
from bbqrec_jax.recommender.model import BACKBONES
from bbqrec_jax.tokenizer.frozen import CHOICES as TOKENIZER_CHOICES
from bbqrec_jax.utils.named import named

_CHOICES = {
  **{f"tokenizer.{name}": choices for name, choices in TOKENIZER_CHOICES.items()},
  "on_nonfinite": ("stop", "skip"),
  "partitioner": ("pmap", "mesh", "single"),
  "data.source": ("synthetic", "directory", "recbole"),
  "tokenizer.codebook_update": ("loss", "moving_average"),
  "tokenizer.repair": ("reassign", "suffix"),
  "tokenizer.club.bound": ("full", "sampled"),
  "recommender.similarity_kind": ("equal_frequency", "equal_width", "overlap", "continuous"),
  "recommender.positions": ("learned", "relative"),
  "recommender.attention": ("einsum", "xla", "cudnn"),
  "recommender.dtype": ("float32", "bfloat16"),
  "recommender.softmax_over": ("existing", "all"),
  "recommender.rerank": ("both", "dense"),
  "tokenizer.optimizer.schedule": ("constant", "cosine"),
  "recommender.optimizer.schedule": ("constant", "cosine"),
}
_SUBSETS = {
  "recommender.item_inputs": ("fused", "modalities", "content", "features", "item"),
  "recommender.similarity": ("modalities", "fused"),
}
_FEWEST_ROWS = 64  # That are worth spreading.
_MAY_BE_ZERO = {
  "seed",
  "shard_rows",
  "data.synthetic.seed",
  "tokenizer.warmup_steps",
  "tokenizer.device_features",
  "tokenizer.optimizer.warmup_steps",
  "recommender.optimizer.warmup_steps",
  "evaluation.validation_users",
  "recommender.num_negatives",
  "recommender.dense_tower.width",
  "recommender.time_buckets",
}


# What is built, allocated or computed before anything else shows that it is too much; seeds are 32 bits.
_AT_MOST = {
  "seed": 2**32 - 1,
  "data.synthetic.seed": 2**32 - 1,
  "data.synthetic.num_users": 10**7,
  "data.synthetic.num_items": 10**7,
  "tokenizer.num_levels": 100,
  "tokenizer.history_layers": 100,
  "recommender.num_layers": 1000,
  "recommender.depth_layers": 1000,
  "recommender.num_buckets": 10**4,
  "recommender.max_length": 10**4,
}


def validate(config: ml_collections.ConfigDict, *, tokenizer_alone: bool = False) -> None:
  """Refuses what no run could use, in one line.

  Args:
    config: of the run. Fields of a tokenizer that it trains none of may hold anything.
    tokenizer_alone: whether a tokenizer is to be trained whatever the recommender reads.

  Raises:
    InputError: for an unknown or missing field, a value out of its range or choices, or widths that do not divide.
  """
  flat, known = flatten(config), flatten(default_config())
  for name in flat.keys() ^ known.keys():
    what = "unknown" if name in flat else "missing"
    raise InputError(f"config field {name} is {what}: the fields and their meaning are in bbqrec_jax/config.py")
  makes_ids = tokenizer_alone or trains_tokenizer(config)
  if not makes_ids:
    flat = {name: value for name, value in flat.items() if not name.startswith("tokenizer.")}
  _check_choices(flat)
  _check_ranges(flat)
  _check_recommender(flat)
  if makes_ids:
    _check_tokenizer(flat)
  _check_sizes(flat)


def _check_choices(flat: dict[str, Any]) -> None:
  """Refuses what is none of a field's choices."""
  for name, choices in _CHOICES.items():
    if name in flat and flat[name] not in choices:
      raise InputError(f"config field {name} must be one of {', '.join(choices)}, got {flat[name]!r}")
  for name, choices in _SUBSETS.items():
    if not set(flat[name]) <= set(choices) or len(set(flat[name])) < len(flat[name]):
      raise InputError(f"config field {name} may hold each of {', '.join(choices)} once, got {flat[name]!r}")
  names = flat["data.modalities"]
  if not all(isinstance(name, str) for name in names):
    raise InputError(f"config field data.modalities must be names, got {names!r}: put each in quotes, as ('2024',)")
  if not flat["recommender.item_inputs"]:
    raise InputError(
      f"config field recommender.item_inputs is empty: name some of {', '.join(_SUBSETS['recommender.item_inputs'])}"
    )
  for name, registered in (("recommender.head", HEADS), ("recommender.backbone", BACKBONES)):
    try:
      named(flat[name], registered)
    except ValueError as error:
      raise InputError(f"config field {name}: {error}") from error


def _check_ranges(flat: dict[str, Any]) -> None:
  """Refuses numbers out of their range."""
  for name, value in flat.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      continue
    lowest = 0 if name in _MAY_BE_ZERO or isinstance(value, float) else 1
    if not value >= lowest or value == float("inf"):
      raise InputError(f"config field {name} must be at least {lowest} and finite, got {value}")
  for name, highest in _AT_MOST.items():
    if name in flat and flat[name] > highest:
      raise InputError(f"config field {name} must be at most {highest}, got {flat[name]}")
  for name in (
    "tokenizer.dropout",
    "tokenizer.codeword_decay",
    "tokenizer.revival_threshold",
    "recommender.dropout",
    "recommender.item_dropout",
    "recommender.dense_tower.dropout",
  ):
    if name in flat and flat[name] >= 1:
      raise InputError(f"config field {name} must be less than 1, got {flat[name]}")
  for name in (
    "spike_factor",
    "tokenizer.temperature",
    "tokenizer.optimizer.clip_norm",
    "recommender.optimizer.clip_norm",
  ):
    if name in flat and flat[name] <= 0:
      raise InputError(f"config field {name} must be greater than 0, got {flat[name]}")
  for name in ("tokenizer.specific_dropout", "tokenizer.level_dropout"):
    if name in flat and flat[name] > 1:
      raise InputError(f"config field {name} must be at most 1, got {flat[name]}")


def _check_recommender(flat: dict[str, Any]) -> None:
  """Refuses fields of the recommender that do not fit one another."""
  if flat["recommender.backbone"] == "encoder_decoder" and (
    "fused" not in flat["recommender.item_inputs"] or flat["recommender.head"] == "hybrid"
  ):
    raise InputError(
      "config field recommender.backbone = 'encoder_decoder' reads items by their IDs' codes, and works with any head"
      " but hybrid: put fused into recommender.item_inputs, or choose another head"
    )
  if (
    flat["recommender.head"] == "hybrid"
    and flat["recommender.dense_tower.width"]
    and not {"item", "features"} & set(flat["recommender.item_inputs"])
  ):
    raise InputError(
      "config field recommender.dense_tower.width: the dense tower reads no codes; put features or item into"
      " recommender.item_inputs, or set it to 0"
    )
  if flat["recommender.dense_tower.width"] > 0 and flat["recommender.head"] != "hybrid":
    raise InputError(
      f"config field recommender.dense_tower.width = {flat['recommender.dense_tower.width']} works with"
      " recommender.head = 'hybrid': set it so, or the width to 0"
    )
  t5 = flat["recommender.backbone"] == "encoder_decoder"
  places = flat["recommender.position_buckets"]
  if t5 and not (4 <= places <= 254 and places % 2 == 0):
    raise InputError(f"config field recommender.position_buckets must be an even number from 4 to 254, got {places}")
  if not t5 and flat["recommender.positions"] == "relative" and not 2 <= places <= 255:
    raise InputError(f"config field recommender.position_buckets must be from 2 to 255, got {places}")
  if flat["recommender.item_dropout"] and not {"item"} < set(flat["recommender.item_inputs"]):
    raise InputError(
      "config field recommender.item_dropout takes items' own vectors away, and needs others beside them: put item and"
      " something else into recommender.item_inputs, or set recommender.item_dropout to 0"
    )
  if flat["recommender.time_buckets"] and flat["recommender.backbone"] == "encoder_decoder":
    raise InputError("config field recommender.time_buckets works with the causal backbone: set it to 0")
  if flat["recommender.similarity"] and flat["recommender.max_length"] == 1:
    raise InputError(
      "config field recommender.max_length = 1 leaves no two items to compare: set it to at least 2, or"
      " recommender.similarity to ()"
    )
  by_items = [f"recommender.{name}" for name in ("node_scores", "history_offsets") if flat[f"recommender.{name}"]]
  if by_items and flat["recommender.softmax_over"] == "all":
    raise InputError(
      "config field recommender.softmax_over = 'all' scores codes that lead on to no item: set"
      f" {' and '.join(by_items)} to False"
    )
  buckets = flat["recommender.length_buckets"]
  rising = (0, *buckets, flat["recommender.max_length"]) if all(isinstance(bound, int) for bound in buckets) else (0, 0)
  if not all(low < high for low, high in itertools.pairwise(rising)):
    raise InputError(
      f"config field recommender.length_buckets must be rising whole numbers from 1 to recommender.max_length - 1 ="
      f" {flat['recommender.max_length'] - 1}, got {buckets!r}"
    )
  if flat["recommender.multiply_bias"] and flat["recommender.attention"] != "einsum":
    raise InputError("config field recommender.multiply_bias works with recommender.attention = 'einsum' alone")


def _check_tokenizer(flat: dict[str, Any]) -> None:
  """Refuses fields of the tokenizer, and what is asked of it, that do not fit one another."""
  hidden = flat["tokenizer.hidden"]
  if not hidden or not all(isinstance(width, int) and width > 0 for width in hidden):
    raise InputError(f"config field tokenizer.hidden must be widths of at least 1, as 512,256, got {hidden!r}")
  if flat["tokenizer.max_length"] == 1:
    raise InputError("config field tokenizer.max_length must be at least 2: the contrast needs an item and the next")
  if flat["tokenizer.semantic_id"] == "item_id" and (
    flat["tokenizer.item_id"] == "none" or flat["tokenizer.quantizer"] == "rq_kmeans"
  ):
    raise InputError(
      "config field tokenizer.semantic_id = 'item_id' needs learnable item IDs: set tokenizer.item_id to added or"
      " stream, and tokenizer.quantizer to one that learns"
    )
  if flat["tokenizer.own_loss"] and flat["tokenizer.quantizer"] == "rq_kmeans":
    raise InputError(
      "config field tokenizer.own_loss: nothing learns with tokenizer.quantizer = 'rq_kmeans'; leave it empty, or"
      " choose another quantizer"
    )
  if "content" in flat["recommender.item_inputs"] and flat["tokenizer.quantizer"] == "rq_kmeans":
    raise InputError(
      "config field recommender.item_inputs has content, but the codes of tokenizer.quantizer = 'rq_kmeans' are those"
      " of the content already: put fused in its place, and set tokenizer.content_codes to False"
    )
  if flat["tokenizer.content_codes"] and flat["tokenizer.quantizer"] == "rq_kmeans":
    raise InputError(
      "config field tokenizer.content_codes: the codes of tokenizer.quantizer = 'rq_kmeans' are those of the content"
      " already; set it to False"
    )
  if "content" in flat["recommender.item_inputs"] and not flat["tokenizer.content_codes"]:
    raise InputError(
      "config field recommender.item_inputs has content, which a tokenizer makes with tokenizer.content_codes = True"
    )
  if flat["tokenizer.warmup_steps"] >= flat["tokenizer.steps"]:
    raise InputError(
      f"config field tokenizer.warmup_steps = {flat['tokenizer.warmup_steps']} must be less than tokenizer.steps ="
      f" {flat['tokenizer.steps']}: the codebooks are fitted when the warm-up ends"
    )
  if flat["tokenizer.balanced_last"] and flat["tokenizer.quantizer"] != "rq_vae":
    raise InputError("config field tokenizer.balanced_last works with tokenizer.quantizer = 'rq_vae' alone")


def _check_sizes(flat: dict[str, Any]) -> None:
  """Refuses sizes that do not divide one another, or do not hold one another."""
  # Fewer rows than a stack of codebooks may have: those stay whole.
  if 0 < flat["shard_rows"] < _FEWEST_ROWS:
    raise InputError(f"config field shard_rows must be 0 or at least {_FEWEST_ROWS}, got {flat['shard_rows']}")
  if flat["shard_rows"] and flat["partitioner"] != "mesh":
    raise InputError(
      f"config field shard_rows = {flat['shard_rows']} works with partitioner = 'mesh': set it so, or shard_rows to 0"
    )
  for width, heads in (
    ("recommender.width", "recommender.num_heads"),
    ("recommender.dense_tower.width", "recommender.num_heads"),
    ("tokenizer.code_width", "tokenizer.history_heads"),
  ):
    own_width = width == "recommender.width" and flat["recommender.backbone"] == "encoder_decoder"
    if width in flat and flat[width] % flat[heads] and not own_width:
      raise InputError(f"config field {width} = {flat[width]} must be a multiple of {heads} = {flat[heads]}")
  for stage in ("tokenizer", "recommender"):
    if f"{stage}.row_length" in flat and flat[f"{stage}.row_length"] < flat[f"{stage}.max_length"]:
      raise InputError(
        f"config field {stage}.row_length = {flat[f'{stage}.row_length']} must be at least {stage}.max_length ="
        f" {flat[f'{stage}.max_length']}: a full history must fit into a row"
      )
