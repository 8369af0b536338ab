"""The settings of stage 2 and of evaluation, with the shapes that follow from the data."""

import dataclasses
import itertools
from typing import Any

from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.similarity import stream_pairs
from bbqrec_jax.training.settings import OptimizerSettings
from bbqrec_jax.utils.named import named, part
from bbqrec_jax.utils.settings import derived, section, setting

# Parts by name: what makes one of the settings.
BACKBONES = {
  "causal": "bbqrec_jax.recommender.causal:Causal",
  "encoder_decoder": "bbqrec_jax.recommender.encoder_decoder:Encoder",
}
HEADS = {
  "generative": "bbqrec_jax.recommender.generative:GenerativeHead",
  "dense": "bbqrec_jax.recommender.heads:DenseHead",
  "parallel": "bbqrec_jax.recommender.heads:ParallelHead",
  "hybrid": "bbqrec_jax.recommender.two_towers:TwoTowers",
}
# Of recommenders of several towers, the head of each.
TOWERS = {"hybrid": ("generative", "dense")}


def parts_of(recommender: Any) -> tuple[Any, tuple[Any, ...]]:
  """The backbone that a recommender's config or settings name, and its head, or that of each tower.

  Raises:
    InputError: if one is not there, or is no such class, see `bbqrec_jax.recommender.parts`.
  """
  head_base, backbone_base = (named(f"bbqrec_jax.recommender.parts:{kind}", {}) for kind in ("Head", "Backbone"))
  backbone = part("recommender.backbone", recommender.backbone, BACKBONES, base=backbone_base)
  towers = TOWERS.get(recommender.head, (recommender.head,))
  heads = [part("recommender.head", name, HEADS, base=head_base) for name in towers]
  return backbone, tuple((head.memory_head or head) if backbone.makes_memory else head for head in heads)


@dataclasses.dataclass(frozen=True)
class DenseTowerSettings:
  """The dense tower of the hybrid: a backbone that knows items without codes, and attends without similarities."""

  width: int = setting(128, "d: width of the dense tower's backbone.")
  mlp_width: int = setting(512, "Hidden width of the dense tower's feed-forward parts.")
  dropout: float = setting(0.5, "Dropout in the dense tower, as recommender.dropout is in the generative one.", below=1)


@dataclasses.dataclass(frozen=True)
class CandidateSimilaritySettings:
  """Similarity of candidates to the last items of a history, added to their scores."""

  streams: tuple[str, ...] = setting(
    (), "What items are compared by: standardised features, quantized vectors of each modality or of the whole, and how"
    " often they stand near each other in training histories; () does without.",
    subset=("features", "modalities", "fused", "behaviour"),
  )  # fmt: skip
  width: int = setting(
    128, "Dimensions, along their principal axes, that vectors are compared in at most; 0: all that they have.", least=0
  )
  last_items: int = setting(
    10, "R: the last distinct items of a history, each place with a table row of its own.", most=1000
  )
  num_buckets: int = setting(10, "Buckets of each similarity, narrower where items are more similar.", most=256)
  neighbours: int = setting(100, "K: items kept of each item's neighbours in histories.", most=10**4)
  users: int = setting(
    4096, "Users whose last training transition is held out at first, and the tables fitted on it; drawn once."
  )
  passes: int = setting(3, "Passes over these users in fitting the tables.")
  batch_rows: int = setting(64, "Users per step of the fit.")
  learning_rate: float = setting(
    0.02, "Learning rate of Adam, which fits the tables; it falls to zero over the passes."
  )
  network_units: int = setting(
    16, "Hidden units of the network on top of the tables and other signals of a candidate, where behaviour is a"
    " stream; 0: no network.", least=0, most=256,
  )  # fmt: skip
  titles: bool = setting(True, "Whether the network reads which rare words the titles of two items share.")
  network_passes: int = setting(24, "Passes over these users in fitting the network, at half of that learning rate.")


