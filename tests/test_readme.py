"""The README's example of functions by themselves; its other pieces of code are tested where what they show is."""

import re

import numpy as np


def test_the_example_of_functions_by_themselves_runs(request):
  readme = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  (code,) = [block for block in blocks if not re.match(r"# (my_heads|serve)\.py\n", block)]
  found = {}
  exec(code, found)
  assert found["codebooks"].shape == (4, 256, 32)
  assert found["result"].codes.shape == (4096, 4)
  error = np.square(found["latents"] - found["result"].quantized).sum(axis=1)
  assert error.mean() < 0.5 * np.square(found["latents"]).sum(axis=1).mean()
  np.testing.assert_allclose(found["passed"], found["result"].quantized, atol=1e-5)
