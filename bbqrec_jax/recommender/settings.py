"""The settings of stage 2 and of evaluation, and the shapes that follow from them and from the data."""

import dataclasses
import itertools
from typing import Any

from bbqrec_jax.errors import InputError
from bbqrec_jax.training.settings import OptimizerSettings
from bbqrec_jax.utils.settings import section, setting

# Parts by name: what makes one of the settings.
BACKBONES = {
  "causal": "bbqrec_jax.recommender.model:causal",
  "encoder_decoder": "bbqrec_jax.recommender.model:encoder_decoder",
}
HEADS = {
  "generative": "bbqrec_jax.recommender.heads:generative",
  "dense": "bbqrec_jax.recommender.heads:dense",
  "parallel": "bbqrec_jax.recommender.heads:parallel",
  "hybrid": "bbqrec_jax.recommender.heads:HybridHead",
}


@dataclasses.dataclass(frozen=True)
class DenseTowerSettings:
  """The dense tower of the hybrid: a backbone that knows items without codes, and attends without similarities."""

  width: int = setting(0, "d of a backbone that is the dense head's alone, in the hybrid; 0: the heads share one.",
                       least=0)  # fmt: skip
  mlp_width: int = setting(512, "Of its feed-forward parts.")
  dropout: float = setting(0.5, "Of its layers.", below=1)