@dataclasses.dataclass(frozen=True)
class RecommenderSettings:
  """The sequence model: its shape, its head, its training.

  The last fields are derived: the data and the semantic IDs give them, see `items.recommender_settings`.
  """

  backbone: str = setting(
    "causal", "One position per item and histories packed into rows, or T5 style over the codes of all items.",
    parts=BACKBONES,
  )  # fmt: skip
  head: str = setting(
    "generative", "Codes one by one with beam search, full softmax, each code by itself, or the first two as towers.",
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
    choices=("equal_frequency", "overlap", "continuous"),
  )  # fmt: skip
  num_buckets: int = setting(
    32, "Buckets of each similarity of two items of the history, where it is a cosine.", most=10**4
  )
  width: int = setting(64, "d of the sequence model.")
  num_layers: int = setting(2, "Layers of the backbone.", most=1000)
  num_heads: int = setting(2, "H, attention heads.")
  head_width: int = setting(32, "Width of each attention head of the encoder-decoder; the causal backbone's is d / H.")
  positions: str = setting(
    "relative", "Of the causal backbone: each head's bias by the distance between items; or a vector of each place,"
    " counted from the last item where a row is a history, from the first where histories are packed.",
    choices=("relative", "absolute"),
  )  # fmt: skip
  position_buckets: int = setting(
    32, "Buckets of distances; half of them are one distance each, the others reach to 128."
  )
  time_buckets: int = setting(
    0, "Buckets of the time between interactions, in powers of two of a second, where the data has timestamps;"
    " 0: none.",
    least=0,
  )  # fmt: skip
  dtype: str = setting("float32", "Number format of the model; scores, softmaxes and losses stay float32.",
                       choices=("float32", "bfloat16"))  # fmt: skip
  mlp_width: int = setting(256, "Hidden width of the feed-forward parts.")
  norm: str = setting(
    "post", "Layers of the causal backbone: BERT's, which normalise each residual sum, start with small matrices and"
    " drop attention weights too; or those that normalise what goes into each branch.",
    choices=("post", "pre"),
  )  # fmt: skip
  softmax_over: str = setting(
    "existing", "What a code of the generative head competes with: codes that lead on to items, or all of its level.",
    choices=("existing", "all"),
  )  # fmt: skip
  subtree_logits: bool = setting(True, "Score a code of the generative head also by the items that it leads on to.")
  seen_item_bias: bool = setting(
    True, "Learn a number that is added to the scores of the history's items, or to codes that lead on to them."
  )
  cosine: bool = setting(
    True, "Score by the cosine of state and item vector, times a learned scale, in the dense head; else by the product."
  )
  dense_tower: DenseTowerSettings = section(DenseTowerSettings, "Of the hybrid.")
  candidate_similarity: CandidateSimilaritySettings = section(
    CandidateSimilaritySettings, "Added to the scores of candidates."
  )
  num_negatives: int = setting(
    -1, "Items drawn per step to stand for the catalogue in the dense head's softmax; 0: all items count; -1: 1,024 of"
    " catalogues of 8,192 items and more.", least=-1,
  )  # fmt: skip
  depth_layers: int = setting(1, "Layers of the generative head's depth transformer.", most=1000)
  dropout: float = setting(
    0.3, "Dropout of item vectors, residual branches and, with norm = post, attention weights.", below=1
  )
  item_dropout: float = setting(
    0.0, "Share of the items that lack a vector of their own in a step, as items do that come after training.", below=1
  )
  max_length: int = setting(20, "T: the longest history.", most=10**4)
  rows: str = setting(
    "packed", "A row of a batch: several whole histories packed, each position predicting the next item (the causal"
    " backbone alone), or the history before one transition, which alone is predicted.",
    choices=("packed", "histories"),
  )  # fmt: skip
  epochs: int = setting(100, "Passes over the training transitions, at most; see patience.")
  steps: int = setting(0, "Training steps, in place of epochs; 0: epochs count.", least=0)
  batch_rows: int = setting(
    0, "Rows per batch, over all devices; 0: 256 histories, or as many packed positions, up to 1,024, as leave an"
    " epoch 100 steps.", least=0,
  )  # fmt: skip
  accumulation: int = setting(
    1, "Parts that a batch is worked through in, one after another, for the memory of one; the gradient stays that of"
    " the whole batch."
  )  # fmt: skip
  row_length: int = setting(
    0, "Positions per row, where histories are packed; 0: 32, or T where that is more.", least=0
  )
  length_buckets: tuple[int, ...] = setting(
    (5, 10), "Lengths, ascending, that histories are padded to where each has a row of its own; those below T count."
  )
  evaluate_every: int = setting(
    0, "Steps between validations, each with a checkpoint; 0: two epochs, at least 200.", least=0
  )
  average: float = setting(
    0.99,
    "Share that a step leaves of the moving average of the parameters, which is what ranks; 0: no average.",
    below=1,
  )
  patience: int = setting(3, "Validations without a better NDCG@10 after which training stops.")
  optimizer: OptimizerSettings = section(OptimizerSettings, "Of all parameters.")
  num_items: int = derived(0, "N, of the data that the model is trained on.")
  num_levels: int = derived(0, "L, codes of an item's own ID; 0 where nothing reads codes.")
  num_codes: int = derived(0, "K, codes of a level; 0 where nothing reads codes.")
  num_columns: int = derived(0, "Code columns of the catalogue, see `Catalogue.columns`.")
  feature_width: int = derived(0, "F, of the features that an item's vector has a linear map of; 0: none.")
  candidate_vectors: int = derived(0, "Streams of vectors that candidates are compared by.")
  num_streams: int = derived(0, "Streams whose similarity reweights attention.")
  cross_streams: bool = derived(False, "Whether pairs of different streams have bias tables too.")
  table_buckets: int = derived(0, "Buckets of a bias table; 0: a slope in their place.")

  @property
  def item_embedding(self) -> bool:
    """Whether each item has a vector of its own."""
    return "item" in self.item_inputs

  @property
  def drawn_items(self) -> int:
    """Items drawn per step to stand for the catalogue in the dense head's softmax; 0: all count."""
    return (1024 if self.num_items >= 8192 else 0) if self.num_negatives < 0 else self.num_negatives

  @property
  def pairs(self) -> tuple[tuple[int, int], ...]:
    """The stream pairs that have a bias table."""
    return stream_pairs(self.num_streams, cross=self.cross_streams)

  @property
  def table_shape(self) -> tuple[int, int, int]:
    """[P, H, buckets + 2], or [P, H, 3] where the bias is a slope."""
    return len(self.pairs), self.num_heads, self.table_buckets + 2 if self.table_buckets else 3

  @property
  def backbone_class(self) -> Any:
    """The `parts.Backbone` that the settings name."""
    return parts_of(self)[0]

  @property
  def head_class(self) -> Any:
    """The `parts.Head` of a recommender of one tower."""
    return parts_of(self)[1][0]

  @property
  def packed(self) -> bool:
    """Whether a row is of several histories, each position predicting the item after it."""
    return is_packed(self)

  def check(self, prefix: str) -> None:
    """Refuses fields that do not fit one another.

    Raises:
      InputError: if some do not.
    """
    field = f"config field {prefix}"
    backbone, heads = parts_of(self)
    for chosen in (backbone, *heads):
      chosen.check(self, prefix)
    if not self.item_inputs:
      raise InputError(f"{field}item_inputs is empty: name some of fused, modalities, features, item")
    if backbone.reads_codes and ("fused" not in self.item_inputs or self.head in TOWERS):
      raise InputError(
        f"{field}backbone = {self.backbone!r} reads items by their IDs' codes, and works with any head but"
        f" {', '.join(TOWERS)}: put fused into {prefix}item_inputs, or choose another head"
      )
    if self.head in TOWERS and not {"item", "features"} & set(self.item_inputs):
      raise InputError(
        f"{field}head = {self.head!r} has a dense tower, which reads no codes: put features or item into"
        f" {prefix}item_inputs, or choose another head"
      )
    if self.item_dropout and not {"item"} < set(self.item_inputs):
      raise InputError(
        f"{field}item_dropout takes items' own vectors away, and needs others beside them: put item and something else"
        f" into {prefix}item_inputs, or set {prefix}item_dropout to 0"
      )
    if self.similarity and self.max_length == 1:
      raise InputError(
        f"{field}max_length = 1 leaves no two items to compare: set it to at least 2, or {prefix}similarity to ()"
      )
    by_items = [f"{prefix}{name}" for name in ("subtree_logits", "seen_item_bias") if getattr(self, name)]
    if by_items and self.softmax_over == "all":
      raise InputError(
        f"{field}softmax_over = 'all' scores codes that lead on to no item: set {' and '.join(by_items)} to False"
      )
    if not all(low < high for low, high in itertools.pairwise((0, *self.length_buckets))):
      raise InputError(f"{field}length_buckets must be ascending whole numbers from 1, got {self.length_buckets!r}")
    if self.head in TOWERS and self.dense_tower.width % self.num_heads:
      raise InputError(
        f"{field}dense_tower.width = {self.dense_tower.width} must be a multiple of {prefix}num_heads ="
        f" {self.num_heads}"
      )
    if self.packed and row_length(self) < self.max_length:
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


