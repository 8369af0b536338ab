"""Folders of a run: data that moves, paths from anywhere, and what is refused before anything is written into one."""

import errno
import os
import pathlib
import shutil
import types
from typing import NamedTuple

import numpy as np
import pytest

from bbqrec_jax.commands import benchmark, export, recommend, report
from bbqrec_jax.config import default_config
from bbqrec_jax.data.sources import load
from bbqrec_jax.data.synthetic import make_synthetic
from bbqrec_jax.errors import InputError
from bbqrec_jax.presets import SYSTEMS, system_config
from bbqrec_jax.runs import restore as restoring
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs import workdir as workdir_notes
from bbqrec_jax.runs.workdir import claim, claimed, load_config, with_absolute_paths
from bbqrec_jax.tokenizer.kmeans import check_varied
from bbqrec_jax.utils.json_files import read_json, write_json
from bbqrec_jax.utils.lock import locked

pytestmark = pytest.mark.usefixtures("compile_cache")

ITEMS = 12
SASREC = {"recommender.head": "dense", "recommender.item_inputs": ("item",), "recommender.similarity": ()}


def make_config(**changes):
  config = default_config()
  config.update_from_flattened_dict({
    "partitioner": "single", "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_levels": 2, "tokenizer.num_codes": 4,
    "tokenizer.kmeans_iterations": 2, "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1,
    "recommender.steps": 2, "recommender.evaluate_every": 2, "recommender.num_buckets": 2, "evaluation.batch_size": 40,
  })  # fmt: skip
  config.update_from_flattened_dict(changes)
  return config


def make_data(folder, *, seed=0):
  """A small data set in the project's own format."""
  rng = np.random.default_rng(seed)
  folder.mkdir()
  lines = (f"{user} {' '.join(map(str, rng.permutation(ITEMS)[:5]))}\n" for user in range(40))
  (folder / "sequences.txt").write_text("".join(lines))
  (folder / "items.jsonl").write_text("{}\n" * ITEMS)
  np.save(folder / "text_features.npy", rng.normal(size=(ITEMS, 6)).astype(np.float32))
  return folder


@pytest.fixture(scope="module")
def artefact(tmp_path_factory, compile_cache):
  """The folder of a tokenizer, and that of its data."""
  folder = tmp_path_factory.mktemp("artefact")
  data = make_data(folder / "data")
  experiment.tokenize(make_config(**{"data.path": str(data)}), folder / "run")
  return folder / "run" / "tokenizer", data


def test_a_run_is_restored_and_goes_on_wherever_its_data_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  make_data(tmp_path / "data")
  workdir, moved = tmp_path / "run", tmp_path / "moved"
  workdir.mkdir()
  with locked(workdir):
    for start in (experiment.run, experiment.tokenize):
      with pytest.raises(InputError, match=rf"{workdir} is taken: process {os.getpid()} on "):
        start(make_config(**SASREC, **{"data.path": "data"}), workdir)
    assert os.listdir(workdir) == ["lock"]
  results = experiment.run(make_config(**SASREC, **{"data.path": "data"}), workdir)
  assert read_json(workdir / "config.json")["data"]["path"] == str(tmp_path / "data")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  restoring.restore(workdir)  # From whatever folder.

  shutil.move(tmp_path / "data", moved)
  with pytest.raises(InputError) as error:
    restoring.restore(workdir)
  assert str(error.value) == (
    f"{tmp_path}/data: expected the data of the run in {workdir}, found no such folder; say where it is now with"
    " --data=DIR"
  )
  restored = restoring.restore(workdir, data=moved)
  assert restored.dataset.source == str(moved)
  with pytest.raises(InputError, match=r"was trained on .*: give it its own data, --data=DIR"):
    restoring.restore(workdir, data=make_data(tmp_path / "other", seed=1))
  assert read_json(workdir / "config.json")["data"]["path"] == str(tmp_path / "data")

  monkeypatch.setenv("HOME", str(tmp_path))
  assert experiment.run(make_config(**SASREC, **{"data.path": "~/moved"}), workdir) == results
  assert read_json(workdir / "config.json")["data"]["path"] == str(moved)
  before = {path: path.stat().st_mtime_ns for path in workdir.iterdir()}
  with locked(workdir):  # Whoever reads asks for no lock.
    before[workdir / "lock"] = (workdir / "lock").stat().st_mtime_ns
    restoring.restore(workdir)
    experiment.run(make_config(**SASREC, **{"data.path": str(moved)}), workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.iterdir()} == before, "nothing is written that is there"

  empty = tmp_path / "histories.txt"
  empty.touch()
  names = ("history", "titles", "allow", "deny", "times", "timestamps", "tokenizer", "features", "data")
  options = dict.fromkeys(names)
  options |= {
    "workdir": workdir,
    "user": None,
    "histories": empty,
    "output": tmp_path / "out",
    "top": 3,
    "trust": [],
    "repeat": False,
  }
  assert_refused(
    monkeypatch, recommend, options, f"{empty}: expected a line a user, 'user item item ...', got an empty"
  )
  assert not list(tmp_path.glob("out*"))


