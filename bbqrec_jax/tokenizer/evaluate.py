"""Figures of a tokenizer, while it trains and after: code use, cohesion, reconstruction, disentangling, recall."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bbqrec_jax.data.feature_store import FeatureStore
from bbqrec_jax.data.interactions import Interactions, Split
from bbqrec_jax.data.ranking import evaluation_batches
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.layers.padding import without_padding
from bbqrec_jax.ops.contrastive import normalize
from bbqrec_jax.ops.ranking import expected_hits
from bbqrec_jax.semantic_ids.health import behaviour_cohesion, codebook_health, linear_r2
from bbqrec_jax.tokenizer.inference import encode_blocks
from bbqrec_jax.tokenizer.model import Tokenizer, codebooks_of
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.training.partitioning import Partitioner

# Items whose reconstruction and disentangling are measured: a sample, so that the work does not grow with N.
_SAMPLE = 8192


class CatalogueEncoder:
  """Latents and codes of every item, a block of items at a time."""

  def __init__(self, model: Tokenizer, store: FeatureStore, *, partitioner: Partitioner, block: int = 2048):
    """`block` items are encoded at once."""
    self._model, self._store = model, store
    self._block = min(block, model.settings.num_items)

    def encode(params, shared, batch):
      del shared
      latents = apply(model, params, "latents", *batch)
      results = latents.values, latents.present, apply(model, params, "quantize", latents.values).codes
      return tuple(jnp.swapaxes(array, 0, 1) for array in results)

    self._encode = partitioner.compile_map(encode)

  def __call__(self, params: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latents [S, N, d], present [S, N], codes [S, N, L])."""

    def encode(items):
      results = self._encode(params, None, (items, *self._store.rows(items)))
      return tuple(np.swapaxes(np.asarray(array), 0, 1) for array in results)

    latents, present, codes = encode_blocks(encode, self._model.settings.num_items, block=self._block)
    return latents, present, codes


class Inspection:
  """Reconstruction errors on a sample of items, and how well specific latents predict behaviour-aligned ones."""

  def __init__(self, model: Tokenizer, store: FeatureStore, *, seed: int, partitioner: Partitioner):
    """Draws the items once."""
    settings = model.settings
    count = min(settings.num_items, _SAMPLE)
    items = np.random.default_rng(seed).permutation(settings.num_items)[:count].astype(np.int32)
    self._names, self._batches = settings.names, []
    for first in range(0, count, 1024):
      chosen = items[first : first + 1024]
      chosen = np.concatenate([chosen, np.full(-len(chosen) % min(1024, count), chosen[0])])
      fresh = np.arange(len(chosen)) < min(1024, count - first)
      self._batches.append((chosen, *store.rows(chosen), fresh))

    def look(params, shared, batch):
      del shared
      items, features, present = batch
      latents = apply(model, params, "latents", items, features, present)
      quantized = apply(model, params, "quantize", latents.values).quantized
      specific = apply(model, params, "specific", features)
      own = {name: quantized[settings.streams.index(name)] for name in settings.names}
      fused = dict.fromkeys(settings.names, quantized[-1])
      nothing = jax.tree.map(jnp.zeros_like, specific)

      def errors(behaviour, specific):
        rebuilt = apply(model, params, "reconstruct", behaviour, specific)
        return {name: jnp.mean(jnp.square(rebuilt[name] - features[name]), axis=-1) for name in settings.names}

      behaviour = {name: latents.values[settings.streams.index(name)] for name in settings.names}
      return errors(own, specific), errors(fused, nothing), specific, behaviour

    self._look = partitioner.compile_map(look)

  def __call__(self, params: Any) -> dict[str, dict[str, float]]:
    """By modality: `reconstruction`, `reconstruction_from_codes` (of the fused stream, alone), `specific_r2`."""
    parts = [
      jax.tree.map(lambda array, fresh=fresh: np.asarray(array)[fresh], self._look(params, None, tuple(batch)))
      for *batch, fresh in self._batches
    ]
    own, fused, specific, behaviour = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    result: dict[str, dict[str, float]] = {"reconstruction": {}, "reconstruction_from_codes": {}, "specific_r2": {}}
    for name in self._names:
      here = np.concatenate([present[name][fresh] for _, _, present, fresh in self._batches])
      if not here.any():
        continue
      result["reconstruction"][name] = float(own[name][here].mean())
      result["reconstruction_from_codes"][name] = float(fused[name][here].mean())
      result["specific_r2"][name] = linear_r2(specific[name][here], behaviour[name][here])
    return result