@dataclasses.dataclass(frozen=True)
class RecommenderSettings:
  """The sequence model: its shape, its head, its training."""

  backbone: str = setting(
    "causal", "One position per item and histories packed into rows, or T5 style over the codes of all items.",
    parts=BACKBONES,
  )  # fmt: skip
  head: str = setting(
    "generative", "Codes one by one with beam search, full softmax, each code by itself, or both of the first two.",
    parts=HEADS,
  )  # fmt: skip
  item_inputs: tuple[str, ...] = setting(
    ("fused", "modalities", "item"), "What an item's vector sums: its ID's codes, its modalities' own codes, a linear"
    " map of its features, a vector of its own. (item,) alone is SASRec, without a tokenizer.",
    subset=("fused", "modalities", "features", "item"),
  )  # fmt: skip
  similarity: tuple[str, ...] = setting(
    ("modalities",), "Streams whose similarity reweights attention; () is the plain backbone.",
    subset=("modalities", "fused"),
  )  # fmt: skip
  cross_pairs: bool = setting(True, "Bias tables for pairs of different streams too, where these share codebooks.")
  similarity_kind: str = setting(
    "equal_frequency", "Buckets of the cosines; the number of first codes that two IDs share; a slope, no buckets.",
    choices=("equal_frequency", "equal_width", "overlap", "continuous"),
  )  # fmt: skip
  num_buckets: int = setting(32, "Of each similarity, where they are of the cosines.", most=10**4)
  layer_tables: bool = setting(False, "Bias tables per layer instead of one set for all.")
  multiply_bias: bool = setting(False, "Multiply attention scores by 1 + bias instead of adding the bias.")
  attention: str = setting("einsum", "Implementation of attention: einsum, or those of jax.nn.dot_product_attention.",
                           choices=("einsum", "xla", "cudnn"))  # fmt: skip
  width: int = setting(64, "d of the sequence model.")
  num_layers: int = setting(2, "Layers of the backbone.", most=1000)
  num_heads: int = setting(2, "H, attention heads.")
  head_width: int = setting(32, "Of each attention head of the encoder-decoder; the causal backbone's is d / H.")
  positions: str = setting(
    "learned", "Of the causal backbone: an embedding per place, or a bias by distance; the encoder-decoder's are"
    " relative.", choices=("learned", "relative"),
  )  # fmt: skip
  position_buckets: int = setting(32, "Buckets of relative positions.")
  time_buckets: int = setting(
    0, "Of the time between interactions, in powers of two of a second, where the data has timestamps; 0: none.",
    least=0,
  )  # fmt: skip
  dtype: str = setting("float32", "That the model computes in; scores, softmaxes and losses stay float32.",
                       choices=("float32", "bfloat16"))  # fmt: skip
  mlp_width: int = setting(256, "Of the feed-forward parts.")
  softmax_over: str = setting(
    "existing", "What a code of the generative head competes with: codes that lead on to items, or all of its level.",
    choices=("existing", "all"),
  )  # fmt: skip
  node_scores: bool = setting(True, "Score a code of the generative head also by the items that it leads on to.")
  history_offsets: bool = setting(
    True, "Learn a number that is added to the scores of the history's items, or to codes that lead on to them."
  )
  rerank: str = setting("both", "Order of the hybrid's candidates: by both heads' probabilities, or the dense one's.",
                        choices=("both", "dense"))  # fmt: skip
  generative_weight: float = setting(1.0, "Of the generative loss in the hybrid whose heads share a backbone.")
  dense_tower: DenseTowerSettings = section(DenseTowerSettings, "Of the hybrid.")
  num_negatives: int = setting(
    0, "Items drawn per step to stand for the catalogue in the dense head's softmax, for catalogues past 100,000"
    " items; 0 takes all items.", least=0,
  )  # fmt: skip
  depth_layers: int = setting(1, "Layers of the generative head's depth transformer.", most=1000)
  dropout: float = setting(0.3, "Everywhere in the model.", below=1)
  item_dropout: float = setting(
    0.0, "Share of the items that lack a vector of their own in a step, as items do that come after training.", below=1
  )
  max_length: int = setting(20, "T: the longest history.", most=10**4)
  steps: int = setting(2000, "Training steps.")
  batch_rows: int = setting(32, "Rows per batch, over all devices.")
  accumulation: int = setting(
    1, "Parts that a batch is worked through in, one after another, for the memory of one; the gradient stays that of"
    " the whole batch."
  )  # fmt: skip
  row_length: int = setting(32, "Positions per row, where histories are packed.")
  length_buckets: tuple[int, ...] = setting(
    (), "Lengths below T, ascending, that histories are padded to where each has a row of its own."
  )
  evaluate_every: int = setting(500, "Steps between two validations (and checkpoints).")
  patience: int = setting(5, "Validations without a better NDCG@10 after which training stops.")
  optimizer: OptimizerSettings = section(OptimizerSettings, "Of all parameters.")

  def check(self, prefix: str) -> None:
    """Refuses fields that do not fit one another.

    Raises:
      InputError: if some do not.
    """
    field, t5 = f"config field {prefix}", self.backbone == "encoder_decoder"
    if not self.item_inputs:
      raise InputError(f"{field}item_inputs is empty: name some of fused, modalities, features, item")
    if t5 and ("fused" not in self.item_inputs or self.head == "hybrid"):
      raise InputError(
        f"{field}backbone = 'encoder_decoder' reads items by their IDs' codes, and works with any head but hybrid: put"
        f" fused into {prefix}item_inputs, or choose another head"
      )
    if self.head == "hybrid" and self.dense_tower.width and not {"item", "features"} & set(self.item_inputs):
      raise InputError(
        f"{field}dense_tower.width: the dense tower reads no codes; put features or item into {prefix}item_inputs, or"
        " set it to 0"
      )
    if self.dense_tower.width > 0 and self.head != "hybrid":
      raise InputError(
        f"{field}dense_tower.width = {self.dense_tower.width} works with {prefix}head = 'hybrid': set it so, or the"
        " width to 0"
      )
    places = self.position_buckets
    if t5 and not (4 <= places <= 254 and places % 2 == 0):
      raise InputError(f"{field}position_buckets must be an even number from 4 to 254, got {places}")
    if not t5 and self.positions == "relative" and not 2 <= places <= 255:
      raise InputError(f"{field}position_buckets must be from 2 to 255, got {places}")
    if self.item_dropout and not {"item"} < set(self.item_inputs):
      raise InputError(
        f"{field}item_dropout takes items' own vectors away, and needs others beside them: put item and something else"
        f" into {prefix}item_inputs, or set {prefix}item_dropout to 0"
      )
    if self.time_buckets and t5:
      raise InputError(f"{field}time_buckets works with the causal backbone: set it to 0")
    if self.similarity and self.max_length == 1:
      raise InputError(
        f"{field}max_length = 1 leaves no two items to compare: set it to at least 2, or {prefix}similarity to ()"
      )
    by_items = [f"{prefix}{name}" for name in ("node_scores", "history_offsets") if getattr(self, name)]
    if by_items and self.softmax_over == "all":
      raise InputError(
        f"{field}softmax_over = 'all' scores codes that lead on to no item: set {' and '.join(by_items)} to False"
      )
    if not all(low < high for low, high in itertools.pairwise((0, *self.length_buckets, self.max_length))):
      raise InputError(
        f"{field}length_buckets must be ascending whole numbers from 1 to {prefix}max_length - 1 ="
        f" {self.max_length - 1}, got {self.length_buckets!r}"
      )
    if self.multiply_bias and self.attention != "einsum":
      raise InputError(f"{field}multiply_bias works with {prefix}attention = 'einsum' alone")
    for name, width in (("width", 0 if t5 else self.width), ("dense_tower.width", self.dense_tower.width)):
      if width % self.num_heads:
        raise InputError(f"{field}{name} = {width} must be a multiple of {prefix}num_heads = {self.num_heads}")
    if self.row_length < self.max_length:
      raise InputError(
        f"{field}row_length = {self.row_length} must be at least {prefix}max_length = {self.max_length}: a full history"
        " must fit into a row"
      )


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
  """How users are ranked."""

  batch_size: int = setting(256, "Users ranked at once.")
  beam_width: int = setting(50, "Beams of a head that searches; a target outside the beam is a miss.")
  validation_users: int = setting(0, "Users of a validation while training, drawn once; 0: all.", least=0)


def needs_semantic_ids(config: Any) -> bool:
  """Whether anything in the recommender reads codes; SASRec, say, does not."""
  r = config.recommender
  codes = {"fused", "modalities"} & set(r.item_inputs)
  return r.head != "dense" or r.backbone == "encoder_decoder" or bool(r.similarity) or bool(codes)


def trains_tokenizer(config: Any) -> bool:
  """Whether a run makes semantic IDs of its own."""
  return needs_semantic_ids(config) and not config.tokenizer.artefact


def needs_features(config: Any) -> bool:
  """Whether a run reads what is known of items' content: for semantic IDs, or in the recommender itself."""
  return needs_semantic_ids(config) or "features" in config.recommender.item_inputs
