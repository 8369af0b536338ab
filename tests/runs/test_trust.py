"""Nothing that was downloaded is run: no pickle, no code by name, and nothing is written through its links."""

import ast
import codecs
import gc
import pathlib
import pickle
import sys

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.runs.workdir import PARTS, SHOWN, claim, load_config, load_results, tokenizer_figure
from bbqrec_jax.training.checkpointing import Checkpointer
from bbqrec_jax.utils.json_files import read_json, write_json

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("bbqrec_jax", "configs", "experiments") for path in (ROOT / folder).rglob("*.py"))
IMPORT = "importlib.import_module"
RUNNING = {
  IMPORT,
  "eval", "exec", "compile", "__import__", "os.system", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load",
  "yaml.unsafe_load", "yaml.full_load", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load",
  "dill.loads", "cloudpickle.load", "cloudpickle.loads", "torch.load", "pandas.read_pickle", "pd.read_pickle",
  "tarfile.open", "shutil.unpack_archive",
}  # fmt: skip


def offences(source):
  """Calls in a source that run or unpickle what they are given."""
  for node in ast.walk(ast.parse(source)):
    name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    if name in RUNNING:
      yield name
    if name in ("np.load", "numpy.load"):
      given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
      if given.get("allow_pickle") != "False":
        yield ast.unparse(node)


def test_no_source_runs_or_unpickles_what_it_reads():
  found = {str(path.relative_to(ROOT)): [*offences(path.read_text(encoding="utf-8"))] for path in SOURCES}
  # Code by its name from a config, which `load_config` asks for trust in, and nowhere else.
  assert {name: calls for name, calls in found.items() if calls} == {
    "bbqrec_jax/utils/lazy.py": [IMPORT],  # Names of the public API, and no others.
    "bbqrec_jax/commands/__init__.py": [IMPORT],  # Commands by name, of a list.
    "bbqrec_jax/runs/tracking.py": [IMPORT],  # Trackers by name, of a list.
    "bbqrec_jax/utils/named.py": [IMPORT],
  }
  assert [*offences("np.load(p); np.load(p, allow_pickle=x); np.load(p, allow_pickle=False); eval(p)")] == [
    "np.load(p)", "np.load(p, allow_pickle=x)", "eval",
  ]  # fmt: skip


MARK = "a pickle of the tests was run"


class Bomb:
  """Unpickling it leaves a mark in this process."""

  def __reduce__(self):
    return codecs.register_error, (MARK, len)


def exploded():
  try:
    codecs.lookup_error(MARK)
  except LookupError:
    return False
  return True


def batches():
  return iter(grain.MapDataset.range(8).to_iter_dataset())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Of reads that orbax abandons.
def test_a_pickle_in_place_of_any_file_of_a_checkpoint_is_not_run(tmp_path):
  state = {"w": jnp.arange(4.0), "key": jax.random.key(0)}
  data = batches()
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(3, state, data, {"step": 3, "best_step": 3})
  checkpointer.close()
  folder = tmp_path / "3"
  like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)

  def restore_all():
    """Each part by itself, as orbax reads it when nothing has been checked before."""
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.restore(folder / "state", like)
    handlers = {name: ocp.JsonCheckpointHandler() for name in ("data", "progress")}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
      arguments = ocp.args.Composite(data=ocp.args.JsonRestore(), progress=ocp.args.JsonRestore())
      batches().set_state(manager.restore(3, args=arguments)["data"])

  restore_all()
  files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  assert {"_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"} <= {path.name for path in files}
  assert {path.parent.name for path in files} >= {"data", "progress"}
  read = 0
  for path in files:
    whole = path.read_bytes()
    path.write_bytes(pickle.dumps(Bomb()))
    try:
      restore_all()
    except Exception:
      read += 1  # Which kind of error it is, is the libraries' business.
    path.write_bytes(whole)
  gc.collect()
  assert read >= 5
  assert not exploded()
  pickle.loads(pickle.dumps(Bomb()))
  assert exploded()


FIGURES = {"split_hash": "1", "features_hash": "2", "ids_hash": "89ab", "times_hash": None, "titles_hash": None}


def start(workdir, **changes):
  config = default_config()
  config.update_from_flattened_dict(changes)
  claim(workdir, config, FIGURES)
  return workdir


PARTS_OF_ONES_OWN = {
  "recommender.head": "recommender.heads import DenseHead",
  "recommender.backbone": "recommender.causal import Causal",
  "tokenizer.quantizer": "tokenizer.quantizers import ResidualQuantizer",
}