class SequenceRecall:
  """Sequence-to-item Recall@10: how often the state of a history ranks the next item among the first ten, by cosine.

  Items with equal vectors, that is with the same codes, are ranked in random order.
  """

  def __init__(self, model: nn.Module, *, max_length: int, partitioner: Partitioner):
    """`model` has the method `history_states` of a `Tokenizer`, and sees the last `max_length` items."""
    self._max_length, self._partitioner = max_length, partitioner

    def count(params, vectors, batch):
      vectors = without_padding(vectors)
      states = apply(
        model,
        params,
        "history_states",
        vectors[batch["items"]],
        batch["segments"],
        batch["positions"],
        deterministic=True,
      )
      last = jnp.maximum(jnp.sum(batch["segments"], axis=1, dtype=jnp.int32) - 1, 0)
      state = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
      # Equal vectors may round differently at the edges of a product.
      return expected_hits(normalize(state) @ normalize(vectors).T, batch["targets"], k=10, tolerance=1e-6)

    self._hits = partitioner.compile_map(count)

  def __call__(
    self, params: Any, vectors: Any, histories: Interactions, targets: np.ndarray, *, users: int | None = None
  ) -> float:
    """Recall@10 of the items with vectors [N, d].

    Args:
      params: of the model.
      vectors: what histories are made of and what is ranked.
      histories: the inputs, in user order.
      targets: [U] int, the next item of each.
      users: how many are judged, from the first, but for whole batches; None: all.
    """
    vectors = self._partitioner.place(vectors)
    hits, seen = [], 0
    for batch in evaluation_batches(histories, targets, batch_size=256, max_length=self._max_length):
      valid = batch.pop("valid")
      hits.append(np.asarray(self._hits(params, vectors, batch))[valid])
      seen += int(valid.sum())
      if users is not None and seen >= users:
        break
    return float(np.mean(np.concatenate(hits), dtype=np.float64))


class ContrastRecall:
  """`SequenceRecall` on validation of the tokenizer's own history states."""

  def __init__(self, model: Tokenizer, split: Split, *, partitioner: Partitioner, users: int = 4096):
    """Judges the first `users` users."""
    self._split, self._users, self._settings, self._partitioner = split, users, model.settings, partitioner
    self._recall = SequenceRecall(model, max_length=model.settings.max_length, partitioner=partitioner)

  def __call__(self, params: Any, latents: np.ndarray, codes: np.ndarray) -> float:
    """Recall@10 for latents [S, N, d] and the fused stream's codes [N, L]."""
    settings = self._settings
    codebooks = codebooks_of(settings, self._partitioner.fetch(params))[-1]
    vectors = sum(codebooks[level][codes[:, level]] for level in range(len(codebooks)))
    if "id" in settings.streams:
      vectors = vectors + latents[settings.streams.index("id")]
    shown = self._split.history("validation")
    return self._recall(params, vectors, shown, self._split.validation_target, users=self._users)


def tokenizer_health(settings: TokenizerSettings, codes: np.ndarray, split: Split) -> dict[str, Any]:
  """Use, collisions and cohesion of IDs [N, L'] as the quantizer chose them."""
  return codebook_health(codes, codes, num_codes=settings.num_codes) | {"cohesion": cohesion(codes, split)}


def cohesion(codes: np.ndarray, split: Split) -> dict[str, float]:
  """The `behaviour_cohesion` of codes [N, L] over each user's last training item and the validation target.

  `training1` and `training2` are the same shares among consecutive items of training; the gap to the held-out ones is
  memorisation.
  """
  items, offsets = split.train.items, split.train.offsets
  follows = np.ones(len(items), bool)
  follows[offsets[:-1]] = False
  in_training = behaviour_cohesion(codes, items[:-1][follows[1:]], items[follows])
  shown = split.history("validation")
  held_out = behaviour_cohesion(codes, shown.items[shown.offsets[1:] - 1], split.validation_target)
  return held_out | {f"training{level}": in_training[f"level{level}"] for level in (1, 2)}