def test_a_finished_tokenizer_needs_no_lock(artefact):
  folder, data = artefact
  before = sorted(os.walk(folder.parent))
  with locked(folder.parent):
    health = experiment.tokenize(make_config(**{"data.path": str(data)}), folder.parent)
  assert health == read_json(folder / "health.json")
  assert sorted(os.walk(folder.parent)) == before


def test_what_is_finished_may_lie_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
  figures = {"split_hash": "", "features_hash": "", "ids_hash": "", "times_hash": "", "titles_hash": ""}
  dataset = make_synthetic(num_users=3, num_items=10)
  data = figures, dataset, dataset.interactions
  with claimed(tmp_path / "run", make_config(), *data, done=False):
    pass
  changed = make_config(**{"data.path": "/moved"})

  def fail(*arguments):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(workdir_notes, "write_json", fail)
  with claimed(tmp_path / "run", make_config(), *data, done=True):
    assert not capsys.readouterr().out
  with claimed(tmp_path / "run", changed, *data, done=True):
    assert "Read-only file system" in capsys.readouterr().out
  with pytest.raises(OSError, match="Read-only"), claimed(tmp_path / "run", changed, *data, done=False):
    pass


def assert_refused(monkeypatch, program, options, said):
  """Runs a program's main with options; it must end with one line and status 2."""
  monkeypatch.setattr(program, "quiet_flags", lambda: types.SimpleNamespace(**options))
  lines = []
  monkeypatch.setattr("builtins.print", lambda line, **_: lines.append(line))
  with pytest.raises(SystemExit) as end:
    program.main([])
  assert end.value.code == 2
  (line,) = lines
  assert line.startswith(f"error: {said}"), line


def test_other_wrong_places_of_programs_are_one_line(monkeypatch, tmp_path, load_file):
  options = dict.fromkeys(("records", "output")) | {"only": ()}
  wrong = options | {"config": load_file("configs/quickstart.py").get_config()}
  assert_refused(monkeypatch, benchmark, wrong, "--config: expected benchmark, benchmark_paper or benchmark_large")
  file = tmp_path / "file"
  file.touch()
  exported = {"output": file / "x", "top": 1, "platforms": ["cpu"], "check": 0, "batch_sizes": ["1"], "widths": ["1"]}
  assert_refused(monkeypatch, export, exported, f"--output={file}/x: expected a folder, or a place for one, but {file}")