def reads_titles(candidate_similarity: Any) -> bool:
  """Whether titles are among the signals, by the config or the settings of candidate similarity."""
  return has_network(candidate_similarity) and candidate_similarity.titles


def has_network(candidate_similarity: Any) -> bool:
  """Whether a network weighs the signals of a candidate, by the config or the settings of candidate similarity."""
  return candidate_similarity.network_units > 0 and "behaviour" in candidate_similarity.streams


def is_packed(recommender: Any) -> bool:
  """Whether a row holds several histories, by a recommender's config or settings."""
  return recommender.rows == "packed" and parts_of(recommender)[0].rows == "packed"


def row_length(recommender: Any) -> int:
  """Positions of a row of packed histories, by a recommender's config or settings."""
  return int(recommender.row_length) or max(32, int(recommender.max_length))


def needs_semantic_ids(config: Any) -> bool:
  """Whether anything in the recommender reads codes; SASRec, say, does not."""
  r = config.recommender
  codes = {"fused", "modalities"} & set(r.item_inputs)
  backbone, heads = parts_of(r)
  codes |= {"fused", "modalities"} & set(r.candidate_similarity.streams)
  return bool(r.similarity or codes) or any(each.reads_codes for each in (backbone, *heads))


def trains_tokenizer(config: Any, *, alone: bool = False) -> bool:
  """Whether a run makes semantic IDs of its own; `alone`: if they are wanted whatever the recommender reads."""
  return (alone or needs_semantic_ids(config)) and not config.tokenizer.artefact


def needs_features(config: Any) -> bool:
  """Whether a run reads what is known of items' content: for semantic IDs, or in the recommender itself."""
  r = config.recommender
  return needs_semantic_ids(config) or "features" in {*r.item_inputs, *r.candidate_similarity.streams}
