"""This project's side of `compare.py`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from serving import (
  BEAM,
  BLOCKS,
  CODES,
  HISTORY,
  ITEM_BATCH,
  ITEMS,
  LEVELS,
  SASREC,
  SEARCH_BATCH,
  STEPS,
  T5,
  TRAIN_BATCH,
  WIDTHS,
  real_histories,
  semantic_ids,
  serve,
)

from bbqrec_jax.utils.compilation import keep_compiled
from bbqrec_jax.utils.host_memory import keep_memory

BOUNDS = (2, 5, 10)  # As configs/tiger.py has them.


def quantizer():
  """The residual quantizer in an autoencoder: training steps and tokenization."""
  from bbqrec_jax.ops.quantize import quantization_error, residual_quantize, straight_through
  from bbqrec_jax.tokenizer.encoders import MLP

  encoder, decoder = MLP(WIDTHS[1:]), MLP(tuple(reversed(WIDTHS[:-1])))
  optimizer = optax.adam(1e-3)
  rng = np.random.default_rng(0)
  batches = [jnp.asarray(rng.normal(size=(ITEM_BATCH, WIDTHS[0])), jnp.float32) for _ in range(4)]
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "encoder": jax.jit(encoder.init)(keys[0], batches[0][:1]),
    "decoder": jax.jit(decoder.init)(keys[1], np.zeros((1, WIDTHS[-1]), np.float32)),
    "codebooks": 0.1 * jax.random.normal(keys[2], (LEVELS, CODES, WIDTHS[-1])),
  }

  def loss_function(params, x):
    z = encoder.apply(params["encoder"], x)
    result = residual_quantize(z, params["codebooks"])
    rebuilt = decoder.apply(params["decoder"], straight_through(z, result.quantized))
    return jnp.mean(jnp.square(rebuilt - x)) + jnp.mean(quantization_error(result))

  @jax.jit
  def codes_of(params, x):
    return residual_quantize(encoder.apply(params["encoder"], x), params["codebooks"]).codes

  def step(state, x):
    params, opt_state = state
    loss, gradients = jax.value_and_grad(loss_function)(params, x)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  compiled = jax.jit(step, donate_argnums=0)
  state = (params, optimizer.init(params))

  def train():
    nonlocal state
    for index in range(STEPS):
      state, loss = compiled(state, batches[index % len(batches)])
    loss.block_until_ready()

  def tokenize():
    for index in range(BLOCKS):
      np.asarray(codes_of(state[0], batches[index % len(batches)]))

  return {"train": train, "tokenize": tokenize}


def recommender(what, sequences):
  """A recommender on random IDs: training steps and ranking.

  "encoder_decoder" is T5 in TIGER's shape, "causal" this project's own, both with the generative head and beam search;
  "sasrec" knows items by number and has a full softmax.
  """
  from bbqrec_jax.data.interactions import from_lengths
  from bbqrec_jax.layers.apply import apply
  from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
  from bbqrec_jax.recommender.evaluate import evaluate
  from bbqrec_jax.recommender.model import Recommender
  from bbqrec_jax.recommender.settings import RecommenderSettings
  from bbqrec_jax.semantic_ids.trie import build_trie

  ids = semantic_ids()
  length, train_rows = HISTORY, TRAIN_BATCH
  shape = {
    "width": 64,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_width": 256,
    "dropout": 0.1,
    "rows": "packed",
    "norm": "pre",
  }
  if what == "sasrec":
    length, train_rows = SASREC["length"], SASREC["batch"]
    shape = {
      "head": "dense", "width": SASREC["width"], "num_layers": SASREC["layers"], "num_heads": SASREC["heads"],
      "mlp_width": SASREC["mlp_width"], "dropout": SASREC["dropout"], "rows": "packed", "norm": "pre",
    }  # fmt: skip
  elif what == "encoder_decoder":
    shape = {
      "backbone": what, "width": T5["width"], "num_layers": T5["layers"], "num_heads": T5["heads"],
      "head_width": T5["head_width"], "mlp_width": T5["mlp_width"], "dropout": T5["dropout"],
    }  # fmt: skip
  model = Recommender(
    RecommenderSettings(
      num_items=ITEMS, num_levels=LEVELS, num_codes=CODES, num_columns=0 if what == "sasrec" else LEVELS,
      item_inputs=("item",) if what == "sasrec" else ("fused",), max_length=length, softmax_over="all",
      subtree_logits=False, seen_item_bias=False, num_negatives=0, **shape,
    )
  )  # fmt: skip
  catalogue = Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(code_columns([ids], [np.ones(ITEMS, bool)], num_codes=CODES)),
    streams=jnp.zeros((ITEMS, 0, 1)),
    edges=jnp.zeros((0, 0)),
    trie=build_trie(ids),
  )
  rng = np.random.default_rng(0)

  def batch(rows):
    shape = (rows, length)
    place = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    targets = rng.integers(ITEMS, size=rows if what == "encoder_decoder" else shape)
    return {
      "items": rng.integers(ITEMS, size=shape).astype(np.int32), "segments": np.ones(shape, np.int32),
      "positions": place, "targets": targets.astype(np.int32),
    }  # fmt: skip

  train_batch, search_batches = batch(train_rows), [batch(SEARCH_BATCH) for _ in range(4)]
  optimizer = optax.adamw(1e-3)
  params = jax.jit(model.init)(jax.random.key(0), catalogue, train_batch)["params"]
  state = (params, optimizer.init(params), jax.random.key(1))

  def step(state, batch, catalogue):
    params, opt_state, key = state
    key, own = jax.random.split(key)

    def loss_function(params):
      return apply(model, params, "loss", catalogue, batch, deterministic=False, rngs={"dropout": own})[0]

    loss, gradients = jax.value_and_grad(loss_function)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, key), loss

  compiled = jax.jit(step, donate_argnums=0)

  @jax.jit
  def search(params, catalogue, batch):
    states = apply(model, params, "last_states", catalogue, batch)
    return apply(model, params, "search", catalogue, states, width=BEAM).items

  def train():
    nonlocal state
    state, loss = compiled(state, train_batch, catalogue)
    loss.block_until_ready()

  def generate():
    found = [np.asarray(search(state[0], catalogue, batch)) for batch in search_batches]
    return float(np.mean(np.concatenate(found) >= 0))

  tasks = {"train": train, "generate": generate}
  if sequences:
    histories = real_histories(sequences)
    lengths = np.array([len(history) for history in histories])
    users = from_lengths(np.concatenate(histories), lengths, np.arange(len(lengths)))

    def rank():
      valid = []

      def ranker(params, catalogue, batch):
        found = np.asarray(search(params, catalogue, batch))
        valid.append(found >= 0)
        return {"ranks": np.zeros(len(found), np.int32), "top": found}

      evaluate(
        ranker, state[0], catalogue, users, np.zeros(len(lengths), int), batch_size=SEARCH_BATCH, max_length=length,
        num_items=ITEMS, bounds=BOUNDS,
      )  # fmt: skip
      return float(np.mean(np.concatenate(valid)))

    tasks["rank"] = rank
  return tasks


if __name__ == "__main__":
  keep_memory()  # As the program itself does.
  keep_compiled()
  serve(quantizer() if sys.argv[1] == "quantizer" else recommender(*sys.argv[1:]))
