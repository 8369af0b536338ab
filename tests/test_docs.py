"""The documentation: what its code does that is tested nowhere else, and whether what it names is there."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bbqrec_jax.tokenizer import step as steps
from bbqrec_jax.tokenizer.losses import CatalogueRows
from bbqrec_jax.tokenizer.model import Tokenizer
from bbqrec_jax.tokenizer.parts import check_parts, try_parts
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.tokenizer.state import TokenizerState
from bbqrec_jax.utils.named import part


def test_functions_by_themselves_quantize(snippet, tmp_path, load_file):
  (tmp_path / "functions.py").write_text(snippet("parts.md", "functions.py"), encoding="utf-8")
  example = load_file(tmp_path / "functions.py")
  assert example.codebooks.shape == (4, 256, 32)
  assert example.result.codes.shape == (4096, 4)
  error = np.square(example.latents - example.result.quantized).sum(axis=1)
  assert error.mean() < 0.5 * np.square(example.latents).sum(axis=1).mean()
  np.testing.assert_allclose(example.passed, example.result.quantized, atol=1e-5)


def test_the_custom_loss_is_a_number_per_item(snippet, tmp_path, load_file):
  (tmp_path / "my_losses.py").write_text(snippet("parts.md", "my_losses.py"), encoding="utf-8")
  latents = dict(zip(("text", "image", "fused"), np.random.default_rng(0).normal(size=(3, 5, 4)), strict=True))
  rows = CatalogueRows(*({} for _ in CatalogueRows._fields))._replace(latents=latents)
  values = load_file(tmp_path / "my_losses.py").together(rows)
  apart = [
    sum(((latents[name][row] - latents["fused"][row]) ** 2).mean() for name in ("text", "image")) for row in range(5)
  ]
  np.testing.assert_allclose(values, apart, rtol=1e-5)


def test_the_custom_quantizer_chooses_by_cosine(snippet, tmp_path, load_file):
  (tmp_path / "my_quantizers.py").write_text(snippet("parts.md", "my_quantizers.py"), encoding="utf-8")
  rng = np.random.default_rng(0)
  residual, codebooks = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(2, 5, 4)).astype(np.float32)
  made = load_file(tmp_path / "my_quantizers.py").CosineQuantizer(TokenizerSettings())
  result = made.encode(jnp.asarray(residual), jnp.asarray(codebooks))
  quantized = np.zeros_like(residual)
  for level, codebook in enumerate(codebooks):
    norms = np.linalg.norm(residual, axis=1)[:, None] * np.linalg.norm(codebook, axis=1)
    codes = np.argmax(residual @ codebook.T / norms, axis=1)
    np.testing.assert_array_equal(result.codes[:, level], codes)
    np.testing.assert_allclose(result.residuals[level], residual, atol=1e-6)
    np.testing.assert_array_equal(result.codewords[level], codebook[codes])
    residual, quantized = residual - codebook[codes], quantized + codebook[codes]
  np.testing.assert_allclose(result.quantized, quantized, atol=1e-6)


def test_the_documented_encoder_and_contrast_keep_their_contracts(snippet, tmp_path, monkeypatch):
  for name in ("my_encoders.py", "my_contrasts.py"):
    (tmp_path / name).write_text(snippet("parts.md", name), encoding="utf-8")
  monkeypatch.syspath_prepend(tmp_path)
  settings = TokenizerSettings(
    (("text", 5), ("image", 3)), num_items=9, code_width=4, num_levels=2, num_codes=4, hidden=(6,), max_length=5,
    encoder="my_encoders:Gated", contrast="my_contrasts:margin",
  )  # fmt: skip
  check_parts(settings, field="")
  try_parts(settings, batch_items=7)
  states = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
  targets = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  loss, aux = part("", "my_contrasts:margin", {})(
    states, targets, jnp.asarray([1, 2, 3]), jnp.asarray([True, True, False]), temperature=0.5, axis_name=None
  )
  # The first: its target and another are alike. The second: orthogonal to both of two.
  np.testing.assert_allclose((loss, aux["accuracy"]), (0.5, 0.0), atol=1e-6)


def test_the_documented_schedule_reaches_the_contrast(request, monkeypatch):
  page = (request.config.rootpath / "docs" / "parts.md").read_text(encoding="utf-8")
  (diff,) = re.findall(r"```diff\n--- bbqrec_jax/tokenizer/step.py\n(.*?)```", page, re.DOTALL)
  source = (request.config.rootpath / "bbqrec_jax" / "tokenizer" / "step.py").read_text(encoding="utf-8")
  (old,) = re.findall(r"^-(.*\n)", diff, re.MULTILINE)
  assert source.count(old) == 1, "the line that the page replaces"
  (new,) = re.findall(r"^\+(.*)\n", diff, re.MULTILINE)
  made = {"optax": optax}
  exec(f"def temperature_at(settings, step):\n{new}", made)
  monkeypatch.setattr(steps, "temperature_at", made["temperature_at"])
  asked = []

  def loss(model, params, batch, *, temperature, **options):
    asked.append(temperature)
    raise StopIteration

  monkeypatch.setattr(steps, "tokenizer_loss", loss)
  settings = TokenizerSettings((("text", 5),), num_items=9, steps=100, temperature=0.2)
  step = steps.make_tokenizer_step(Tokenizer(settings), optax.sgd(0.1))
  for number in (0, 100):
    state = TokenizerState.create({}, optax.sgd(0.1), seed=0, usage=jnp.zeros(1))
    with pytest.raises(StopIteration):
      step(state.replace(step=jnp.asarray(number)), None, {}, axis_name=None)
  np.testing.assert_allclose(asked, (0.2, 0.1), rtol=1e-6)


@pytest.fixture(scope="module")
def pages(request):
  """The text of each page, by its path."""
  root = request.config.rootpath
  paths = [root / "README.md", root / "experiments" / "README.md", *sorted((root / "docs").rglob("*.md"))]
  return {path: path.read_text(encoding="utf-8") for path in paths}


def test_the_readme_is_short(request):
  assert (request.config.rootpath / "README.md").stat().st_size <= 10_000


def test_relative_links_lead_to_files(pages):
  links = [(path, link) for path, text in pages.items() for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
  assert len(links) > 50
  assert not [(path, link) for path, link in links if not (path.parent / link).exists()]


def test_files_that_pages_name_are_there(pages, request):
  pattern = r"`((?:bbqrec_jax|configs|experiments|tests)/[\w./]*?)(?::\w+)?`"
  named = [(path, name) for path, text in pages.items() for name in re.findall(pattern, text)]
  assert len(named) > 50
  assert not [(path, name) for path, name in named if not (request.config.rootpath / name).exists()]


def test_python_in_pages_compiles(pages):
  blocks = [block for text in pages.values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
  assert len(blocks) > 5
  for block in blocks:
    compile(block, "page", "exec")
