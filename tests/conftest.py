"""Four CPU devices for every test, set before anything imports JAX, and the real data where a checkout has it."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import re

import numpy as np
import pytest

_DEVICES = os.environ.get("TEST_DEVICES", "4")
# Half of the time of the tests is the CPU compiler's; these emitters, and parts compiled side by side, pay for larger
# programs. A later version may not know the flags, and would end at once.
_SMALL = (
  " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  if importlib.metadata.version("jaxlib").startswith("0.10.")
  else ""
)
os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={_DEVICES}{_SMALL}".strip()
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# A twelfth of the rest is the search for cycles among all that tracing makes, nearly always in vain.
gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session")
def load_file():
  """A function that runs a file of the checkout which is in no package, a config or a script: path -> module."""

  def load(path):
    path = pathlib.Path(__file__).parents[1] / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
      patch.syspath_prepend(path.parent)  # Scripts import what stands beside them.
      spec.loader.exec_module(module)
    return module

  return load


@pytest.fixture(scope="session")
def snippet():
  """A function from a page of docs/ and a file's name to the Python block there that begins with `# NAME`."""

  def find(page, name):
    text = (pathlib.Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n(# {re.escape(name)}\n.*?)```", text, re.DOTALL)
    return code

  return find


@pytest.fixture(scope="session")
def random_params():
  """A function (module, *example) -> parameters that are all random, none at an initial value that hides its use.

  Nothing is compiled: only the shapes come from the module.
  """
  import jax

  def make(module, *example, seed=0):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    rng = np.random.default_rng(seed)

    def one(path, leaf):
      centre = 1.0 if path[-1].key == "scale" else 0.0
      return (centre + 0.4 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)

  return make


@pytest.fixture
def four_devices():
  """Skips the test where there are fewer, as on a machine with one GPU."""
  import jax

  if jax.local_device_count() < 4:
    pytest.skip("needs four devices")


@contextlib.contextmanager
def _jax_options(**options):
  import jax

  before = {name: jax.config.values[name] for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="session")
def _cache_folder(tmp_path_factory):
  return tmp_path_factory.mktemp("compile_cache")


@pytest.fixture(scope="module")
def compile_cache(_cache_folder):
  """For files of whole runs, which are much alike: what one has compiled, the next one need not."""
  with _jax_options(
    jax_compilation_cache_dir=str(_cache_folder),
    jax_persistent_cache_min_compile_time_secs=0.0,
    jax_persistent_cache_min_entry_size_bytes=-1,
  ):
    yield


@pytest.fixture(scope="module", autouse=True)
def quick_compile(request):
  """Runs of a few small steps take less time than the compiler's optimisations would.

  A file that asks for programs as users have them sets OPTIMIZED.
  """
  if getattr(request.module, "OPTIMIZED", False):
    yield
    return
  with _jax_options(jax_disable_most_optimizations=True):
    yield


@pytest.fixture(scope="session")
def real_data():
  """The folder beside the checkout that may hold real data sets, one folder each."""
  return pathlib.Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture
def real_folder(real_data):
  """A function from a data set's name to its folder; skips the test where the folder is absent."""

  def find(name):
    if not (real_data / name).is_dir():
      pytest.skip(f"no data set {name} at {real_data}")
    return real_data / name

  return find


@pytest.fixture
def doubling_dropout(monkeypatch):
  """Where dropout is at work it doubles every value and drops none: what it is put on can be worked out by hand."""

  import flax.linen as nn

  from bbqrec_jax.layers.dropout import Dropout

  def double(self, x, deterministic=None):
    off = nn.merge_param("deterministic", self.deterministic, deterministic)
    return x if off or not self.rate else 2.0 * x

  monkeypatch.setattr(Dropout, "__call__", double)


@pytest.fixture(scope="session")
def others():
  """A function from a field's value to two that it may be set to, of which one at least is nobody's default."""

  def two(value):
    if isinstance(value, bool):
      return True, False
    if isinstance(value, str):
      return f"{value} of another kind", "another"
    if isinstance(value, tuple):
      return (*value, 3), (5,)
    return (value + 1, value + 2) if isinstance(value, int) else (value + 0.125, value + 0.25)

  return two


@pytest.fixture(scope="session")
def ids():
  """Random semantic IDs of 30 items with text, 70 % of them with an image: 3 levels of 4 codes."""
  from bbqrec_jax.data.item_ids import ItemIds
  from bbqrec_jax.semantic_ids.artefact import SemanticIds

  num_items, levels, num_codes = 30, 3, 4
  rng = np.random.default_rng(0)
  own = np.stack(
    np.unravel_index(rng.choice(num_codes**levels, num_items, replace=False), (num_codes,) * levels), axis=1
  )
  present = np.ones((3, num_items), bool)
  present[1] = rng.random(num_items) < 0.7
  return SemanticIds(
    streams=("text", "image", "fused"),
    codes=own.astype(np.int32),
    stream_codes=rng.integers(num_codes, size=(3, num_items, levels)).astype(np.int32),
    present=present,
    codebooks=rng.normal(size=(1, levels, num_codes, 5)).astype(np.float32),
    data_hash="of a test",
    item_ids=ItemIds.numbered(num_items),
  )
