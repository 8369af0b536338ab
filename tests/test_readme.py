"""The README's pieces of code that are not tested where what they show is."""

import re

import numpy as np

from bbqrec_jax.tokenizer.losses import CatalogueRows


def test_the_example_of_functions_by_themselves_runs(request, tmp_path, load_file):
  readme = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  (code,) = [block for block in blocks if not re.match(r"# (my_heads|my_losses|serve)\.py\n", block)]
  (tmp_path / "example.py").write_text(code, encoding="utf-8")
  example = load_file(tmp_path / "example.py")
  assert example.codebooks.shape == (4, 256, 32)
  assert example.result.codes.shape == (4096, 4)
  error = np.square(example.latents - example.result.quantized).sum(axis=1)
  assert error.mean() < 0.5 * np.square(example.latents).sum(axis=1).mean()
  np.testing.assert_allclose(example.passed, example.result.quantized, atol=1e-5)


def test_the_loss_of_ones_own_is_a_number_an_item(request, tmp_path, load_file):
  readme = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
  (code,) = re.findall(r"```python\n(# my_losses\.py\n.*?)```", readme, re.DOTALL)
  (tmp_path / "my_losses.py").write_text(code, encoding="utf-8")
  latents = dict(zip(("text", "image", "fused"), np.random.default_rng(0).normal(size=(3, 5, 4)), strict=True))
  rows = CatalogueRows(*({} for _ in CatalogueRows._fields))._replace(latents=latents)
  values = load_file(tmp_path / "my_losses.py").together(rows)
  apart = [
    sum(((latents[name][row] - latents["fused"][row]) ** 2).mean() for name in ("text", "image")) for row in range(5)
  ]
  np.testing.assert_allclose(values, apart, rtol=1e-5)
