"""Quantizers by contract: what each gives its codes for, and what is refused of one of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bbqrec_jax.errors import InputError
from bbqrec_jax.ops.quantize import decode, nearest_code
from bbqrec_jax.tokenizer.inference import settings_from_json
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.parts import check_parts, try_parts
from bbqrec_jax.tokenizer.quantizers import ResidualQuantizer, make_quantizer
from bbqrec_jax.tokenizer.settings import QUANTIZERS, TokenizerSettings

LEVELS, CODES, WIDTH = 3, 12, 6
SETTINGS = TokenizerSettings(
  (("text", 5), ("image", 4)), num_items=9, code_width=WIDTH, num_levels=LEVELS, num_codes=CODES, hidden=(4,)
)
FSQ = dataclasses.replace(SETTINGS, quantizer="fsq")


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_keeps_the_contract(name):
  check_parts(dataclasses.replace(SETTINGS, quantizer=name), field="config field ")
  # As if it were a custom one.
  try_parts(dataclasses.replace(SETTINGS, quantizer=QUANTIZERS[name]), batch_items=7)


def test_which_learn_and_which_can_be_compared_across_streams():
  made = {name: make_quantizer(dataclasses.replace(SETTINGS, quantizer=name)) for name in QUANTIZERS}
  assert {name for name, one in made.items() if one.trained} == {"rq_vae", "fsq"}
  assert {name for name, one in made.items() if one.shared} == {"rq_vae", "fsq"}
  assert {name for name, one in made.items() if one.fixed() is not None} == {"fsq"}
  assert not make_quantizer(dataclasses.replace(SETTINGS, codebooks="per_stream")).shared
  assert made["rq_kmeans"].codebook_shape == (1, LEVELS, CODES, 9)


def test_finite_codes_are_the_nearest_points_of_the_grid_in_each_levels_channels():
  quantizer = make_quantizer(FSQ)
  latents = np.random.default_rng(0).normal(size=(40, WIDTH)).astype(np.float32)
  codebooks = quantizer.fixed()[0]
  result = quantizer.encode(jnp.asarray(latents), jnp.asarray(codebooks))
  for level in range(LEVELS):
    mine = np.arange(WIDTH) // (WIDTH // LEVELS) == level
    assert not codebooks[level][:, ~mine].any()
    assert len(np.unique(codebooks[level], axis=0)) == CODES
    assert_array_equal(result.codes[:, level], nearest_code(np.tanh(latents)[:, mine], codebooks[level][:, mine]))
  assert_allclose(result.quantized, decode(result.codes, jnp.asarray(codebooks)), atol=1e-6)
  assert_allclose(result.residuals[0], np.tanh(latents), atol=1e-6)
  assert_allclose(result.residuals[-1] - result.codewords[-1], np.tanh(latents) - result.quantized, atol=1e-6)


def test_a_tokenizer_with_finite_codes_has_no_codebooks_to_learn():
  example = {
    "items": np.arange(2), "features": {"text": np.ones((2, 5)), "image": np.ones((2, 4))},
    "present": {"text": np.ones(2, bool), "image": np.ones(2, bool)},
  }  # fmt: skip
  of = {
    s.quantizer: set(jax.eval_shape(Tokenizer(s).init, jax.random.key(0), example)["params"]) for s in (SETTINGS, FSQ)
  }
  assert of["rq_vae"] - of["fsq"] == {"codebooks"}


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"num_levels": 4}, "code_width = 6 must be a multiple of num_levels = 4"),
    ({"codebooks": "per_stream"}, "codebooks = 'per_stream'"),
  ],
)
def test_settings_that_finite_codes_do_not_work_with_are_refused(changes, said):
  with pytest.raises(InputError, match=said):
    check_parts(dataclasses.replace(FSQ, **changes), field="config field tokenizer.")


class OfOtherCodebooks(ResidualQuantizer):
  """Its codes name codewords that its vectors are not made of."""

  def encode(self, latents, codebooks):
    return super().encode(latents, codebooks + 1.0)


class Broken(ResidualQuantizer):
  def encode(self, latents, codebooks):
    raise KeyError("nothing")


class TooMany(ResidualQuantizer):
  def encode(self, latents, codebooks):
    result = super().encode(latents, codebooks)
    return result._replace(codes=result.codes + CODES)


class Flat(ResidualQuantizer):
  def encode(self, latents, codebooks):
    return super().encode(latents, codebooks)._replace(codes=jnp.zeros(8, jnp.int32))


@pytest.mark.parametrize(
  ("kind", "said"),
  [(OfOtherCodebooks, "sums of the codewords"), (Broken, "KeyError: 'nothing'"), (TooMany, "in 0..11"),
   (Flat, "'codes': (8,)")],
)  # fmt: skip
def test_a_quantizer_that_breaks_the_contract_is_refused_before_it_trains(kind, said):
  with pytest.raises(InputError) as error:
    try_parts(dataclasses.replace(SETTINGS, quantizer=f"{__name__}:{kind.__name__}"), batch_items=7)
  assert said in str(error.value)


@pytest.mark.parametrize("name", ["nosuch", "json:nosuch", "json:loads", "builtins:dict", "math:pi"])
def test_what_makes_no_quantizer_is_refused(name):
  with pytest.raises(InputError, match=r"config field tokenizer\.quantizer.*expected .*got"):
    make_quantizer(dataclasses.replace(SETTINGS, quantizer=name))


def test_code_that_an_artefact_names_is_not_run_until_it_is_trusted(tmp_path, monkeypatch):
  (tmp_path / "theirs_of_a_test.py").write_text(
    "from pathlib import Path\nfrom bbqrec_jax.tokenizer.quantizers import ResidualQuantizer\n"
    "Path(__file__).with_name('mark').touch()\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  stored, module = dataclasses.asdict(SETTINGS), "theirs_of_a_test"
  for name in (f"{module}:ResidualQuantizer", module):
    with pytest.raises(InputError, match=r"names code outside this project.*--trust=theirs_of_a_test"):
      settings_from_json(stored | {"quantizer": name}, trusted=[f"{module}:ResidualQuantizer"])
  assert not (tmp_path / "mark").exists()
  trusted = settings_from_json(
    stored | {"quantizer": "theirs_of_a_test:ResidualQuantizer"}, trusted=["theirs_of_a_test"]
  )
  assert (tmp_path / "mark").exists()
  assert isinstance(make_quantizer(trusted), ResidualQuantizer)
