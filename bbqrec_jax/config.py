"""Every field of a run, commented once, with its default.

A config file sets fields on `default_config()`; a field that is not here is refused.
"""

from typing import Any

import ml_collections


def default_config() -> ml_collections.ConfigDict:
  """The base that every file of configs/ builds on; locked, so that a misspelt field is an error."""
  config = ml_collections.ConfigDict()
  config.seed = 0  # Of everything random: initialisation, batch order, dropout, codebook fitting.
  config.partitioner = "pmap"  # "pmap" or "mesh" (jit) over all devices of all processes, or "single".
  config.shard_rows = 0  # Of "mesh": arrays of at least so many rows (item embeddings and what the optimiser keeps of
  # them, codes and vectors of the catalogue, nodes of the trie) are spread over the devices; 0: each device has all.
  config.log_every = 50  # Steps between two lines of training metrics.
  config.keep_checkpoints = 2  # Newest ones kept of each stage, beside the best: a damaged one has one before it.
  config.on_nonfinite = (
    "stop"  # At a step whose loss or gradient is not finite, or "skip" it: nothing of it is applied.
  )
  config.max_skipped = 10  # Steps skipped in a row after which training stops all the same.
  config.spike_factor = 3.0  # Losses of more than so many times their running median are logged.

  config.data = data = ml_collections.ConfigDict()
  data.source = "directory"  # "directory", "recbole" (atomic files) or "synthetic" (planted structure).
  data.path = ""  # The folder of "directory" and "recbole".
  data.modalities = ()  # Names of the modalities to use, in order; () means all that are found.
  data.drop_short_users = False  # Drop users with fewer than 3 interactions instead of refusing them.
  data.drop_incomplete_items = False  # Drop items that lack one of the modalities, and whatever was done with them.
  data.synthetic = synthetic = ml_collections.ConfigDict()
  synthetic.num_users = 2000
  synthetic.num_items = 600
  synthetic.seed = 0  # Of the generated data alone; the run's own seed does not change the data.

  config.tokenizer = tokenizer = ml_collections.ConfigDict()
  tokenizer.code_width = 32  # d: width of latents and codewords.
  tokenizer.num_levels = 4  # L: codes in a semantic ID.
  tokenizer.num_codes = 256  # K: codewords a level.
  tokenizer.hidden = (512, 256)  # Encoder widths between the features and d; decoders mirror them.
  tokenizer.artefact = ""  # Folder of a tokenizer trained before (a run's tokenizer/), to use it and train none.
  tokenizer.quantizer = "rq_vae"  # "rq_vae" (learned residual codebooks), "rq_kmeans" (residual k-means of the features
  # themselves, nothing learned), or a function added to QUANTIZERS in bbqrec_jax/ops/quantize.py.
  tokenizer.content_codes = False  # Also the codes that residual k-means gives the features themselves, for
  # recommenders that are to know them beside the learned ones (item_inputs "content").
  tokenizer.codebooks = "shared"  # "shared" by all streams, one "per_stream", or a "single" one for all levels too.
  tokenizer.codebook_update = (
    "loss"  # Codewords follow the quantization "loss", or "moving_average" of what chose them.
  )
  tokenizer.codeword_decay = 0.98  # Of those averages.
  tokenizer.gradient = "straight_through"  # Through the codewords: "straight_through" or "rotation".
  tokenizer.balanced_last = False  # Balance the last level's codes over each batch (Sinkhorn) while training.
  tokenizer.item_id = "added"  # The learnable item ID (z_ID): "added" to the fused latent, its own "stream", or "none".
  tokenizer.semantic_id = "fused"  # IDs of the "fused" stream, of the modalities "concatenated", or of the "item_id".
  tokenizer.repair = "reassign"  # Colliding items: "reassign" to the nearest free ID, or a counting "suffix" level.
  tokenizer.normalize = True  # Layer-normalise the modalities' and the fused latents before they are quantized.
  tokenizer.history_layers = 1  # Layers of the transformer behind the sequence-to-item contrast.
  tokenizer.history_heads = 2
  tokenizer.max_length = 20  # The longest history the contrast looks at, in items.
  tokenizer.dropout = 0.1
  tokenizer.steps = 2000
  tokenizer.warmup_steps = 200  # Steps on unquantized latents, before k-means fits the codebooks to them.
  tokenizer.kmeans_iterations = 20
  tokenizer.kmeans_points = 65536  # Latents that k-means is seeded from, drawn at random; its iterations see all.
  tokenizer.revival_threshold = 0.1  # A code chosen less than this share of 1 / K is moved to a live residual; 0: never
  tokenizer.batch_items = 256  # Items of the catalogue sample in a batch.
  tokenizer.batch_rows = 32  # Rows of packed histories in a batch, over all devices.
  tokenizer.row_length = 32  # Items in a row.
  tokenizer.device_features = 1024  # Features of all items, standardised, stay on each device while they take no more
  # MiB than this; what is larger is read by the host, a batch at a time.
  tokenizer.evaluate_every = 500  # Steps between two health checks (and checkpoints).
  tokenizer.commitment = 0.25  # beta of the quantization loss.
  tokenizer.temperature = 0.3  # Of the contrast, or where it starts.
  tokenizer.learn_temperature = False
  tokenizer.level_dropout = 0.5  # Share of items that the contrast sees by a prefix of their codewords alone.
  tokenizer.specific_dropout = 0.5  # Share of items decoded from codes alone in a step, so that codes carry content.
  tokenizer.own_loss = ""  # A loss of your own beside those below, as "module:function"; see `OwnLoss` in
  # bbqrec_jax/tokenizer/losses.py.
  tokenizer.weights = weights = ml_collections.ConfigDict()  # One weight a loss.
  weights.reconstruction = 1.0
  weights.fused_reconstruction = 1.0  # Every modality from the fused codes alone.
  weights.quantization = 1.0
  weights.contrast = 2.0  # State of the history against the fused vector of the next item.
  weights.modality_contrast = 1.0  # The same state against each modality's vector of the next item.
  weights.item_id = 0.05  # Mean squared norm of the item IDs: they say no more than behaviour needs them to.
  weights.disentangle = 0.01  # CLUB bound between each modality's quantized and specific latents; 0 leaves it out.
  weights.own = 1.0  # What tokenizer.own_loss gives.
  tokenizer.club = club = ml_collections.ConfigDict()
  club.bound = "full"  # Negatives of the bound: "full" (every row of the batch) or "sampled" (one drawn row).
  club.steps = 5  # Likelihood steps of its network on each batch.
  club.learning_rate = 1e-3
  tokenizer.optimizer = _optimizer(learning_rate=1e-3, weight_decay=1e-4, warmup_steps=50)

  config.recommender = recommender = ml_collections.ConfigDict()
  recommender.backbone = "causal"  # "causal" (one position an item, histories packed), "encoder_decoder" (T5 style over
  # the codes of all items, a history a row), or your own as "module:function".
  recommender.head = "generative"  # "generative" (codes one by one, beam search), "dense" (full softmax), "parallel"
  # (each code by itself), "hybrid" (generative and dense together), or your own as "module:function".
  recommender.item_inputs = ("fused", "modalities", "item")  # What an item's vector sums: its ID's codes, its
  # modalities' own codes, its "content" codes (tokenizer.content_codes), a linear map of its "features", a vector of
  # its own. ("item",) alone is SASRec, and needs no tokenizer.
  recommender.similarity = ("modalities",)  # Streams whose similarity reweights attention: "modalities", "fused"; ()
  # is the plain backbone.
  recommender.cross_pairs = True  # Bias tables for pairs of different streams too, where these share codebooks.
  recommender.similarity_kind = "equal_frequency"  # Buckets of the cosines, "equal_frequency" or "equal_width"; one for
  # each number of codes that two IDs share from the first ("overlap"); or "continuous", a slope times the cosine.
  recommender.num_buckets = 32  # Of each similarity, where they are of the cosines.
  recommender.layer_tables = False  # Bias tables of each layer's own instead of one for all.
  recommender.multiply_bias = False  # Multiply attention scores by 1 + bias instead of adding the bias.
  recommender.attention = "einsum"  # Or "xla", "cudnn": implementations of jax.nn.dot_product_attention.
  recommender.width = 64  # d of the sequence model.
  recommender.num_layers = 2
  recommender.num_heads = 2
  recommender.head_width = 32  # Of each attention head of the encoder-decoder; the causal backbone's is d / H.
  recommender.positions = "learned"  # Of the causal backbone: an embedding of each place, or "relative", a bias by
  # distance; the encoder-decoder's are relative.
  recommender.position_buckets = 32  # Buckets of relative positions.
  recommender.time_buckets = 0  # Of the time between interactions, in powers of two of a second, where the data has
  # timestamps: a bias of the causal backbone's attention. 32 reach 68 years; 0: none.
  recommender.dtype = "float32"  # That the model computes in, or "bfloat16"; scores, softmaxes and losses stay float32.
  recommender.mlp_width = 256
  recommender.softmax_over = "existing"  # What a code of the generative head competes with: codes that lead on to
  # items ("existing"), or "all" codes of its level.
  recommender.node_scores = True  # Score a code of the generative head also by the items that it leads on to.
  recommender.history_offsets = True  # Learn a number that is added to the scores of the history's items (dense), or
  # to those of codes as far as they lead on to such items, one number a level (generative). People come back for the
  # same, or never do. Not in the parallel head.
  recommender.rerank = "both"  # The order of the hybrid head's candidates: by the product of both heads'
  # probabilities, or by the "dense" one alone, as in LIGER; then, of one backbone, all new items are candidates.
  recommender.generative_weight = 1.0  # Of the generative head's loss in the hybrid one's, where they share a
  # backbone. A small one leaves the dense head nearly as good as alone; then rerank by "dense".
  recommender.dense_tower = dense_tower = ml_collections.ConfigDict()
  dense_tower.width = 0  # d of a backbone that is the dense head's alone, in the hybrid: it knows items without codes,
  # and attends without similarities. Both towers give candidates, and both score them. 0: the heads share a backbone.
  dense_tower.mlp_width = 512
  dense_tower.dropout = 0.5
  recommender.num_negatives = 0  # Items drawn in a step to stand for the catalogue in the dense head's softmax, for
  # catalogues past 100,000 items; 0 takes all items.
  recommender.depth_layers = 1  # Layers of the generative head's depth transformer.
  recommender.dropout = 0.3
  recommender.item_dropout = 0.0  # Share of the items that lack a vector of their own in a step, as items do that come
  # after training: what they are known by besides must then do.
  recommender.max_length = 20  # T: the longest history.
  recommender.steps = 2000
  recommender.batch_rows = 32  # Rows of packed histories in a batch, over all devices.
  recommender.accumulation = 1  # Parts that a batch is worked through in, one after another, for the memory of one. The
  # gradient stays that of the whole batch. The tokenizer has no such field: its negatives are those of a whole batch.
  recommender.row_length = 32  # Positions in a row, where histories are packed.
  recommender.length_buckets = ()  # Lengths below T, rising, that histories are padded to where each has a row of its
  # own (the encoder-decoder's, and all in evaluation), a batch being of histories of one length, or nearly.
  recommender.evaluate_every = 500  # Steps between two validations (and checkpoints).
  recommender.patience = 5  # Validations without a better NDCG@10 after which training stops.
  recommender.optimizer = _optimizer(learning_rate=1e-3, weight_decay=1e-2, warmup_steps=100)

  config.evaluation = evaluation = ml_collections.ConfigDict()
  evaluation.batch_size = 256  # Users ranked at once.
  evaluation.beam_width = 50  # Beams of the generative head; a target outside the beam is a miss.
  evaluation.validation_users = 0  # Users of a validation while training, drawn once; 0 means all.
  return config.lock()


def _optimizer(*, learning_rate: float, weight_decay: float, warmup_steps: int) -> ml_collections.ConfigDict:
  """The fields of AdamW, alike in both stages."""
  optimizer = ml_collections.ConfigDict()
  optimizer.learning_rate = learning_rate
  optimizer.schedule = "cosine"  # After the warm-up: "cosine" or "constant".
  optimizer.warmup_steps = warmup_steps
  optimizer.weight_decay = weight_decay  # Of the layers' weight matrices alone, not of the recommender's feature map.
  optimizer.clip_norm = 1.0  # Global norm at which gradients are clipped, those of two towers together. The
  # recommender's are longer at nearly every step, so that their direction is what counts.
  return optimizer


# What may change between two starts of one run: no number of a run that nothing befalls depends on it.
CHANGEABLE = {"data.path", "keep_checkpoints", "on_nonfinite", "max_skipped", "spike_factor"}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
  """The fields of a config by dotted name; lists become tuples."""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if hasattr(value, "items"):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = tuple(value) if isinstance(value, list) else value
  return flat