@pytest.mark.parametrize("field", PARTS_OF_ONES_OWN)
def test_code_that_a_workdir_names_is_not_run_until_it_is_trusted(tmp_path, monkeypatch, field):
  # The module lies in the workdir itself, and the program is started beside it.
  workdir = start(tmp_path / "run", **{field: "run.theirs:make"})
  (workdir / "theirs.py").write_text(
    "from pathlib import Path\nPath(__file__).with_name('mark').touch()\n"
    f"from bbqrec_jax.{PARTS_OF_ONES_OWN[field]} as make\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(InputError, match=rf"config\.json field {field} names code.*--trust=run\.theirs"):
    load_config(workdir)
  with pytest.raises(InputError, match=r"--trust=run\.theirs"):
    load_config(workdir, trusted=["run", "theirs", "run.theirs:make"])
  assert not (workdir / "mark").exists()
  assert load_config(workdir, trusted=["run.theirs"])[field.split(".")[0]][field.split(".")[1]] == "run.theirs:make"
  assert (workdir / "mark").exists()
  sys.modules.pop("run.theirs")
  sys.modules.pop("run")


def test_a_loss_that_a_workdir_names_is_never_run(tmp_path, monkeypatch):
  workdir = start(tmp_path / "run", **{"tokenizer.own_loss": "theirs:loss"})
  (tmp_path / "theirs.py").write_text("raise SystemExit('run')\n")
  monkeypatch.syspath_prepend(tmp_path)
  assert load_config(workdir).tokenizer.own_loss == "theirs:loss"


def test_a_config_that_is_not_the_runs_is_refused(tmp_path):
  workdir = start(tmp_path / "run")
  config = read_json(workdir / "config.json")

  def change(**fields):
    write_json(workdir / "config.json", config | {"recommender": config["recommender"] | fields})

  change(num_heads=4)  # A number of heads that the parameters of this width would fit as well.
  with pytest.raises(InputError, match=r"tell of different runs: recommender\.num_heads"):
    load_config(workdir)
  for value in ("2", 2.5, None, True, [2], {}, 2**64):
    change(num_heads=value)
    with pytest.raises(InputError, match=r"does not fit this version"):
      load_config(workdir)
  change(item_inputs=[["fused"]])
  with pytest.raises(InputError, match=r"field recommender\.item_inputs: expected names"):
    load_config(workdir)
  change()
  config["data"]["path"] = "elsewhere"
  change()
  assert load_config(workdir).data.path == "elsewhere"
  (workdir / "run.json").unlink()
  with pytest.raises(InputError, match=r"run\.json: expected a JSON file, found nothing"):
    load_config(workdir)


def test_a_number_that_would_take_all_memory_is_refused_whoever_wrote_it(tmp_path):
  for field, value in (
    ("recommender.num_layers", 10**6), ("tokenizer.num_levels", 10**6), ("data.synthetic.num_users", 10**12),
    ("recommender.num_buckets", 10**9), ("recommender.max_length", 10**9),
  ):  # fmt: skip
    with pytest.raises(InputError, match=f"config field {field} must be at most"):
      load_config(start(tmp_path / field, **{field: value}))


@pytest.mark.parametrize("link", ["results.json", "checkpoints", "metrics.jsonl", "run.json.unfinished"])
def test_a_workdir_with_a_link_that_leads_out_is_refused_before_anything_is_written(tmp_path, link):
  workdir, target = tmp_path / "run", tmp_path / "target"
  workdir.mkdir()
  target.write_text("mine")
  (workdir / link).symlink_to(target)
  with pytest.raises(InputError, match=f"{link}: expected nothing in a workdir to lie outside of it"):
    start(workdir)
  assert target.read_text() == "mine"
  assert [path.name for path in workdir.iterdir()] == [link]
  (workdir / link).unlink()
  start(workdir)
  (workdir / link).symlink_to(target)
  with pytest.raises(InputError, match=f"{link}: expected nothing in a workdir to lie outside of it"):
    restore(workdir)


def test_what_is_no_results_file_is_refused_with_the_way_out(tmp_path):
  part = dict.fromkeys(SHOWN, 0.5)
  data = {"name": "x", "users": 1, "items": 2, "interactions": 3, "split_hash": "0"}
  results = {
    "model": "m", "data": data, **dict.fromkeys(PARTS, part), "best_step": 2, "steps": 2,
    "seconds": {"evaluation": 1.0},
  }  # fmt: skip
  write_json(tmp_path / "results.json", results)
  assert load_results(tmp_path)["test"] == part
  for change in (
    {"best_step": "../../2"}, {"best_step": -1}, {"best_step": True}, {"best_step": 10**30}, {"test": None},
    {"data": []}, {"test": part | {"mrr": "high"}}, {"test": part | {"mrr": 10**400}}, {"seconds": {"evaluation": [1]}},
  ):  # fmt: skip
    write_json(tmp_path / "results.json", results | change)
    with pytest.raises(InputError, match=r"results\.json: expected the results of a run.*delete it"):
      load_results(tmp_path)


@pytest.mark.parametrize("seconds", ["1", None, -1, True, float("nan"), 10**400])
def test_a_health_report_without_a_sensible_time_is_refused(tmp_path, seconds):
  write_json(tmp_path / "health.json", {"seconds": seconds})
  with pytest.raises(InputError, match=r"health\.json field seconds: expected a number"):
    tokenizer_figure(tmp_path, "seconds")
