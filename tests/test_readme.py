"""The README's example of functions by themselves; its other pieces of code are tested where what they show is."""

import re

import numpy as np


def test_the_example_of_functions_by_themselves_runs(request, tmp_path, load_file):
  readme = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  (code,) = [block for block in blocks if not re.match(r"# (my_heads|serve)\.py\n", block)]
  (tmp_path / "example.py").write_text(code, encoding="utf-8")
  example = load_file(tmp_path / "example.py")
  assert example.codebooks.shape == (4, 256, 32)
  assert example.result.codes.shape == (4096, 4)
  error = np.square(example.latents - example.result.quantized).sum(axis=1)
  assert error.mean() < 0.5 * np.square(example.latents).sum(axis=1).mean()
  np.testing.assert_allclose(example.passed, example.result.quantized, atol=1e-5)
