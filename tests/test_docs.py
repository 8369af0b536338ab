"""The documentation: what its code does that is tested nowhere else, and whether what it names is there."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.tokenizer.losses import CatalogueRows
from bbqrec_jax.tokenizer.settings import TokenizerSettings


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