def test_synthetic_data_is_nowhere(tmp_path):
  config = make_config(**{"data.source": "synthetic"})
  with pytest.raises(InputError, match=r"--data=x: the run in run makes its own data; leave --data out"):
    restoring._point_to_data(config, pathlib.Path("run"), pathlib.Path("x"))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    (
      {"tokenizer.artefact": "~/nosuch"},
      "HOME/nosuch: expected semantic IDs, the tokenizer/ folder of a run, found no",
    ),
    ({"tokenizer.artefact": "ARTEFACT", "data.path": "OTHER"}, "ARTEFACT holds semantic IDs of other data"),
    (
      {"recommender.head": "json:loads"},
      "config field recommender.head = 'json:loads': expected a subclass of",
    ),
    (
      {"tokenizer.own_loss": "nosuch:loss", "tokenizer.quantizer": "rq_vae"},
      "config field tokenizer.own_loss: expected module:function, got 'nosuch:loss' (No module named 'nosuch')",
    ),
    (
      {"tokenizer.own_loss": "math:pi", "tokenizer.quantizer": "rq_vae"},
      "config field tokenizer.own_loss = 'math:pi': expected a function, got 3.14",
    ),
    (
      {"tokenizer.own_loss": "builtins:len", "tokenizer.quantizer": "rq_vae", "tokenizer.batch_items": 24},
      "config field tokenizer.own_loss: expected a number per item, [24], got an array of shape []",
    ),
    (
      {"tokenizer.own_loss": "builtins:sum", "tokenizer.quantizer": "rq_vae"},
      "config field tokenizer.own_loss = 'builtins:sum' breaks the contract of docs/parts.md: TypeError: unsupported",
    ),
    ({"recommender.backbone": "copy:copy"}, "config field recommender.backbone = 'copy:copy': expected a subclass of"),
    ({"seed": 2**70}, "config field seed: expected a whole number"),
  ],
  ids=str,
)
def test_what_a_run_needs_is_looked_at_before_its_workdir_is_claimed(artefact, tmp_path, monkeypatch, changes, said):
  monkeypatch.setenv("HOME", str(tmp_path))
  places = {"ARTEFACT": str(artefact[0]), "OTHER": str(make_data(tmp_path / "other", seed=1)), "HOME": str(tmp_path)}
  given = {"data.path": str(artefact[1])} | {name: places.get(str(value), value) for name, value in changes.items()}
  for name, place in places.items():
    said = said.replace(name, place)
  with pytest.raises(InputError) as error:
    experiment.run(make_config(**given), tmp_path / "run")
  assert str(error.value).startswith(said)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["directory", "recbole"])
@pytest.mark.parametrize("system", [*SYSTEMS, "tiger"])
def test_three_items_each_are_too_few_to_learn_from_whatever_the_system(tmp_path, load_file, system, source):
  config = load_file("configs/tiger.py").get_config() if system == "tiger" else system_config(system)
  config.data.path, config.data.source = str(make_data(tmp_path / "data")), source
  rows = [(f"u{user}", user % ITEMS, (user + 1) % ITEMS, 0) for user in range(20)]
  if source == "directory":
    file = tmp_path / "data" / "sequences.txt"
    file.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
  else:
    file = tmp_path / "data" / "shop.inter"
    lines = (f"{user}\t{item}\n" for user, *items in rows for item in items)
    file.write_text("user_id:token\titem_id:token\n" + "".join(lines))
  for call in (experiment.run, experiment.tokenize):
    with pytest.raises(InputError) as error:
      call(config, tmp_path / "run")
    message = str(error.value)
    assert message.startswith(f"{file}: ")
    assert "too short to learn from" in message
    assert "4 or more" in message
  assert not (tmp_path / "run").exists()


def test_features_that_are_all_the_same_are_nothing_to_quantize(tmp_path):
  data = make_data(tmp_path / "data")
  alike = np.full((ITEMS, 3), 0.1, np.float32)
  alike[5] = 0  # Of an item that lacks them.
  np.save(data / "image_features.npy", alike)
  config = make_config(**{"data.path": str(data)})
  for call in (experiment.run, experiment.tokenize):
    with pytest.raises(InputError) as error:
      call(config, tmp_path / "run")
    for part in (f"{data}: the image features of all 11 items", "nothing to quantize", "--config.data.modalities=text"):
      assert part in str(error.value)
  (data / "text_features.npy").unlink()
  with pytest.raises(InputError, match=r"nothing to quantize.*--config=sasrec"):
    experiment.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
  alike[7, 1] = 0.2
  np.save(data / "image_features.npy", alike)
  check_varied(load(config.data), block=4)


