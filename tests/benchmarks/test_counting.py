"""FLOPs and bytes against formulas by hand, and against what XLA says of the same program with its loops unrolled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.benchmarks.counting import compulsory_bytes, matmul_flops
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.ops.attention import attention
from bbqrec_jax.ops.softmax import cross_entropy, weighted_cross_entropy
from bbqrec_jax.recommender.catalogue import Catalogue, code_columns
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.settings import RecommenderSettings
from bbqrec_jax.semantic_ids.trie import build_trie


def test_products_their_gradients_and_loops_by_hand():
  a, b = jnp.zeros((3, 5, 7)), jnp.zeros((7, 11))
  assert matmul_flops(lambda a, b: a @ b, a, b) == 2 * 3 * 5 * 7 * 11
  assert matmul_flops(jax.grad(lambda a, b: jnp.sum(jnp.square(a @ b)), argnums=(0, 1)), a, b) == 3 * 2 * 3 * 5 * 7 * 11
  assert matmul_flops(lambda a: jnp.sum(jnp.exp(a)), a) == 0
  square = jnp.zeros((4, 4))
  looped = lambda x: jax.lax.scan(lambda carry, _: (carry @ square, None), x, None, length=6)[0]  # noqa: E731
  assert matmul_flops(jax.jit(looped), square) == 6 * 2 * 4**3
  either = lambda flag, x: jax.lax.cond(flag, lambda x: x @ square @ square, lambda x: x @ square, x)  # noqa: E731
  assert matmul_flops(either, True, square) == 2 * 2 * 4**3


def test_bytes_are_inputs_and_outputs():
  a, b = jnp.zeros((3, 5)), jnp.zeros((5, 2), jnp.bfloat16)
  assert compulsory_bytes(lambda a, b: (a @ b.astype(jnp.float32), a), a, b) == 60 + 20 + 24 + 60
  assert compulsory_bytes(lambda key: jax.random.key_data(key), jax.random.key(0)) == 8 + 8


def test_nothing_is_computed():
  big = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
  assert matmul_flops(jnp.dot, big, big) == 2e18


def test_attention_and_softmax_by_formula():
  rows, length, heads, width, items = 2, 16, 2, 8, 50
  query = jnp.zeros((rows, length, heads, width))
  mask = jnp.ones((rows, 1, length, length), bool)
  pairs = rows * heads * length * length
  assert matmul_flops(lambda q: attention(q, q, q, mask=mask), query) == 2 * 2 * pairs * width
  states, vectors, targets = jnp.zeros((10, width)), jnp.zeros((items, width)), jnp.zeros(10, jnp.int32)
  assert matmul_flops(lambda s, v: cross_entropy(s, v, targets), states, vectors) == 2 * 10 * items * width
  # In turns, the backward pass computes the logits anew: four products of the size instead of three.
  turns = lambda s, v: jnp.sum(cross_entropy(s, v, targets, max_logits=5 * items))  # noqa: E731
  assert matmul_flops(jax.grad(turns, argnums=(0, 1)), states, vectors) == 4 * 2 * 10 * items * width
  # The weighted sum forms its gradient with its value.
  whole = lambda s, v: weighted_cross_entropy(s, v, targets, jnp.ones(10), max_logits=5 * items)  # noqa: E731
  assert matmul_flops(jax.grad(whole, argnums=(0, 1)), states, vectors) == 3 * 2 * 10 * items * width


@pytest.mark.parametrize("head", ["generative", "dense"])
def test_a_whole_loss_and_gradient_agree_with_the_compilers_count(head):
  """Wide enough that the products outweigh the rest, which the compiler counts too."""
  items, levels, codes, rng = 300, 3, 32, np.random.default_rng(0)
  ids = np.stack(np.unravel_index(rng.choice(codes**levels, items, replace=False), (codes,) * levels), axis=1)
  settings = RecommenderSettings(
    norm="pre",
    num_items=items, num_levels=levels, num_codes=codes, num_columns=levels, head=head, width=128, mlp_width=512,
    max_length=16, dropout=0.0, subtree_logits=False, seen_item_bias=False,
  )  # fmt: skip
  catalogue = Catalogue(
    semantic_ids=jnp.asarray(ids, jnp.int32),
    columns=jnp.asarray(code_columns([ids], [np.ones(items, bool)], num_codes=codes)),
    streams=jnp.zeros((items, 0, 1)),
    edges=jnp.zeros((0, 0)),
    trie=build_trie(ids),
  )
  grid = rng.integers(items, size=(4, 16))
  place = np.broadcast_to(np.arange(16), grid.shape)
  batch = {"items": grid, "targets": grid, "segments": np.ones_like(grid), "positions": place}
  model = Recommender(dataclasses.replace(settings))
  params = jax.eval_shape(model.init, jax.random.key(0), catalogue, batch)["params"]

  def gradient(params):
    return jax.grad(lambda p: apply(model, p, "loss", catalogue, batch, deterministic=True)[0])(params)

  counted = matmul_flops(gradient, params)
  # Of the program as XLA is given it: that needs no compilation, and nothing in it is a loop.
  analysed = jax.jit(gradient).lower(params).cost_analysis()["flops"]
  assert counted == pytest.approx(analysed, rel=0.1)
  assert counted < analysed
