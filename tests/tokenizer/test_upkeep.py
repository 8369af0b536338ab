"""What happens to codewords beside the loss: whom they are judged by, how long a revival lasts, and its random key."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.tokenizer import step as steps
from bbqrec_jax.tokenizer.losses import TokenizerOutput
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.tokenizer.state import TokenizerState, even_usage
from bbqrec_jax.tokenizer.step import CodebookUpkeep, make_tokenizer_step

ROWS, LEVELS, CODES, WIDTH = 6, 2, 4, 3
SETTINGS = TokenizerSettings(
  (("text", 5),), num_items=9, code_width=WIDTH, num_levels=LEVELS, num_codes=CODES, hidden=(4,), item_id="none"
)
TEXT, FUSED = 0, 1
assert SETTINGS.streams == ("text", "fused")
assert SETTINGS.id_streams == ("fused",)


def make_output(seed=0):
  """Of a step in which the text stream chooses every code of every level, and the fused stream never the last one."""
  rng = np.random.default_rng(seed)
  codes = np.stack([np.arange(ROWS) % CODES, np.arange(ROWS) % (CODES - 1)])[..., None].repeat(LEVELS, axis=2)
  return TokenizerOutput(
    terms={},
    codes=jnp.asarray(codes, jnp.int32),
    residuals=jnp.asarray(rng.normal(size=(2, LEVELS, ROWS, WIDTH)), jnp.float32),
    present=jnp.ones((2, ROWS), bool),
    quantized={},
    specific={},
  )


def start(settings):
  """Codebooks, and their use as after a fit."""
  codebooks = jnp.asarray(np.random.default_rng(1).normal(size=settings.codebook_shape), jnp.float32)
  return codebooks, even_usage(codebooks.shape)


@functools.partial(jax.jit, static_argnums=0)
def keep(upkeep, codebooks, usage, output, *, seed=0):
  return upkeep(codebooks, usage, output, key=jax.random.key(seed), axis_name=None)


def is_one_of(row, rows):
  return any(np.array_equal(row, one) for one in np.asarray(rows))


@pytest.mark.parametrize("semantic_id", ["fused", "concatenated"])
def test_shared_codewords_are_judged_by_the_streams_that_make_ids_and_revived_from_their_residuals(semantic_id):
  settings = replace(SETTINGS, semantic_id=semantic_id)
  upkeep = CodebookUpkeep(replace(settings, revival_threshold=0.9), usage_decay=0.0)
  codebooks, usage = start(settings)
  output = make_output()
  moved, _, counts = keep(upkeep, codebooks, usage, output)
  judged = {"fused": FUSED, "concatenated": TEXT}[semantic_id]
  for level in range(LEVELS):
    of_stream = np.bincount(np.asarray(output.codes)[judged, :, level], minlength=CODES)
    assert_array_equal(counts[0, level], of_stream)
    dead = of_stream / ROWS < 0.9 / CODES
    assert dead.any()
    assert not dead.all()
    for code in range(CODES):
      if dead[code]:
        assert is_one_of(moved[0, level, code], output.residuals[judged, level])
      else:
        assert_array_equal(moved[0, level, code], codebooks[0, level, code])


def test_a_streams_own_codewords_are_judged_by_that_stream():
  settings = replace(SETTINGS, codebooks="per_stream")
  codebooks, usage = start(settings)
  output = make_output()
  moved, _, counts = keep(
    CodebookUpkeep(replace(settings, revival_threshold=0.5), usage_decay=0.0), codebooks, usage, output
  )
  for stream in (TEXT, FUSED):
    for level in range(LEVELS):
      own = np.bincount(np.asarray(output.codes)[stream, :, level], minlength=CODES)
      assert_array_equal(counts[stream, level], own)
      assert_array_equal((np.asarray(moved) != codebooks)[stream, level].any(axis=-1), own == 0)
  assert is_one_of(moved[FUSED, 0, -1], output.residuals[FUSED, 0])


def test_use_follows_an_average_of_its_decay():
  codebooks, usage = start(SETTINGS)
  output = make_output()
  moved, after, _ = keep(
    CodebookUpkeep(replace(SETTINGS, revival_threshold=0.0), usage_decay=0.9), codebooks, usage, output
  )
  assert_array_equal(moved, codebooks)
  for level in range(LEVELS):
    share = np.bincount(np.asarray(output.codes)[FUSED, :, level], minlength=CODES) / ROWS
    assert_allclose(after[0, level], 0.9 / CODES + 0.1 * share, rtol=1e-5)


def test_a_revived_codeword_stays_where_it_was_moved_to_and_counts_as_used():
  codebooks, usage = start(SETTINGS)
  usage = usage.at[..., -1].set(1e-4)
  fused = make_output()._replace(present=jnp.asarray([[False] * ROWS, [True] * ROWS]))
  upkeep = CodebookUpkeep(replace(SETTINGS, revival_threshold=0.5))
  moved, after, _ = keep(upkeep, codebooks, usage, fused)
  for level in range(LEVELS):
    assert is_one_of(moved[0, level, -1], fused.residuals[FUSED, level])
    assert_allclose(after[0, level, -1], 1 / CODES)
  # A step on, other residuals: nothing chooses it yet, and it is not moved again.
  later, _, _ = keep(upkeep, moved, after, fused._replace(residuals=make_output(seed=2).residuals), seed=1)
  assert_array_equal(later, moved)


def test_where_no_stream_is_present_use_stays_and_nothing_is_revived():
  codebooks, usage = start(SETTINGS)
  usage = usage.at[..., 0].set(0.0)
  nobody = make_output()._replace(present=jnp.zeros((2, ROWS), bool))
  moved, after, counts = keep(CodebookUpkeep(replace(SETTINGS, revival_threshold=0.5)), codebooks, usage, nobody)
  assert_array_equal(moved, codebooks)
  assert_allclose(after, usage, rtol=1e-6)
  assert not np.any(counts)


def test_a_step_gives_upkeep_a_key_of_its_own_and_its_result_counts_once_the_warm_up_is_over(monkeypatch):
  codebooks, usage = start(SETTINGS)

  def loss(model, params, batch, **options):
    return jnp.sum(params["codebooks"]) * 0.0, make_output()

  def upkeep(codebooks, usage, output, *, key, axis_name):
    drawn = jax.random.uniform(key, codebooks.shape)
    return drawn, drawn[..., 0], jnp.ones(codebooks.shape[:-1])

  monkeypatch.setattr(steps, "tokenizer_loss", loss)
  monkeypatch.setattr(steps, "CodebookUpkeep", lambda settings: upkeep)
  optimizer = optax.sgd(0.0)
  weights = replace(SETTINGS.weights, disentangle=0.0)
  step = make_tokenizer_step(Tokenizer(replace(SETTINGS, warmup_steps=2, weights=weights)), optimizer)

  def after(number, seed=0):
    state = TokenizerState.create({"codebooks": codebooks}, optimizer, seed=seed, usage=usage)
    following, _ = step(state.replace(step=jnp.asarray(number)), None, {}, axis_name=None)
    return np.asarray(following.params["codebooks"]), np.asarray(following.usage)

  for number in (0, 1):
    assert_array_equal(after(number)[0], codebooks)
    assert_array_equal(after(number)[1], usage)
  drawn = [after(2), after(3), after(4), after(2, seed=1)]
  for one, of_use in drawn:
    assert_array_equal(of_use, one[..., 0])
  assert len({one.tobytes() for one, _ in drawn}) == 4
  assert_array_equal(after(2)[0], drawn[0][0])