class Devices(NamedTuple):
  num_devices: int


def test_batches_are_looked_at_where_they_are_used(tmp_path, monkeypatch):
  monkeypatch.setattr(experiment, "make_partitioner", lambda config: Devices(7))
  data = {"data.path": str(make_data(tmp_path / "data"))}

  def refusal(call, **changes):
    with pytest.raises(InputError) as error:
      call(make_config(**data, **changes), tmp_path / "run")
    return str(error.value)

  said = refusal(experiment.run, **{"tokenizer.quantizer": "rq_vae"})
  for name in ("tokenizer.batch_items = 256", "tokenizer.batch_rows = 32"):
    assert name in said, "all at once"
  said = refusal(experiment.tokenize, **{"tokenizer.quantizer": "rq_vae", "tokenizer.batch_items": 28})
  assert said.startswith("config field tokenizer.batch_rows = 32 must be a multiple of the 7 devices;")
  assert not (tmp_path / "run").exists()


def test_an_artefact_serves_from_any_folder_whoever_claims_the_workdir(artefact, tmp_path, monkeypatch):
  monkeypatch.chdir(artefact[0].parent)
  config = make_config(**{"data.path": str(artefact[1]), "tokenizer.artefact": "tokenizer"})
  workdir = tmp_path / "run"
  experiment.tokenize(config, workdir)
  assert load_config(workdir).tokenizer.artefact == str(artefact[0])
  # A workdir of before, which has the path as it was given.
  for name in ("config.json", "run.json"):
    note = read_json(workdir / name)
    note.get("tokenizer", note).update({"artefact" if "tokenizer" in note else "tokenizer.artefact": "tokenizer"})
    write_json(workdir / name, note)
  load_config(workdir)
  experiment.tokenize(config, workdir)
  monkeypatch.chdir(tmp_path)
  assert load_config(workdir).tokenizer.artefact == str(artefact[0])
  with pytest.raises(InputError, match=r"holds another run, which differs in .*tokenizer\.artefact"):
    claim(
      workdir,
      make_config(),
      {"split_hash": "", "features_hash": "", "ids_hash": "", "times_hash": "", "titles_hash": ""},
    )


def test_a_run_lives_in_folders_of_any_name_whoever_starts_it(tmp_path, monkeypatch):
  folder = tmp_path / "a[b] *\\\udcff" / "logs:\n"
  folder.parent.mkdir()
  make_data(folder)
  monkeypatch.chdir(folder)
  config = make_config(**SASREC, **{"data.path": "."})
  results = experiment.run(config, "run")
  assert experiment.run(config, pathlib.Path("run")) == results
  restored = restoring.restore("run", data=str(folder))
  assert restored.dataset.source == str(folder)
  (folder / "run" / "results.json").unlink()
  again = experiment.run(config, str(folder / "run"))
  assert again | {"seconds": None} == results | {"seconds": None}
  assert sorted(os.listdir(folder)) == sorted(["run", "sequences.txt", "items.jsonl", "text_features.npy"])


@pytest.mark.parametrize("url", ["gs:/b/x", "s3:b", "me@host:/x", "https://b/x", "file:///x"])
def test_what_is_no_url_of_files_is_refused_whoever_gives_it(tmp_path, monkeypatch, url):
  monkeypatch.chdir(tmp_path)
  config = make_config(**{"data.source": "synthetic"})
  with pytest.raises(InputError, match=f"--workdir={url}: expected a path, got a URL"):
    experiment.run(config, url)
  for field in ("data.path", "tokenizer.artefact"):
    with pytest.raises(InputError, match=rf"--config\.{field}={url}: expected a path, got a URL"):
      experiment.tokenize(make_config(**{field: url}), "run")
  for flag in ("workdir", "data", "tokenizer", "features"):
    with pytest.raises(InputError, match=f"--{flag}={url}: expected a path, got a URL"):
      restoring.restore(**({"workdir": "run"} | {flag: url}))
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written_to_is_refused_unless_its_run_is_done(tmp_path, monkeypatch):
  config = make_config(**SASREC, **{"data.path": str(make_data(tmp_path / "data"))})
  results = experiment.run(config, tmp_path / "run")
  monkeypatch.setattr(os, "access", lambda path, mode: False)  # Root may write anywhere.
  with pytest.raises(InputError, match=f"--workdir={tmp_path}/new: {tmp_path} cannot be written to"):
    experiment.run(config, tmp_path / "new")
  assert experiment.run(config, tmp_path / "run") == results
  asked = {"workdir": tmp_path / "run", "output": None}
  assert_refused(monkeypatch, report, asked, f"--output={tmp_path}/run/report: {tmp_path}/run cannot be written to")


def test_the_root_of_all_is_no_workdir(tmp_path):
  (tmp_path / "root").symlink_to("/")
  for workdir in ("/", "/..", tmp_path / "root"):
    with pytest.raises(InputError, match=f"--workdir={workdir}: expected a folder for the run alone"):
      experiment.run(make_config(**{"data.source": "synthetic"}), workdir)


def test_a_workdir_that_can_be_none_or_is_what_is_read_is_refused(artefact, tmp_path):
  tokenizer, data = artefact
  file, link = tmp_path / "file", tmp_path / "link"
  file.touch()
  link.symlink_to(data)
  config = make_config(**{"data.path": str(data), "tokenizer.artefact": str(tokenizer)})
  for workdir, said in (
    (file, f"--workdir={file}: expected a folder, or a place for one, but {file} is none; use another"),
    (file / "sub", f"--workdir={file}/sub: expected a folder, or a place for one, but {file} is none; use another"),
    (data, f"--workdir={data} is the folder of config field data.path, which a run only reads; use another"),
    (link, f"--workdir={link} is the folder of config field data.path, which a run only reads; use another"),
    (tokenizer, f"--workdir={tokenizer} is the folder of config field tokenizer.artefact, which a run only reads; use"),
  ):
    before = sorted(os.walk(workdir))
    with pytest.raises(InputError) as error:
      experiment.run(config, workdir)
    assert str(error.value).startswith(said)
    assert sorted(os.walk(workdir)) == before


def test_a_workdir_that_no_file_system_can_name_is_refused(tmp_path):
  with pytest.raises(InputError, match="--workdir="):
    experiment.run(make_config(**{"data.source": "synthetic"}), tmp_path / "\ud800")


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
  def fail(*arguments, **options):
    raise FileNotFoundError(2, "No such file or directory")

  monkeypatch.setattr(pathlib.Path, "mkdir", fail)
  with pytest.raises(InputError, match=r"--workdir=.*/run cannot be made: No such file or directory; use another"):
    claim(
      tmp_path / "run",
      make_config(),
      {"split_hash": "", "features_hash": "", "ids_hash": "", "times_hash": "", "titles_hash": ""},
    )


def test_paths_of_a_config_are_made_absolute_and_empty_ones_are_left(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", "/home/me")
  monkeypatch.chdir(tmp_path)
  config = make_config(**{"data.path": "~/data", "tokenizer.artefact": "ids"})
  placed = with_absolute_paths(config)
  assert (placed.data.path, placed.tokenizer.artefact) == ("/home/me/data", str(tmp_path / "ids"))
  assert config.data.path == "~/data"
  assert with_absolute_paths(default_config()) == default_config()
