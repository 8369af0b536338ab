"""Data, workdirs and outputs at URLs, tried against a fake of an object store that has none of a disk's comforts."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse

import fsspec
import numpy as np
import pytest
from etils.epath import backend
from fsspec.registry import _registry
from numpy.testing import assert_array_equal

import bbqrec_jax
from bbqrec_jax.commands import call, serve
from bbqrec_jax.config import default_config
from bbqrec_jax.errors import LOCAL_COPIES, InputError, StorageError
from bbqrec_jax.runs.run import run
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.training.checkpointing import read_params
from bbqrec_jax.utils import object_store, processes, remote
from bbqrec_jax.utils.files import check_new, local_path
from bbqrec_jax.utils.json_files import read_json
from bbqrec_jax.utils.signals import Interrupted

pytestmark = pytest.mark.usefixtures("compile_cache")

ROOT = pathlib.Path(__file__).parents[2]
ITEMS = 12
DATA, RUN = "gs://bucket/data", "gs://bucket/run"


class ObjectStore(fsspec.AbstractFileSystem):
  """Objects are written, read, listed by prefix and removed, as a whole; there is no appending and no renaming.

  A file in `folder` is an object, and its quoted name the object's. `refuse` is called before each request with its
  kind ("list", "read", "write", "remove") and the object's name; what it raises is the answer.
  """

  protocol = ("gs", "gcs")
  cachable = False
  folder: pathlib.Path
  refuse = staticmethod(lambda kind, name: None)
  requests: list[tuple[str, str]]

  @classmethod
  def _strip_protocol(cls, path):
    return str(path).removeprefix("gs://").rstrip("/")

  def _object(self, kind, name):
    self.requests.append((kind, name))
    self.refuse(kind, name)
    return self.folder / urllib.parse.quote(name, safe="")

  def find(self, path, maxdepth=None, withdirs=False, detail=False, **kwargs):
    path, found = self._strip_protocol(path), {}
    self._object("list", path)
    for file in sorted(self.folder.iterdir()):
      name, status = urllib.parse.unquote(file.name), file.stat()
      if name == path or name.startswith(f"{path}/"):
        generation = f"{status.st_mtime_ns}-{status.st_ino}"
        found[name] = {"name": name, "size": status.st_size, "type": "file", "generation": generation}
    return found if detail else list(found)

  def cat_file(self, path, start=None, end=None, **kwargs):
    return self._object("read", self._strip_protocol(path)).read_bytes()

  def get_file(self, rpath, lpath, **kwargs):
    pathlib.Path(lpath).write_bytes(self.cat_file(rpath))

  def pipe_file(self, path, value, mode="overwrite", **kwargs):
    file = self._object("write", self._strip_protocol(path))
    partial = self.folder.parent / f"{file.name[-100:]}.partial"
    partial.write_bytes(value)
    partial.replace(file)

  def put_file(self, lpath, rpath, **kwargs):
    self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

  def rm_file(self, path):
    self._object("remove", self._strip_protocol(path)).unlink()

  def _open(self, path, mode="rb", **kwargs):
    raise NotImplementedError("objects are written and read as a whole")

  ls = info = _open

  @classmethod
  def names(cls, below=""):
    """The names of the objects below a prefix."""
    names = (urllib.parse.unquote(file.name) for file in cls.folder.iterdir())
    return sorted(name.removeprefix(below) for name in names if name.startswith(below))

  @classmethod
  def upload(cls, folder, prefix):
    """Puts a folder there, as `gcloud storage cp -r` does."""
    for path in folder.rglob("*"):
      if path.is_file():
        name = f"{prefix}/{path.relative_to(folder)}"
        (cls.folder / urllib.parse.quote(name, safe="")).write_bytes(path.read_bytes())


@contextlib.contextmanager
def fake_store(folder):
  """Lets gs:// be a fake in a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  made = type("ObjectStore", (ObjectStore,), {"folder": folder, "requests": []})
  before = dict(_registry)
  for name in made.protocol:
    fsspec.register_implementation(name, made, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()  # epath keeps them.
  try:
    yield made
  finally:
    _registry.clear()
    _registry.update(before)
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """The fake, empty; `another_machine` takes all local copies away."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(object_store, "WAIT", 0.0)
  with fake_store(tmp_path / "store") as store:
    store.another_machine = staticmethod(lambda: shutil.rmtree(tmp_path / "cache"))
    yield store
  LOCAL_COPIES.clear()


def make_data(folder, *, seed=0):
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True)
  lines = (f"{user} {' '.join(map(str, rng.permutation(ITEMS)[:5]))}\n" for user in range(40))
  (folder / "sequences.txt").write_text("".join(lines))
  (folder / "items.jsonl").write_text("{}\n" * ITEMS)
  np.save(folder / "text_features.npy", rng.normal(size=(ITEMS, 6)).astype(np.float32))
  return folder


FIELDS = {
  "partitioner": "single", "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_levels": 2, "tokenizer.num_codes": 4,
  "tokenizer.kmeans_iterations": 2, "recommender.head": "dense", "recommender.similarity": (),
  "recommender.item_inputs": ("fused", "item"), "recommender.width": 8, "recommender.mlp_width": 8,
  "recommender.num_layers": 1, "recommender.num_heads": 1, "recommender.steps": 6, "recommender.evaluate_every": 2,
  "recommender.max_length": 8, "evaluation.batch_size": 40, "log_every": 1,
}  # fmt: skip


def make_config(data, **given):
  config = default_config()
  config.update_from_flattened_dict(FIELDS | {"data.path": str(data)} | given)
  return config


@pytest.fixture(scope="module")
def local(tmp_path_factory, compile_cache):
  """The data and an undisturbed run, in folders: their parent."""
  root = tmp_path_factory.mktemp("local")
  run(make_config(make_data(root / "data")), root / "run")
  return root


@pytest.fixture
def uploaded(local, bucket):
  """The bucket, with the data."""
  bucket.upload(local / "data", "bucket/data")
  return bucket


def assert_same(url, local):
  """The run at a URL came to what the local one did, bit for bit."""
  copy = local_path(url, flag="workdir", use="read")
  results, expected = read_json(copy / "results.json"), read_json(local / "run" / "results.json")
  for found in (results, expected):
    del found["seconds"]
    found["data"].pop("source")
  assert results == expected
  assert_array_equal(*(np.load(folder / "tokenizer" / "codes.npy") for folder in (copy, local / "run")))
  best = results["best_step"]
  one, other = (read_params(folder / "checkpoints" / "recommender", best) for folder in (copy, local / "run"))
  import jax

  jax.tree.map(assert_array_equal, one, other)
  logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (copy, local / "run")]
  one, other = [[json.loads(line)["step"] for line in lines] for lines in logs]
  assert one == other, "every record once"


class Killed(BaseException):
  """What no program answers."""


def test_a_run_at_a_url_that_is_stopped_and_killed_goes_on_on_other_machines(local, uploaded, capsys):
  config = make_config(DATA)

  def stop(kind, name):
    if kind == "write" and name == "bucket/run/mirror.json" and "checkpoints/recommender/2/" in str(uploaded.names()):
      uploaded.refuse = staticmethod(lambda kind, name: None)
      os.kill(os.getpid(), signal.SIGTERM)

  uploaded.refuse = staticmethod(stop)
  with pytest.raises(Interrupted):
    run(config, RUN)
  uploaded.another_machine()
  files = json.loads((uploaded.folder / "bucket%2Frun%2Fmirror.json").read_bytes())["files"]
  assert "checkpoints/recommender/2/digests.json" in files
  assert sorted([*files, "mirror.json"]) == uploaded.names("bucket/run/")

  def kill(kind, name):
    if kind == "write" and name == "bucket/run/checkpoints/recommender/4/digests.json":
      raise Killed

  uploaded.refuse = staticmethod(kill)
  with pytest.raises(Killed):
    run(config, RUN)
  assert "going on from step 2" in capsys.readouterr().out
  uploaded.refuse = staticmethod(lambda kind, name: None)
  uploaded.another_machine()
  half = [name for name in uploaded.names("bucket/run/") if name.startswith("checkpoints/recommender/4/")]
  assert half, "an upload was cut off"

  results = run(config, RUN)
  said = capsys.readouterr().out
  assert "going on from step 2" in said
  assert "passed over" not in said, "the half that arrived is not even looked at"
  assert f"{RUN}: process {os.getpid()} on " in said
  assert "has not said that it ended" in said
  assert results["data"]["name"] == "data"
  uploaded.another_machine()
  assert_same(RUN, local)
  noted = read_json(local_path(RUN, flag="workdir", use="read") / "config.json")
  assert noted["data"]["path"] == DATA

  left = json.loads((uploaded.folder / "bucket%2Frun%2Fmirror.json").read_bytes())
  assert sorted([*left["files"], "mirror.json"]) == uploaded.names("bucket/run/"), "nothing of the cut off one is left"
  assert not left["works"]
  before = {file: file.stat().st_mtime_ns for file in uploaded.folder.iterdir()}
  assert run(config, RUN) == results
  assert f"{RUN}/results.json is there already" in capsys.readouterr().out
  assert {file: file.stat().st_mtime_ns for file in uploaded.folder.iterdir()} == before

  found = bbqrec_jax.load_run(RUN)
  assert found.recommend([[3, 4]], k=3) == bbqrec_jax.load_run(local / "run").recommend([[3, 4]], k=3)


def test_the_same_machine_goes_on_with_what_was_not_sent_any_more(local, uploaded):
  config = make_config(DATA)

  def fail(kind, name):
    if kind == "write" and "/checkpoints/recommender/4/" in name:
      raise OSError("Service Unavailable")

  uploaded.refuse = staticmethod(fail)
  with pytest.raises(StorageError) as error:
    run(config, RUN)
  assert "gs://bucket/run/checkpoints/recommender/4/" in str(error.value)
  assert "could not be written: OSError: Service Unavailable; mend that, and the same command goes on" in str(
    error.value
  )
  tried = [name for kind, name in uploaded.requests if kind == "write" and "/recommender/4/" in name]
  assert max(map(tried.count, tried)) == object_store.ATTEMPTS
  assert "bucket/run/checkpoints/recommender/2/digests.json" in uploaded.names()
  failed = set()

  def fail_once(kind, name):
    if (kind, name) not in failed:
      failed.add((kind, name))
      raise TimeoutError("no answer")

  uploaded.refuse = staticmethod(fail_once)
  uploaded.requests.clear()
  run(config, RUN)
  assert len(failed) > 20, "a store that fails now and then is asked again"
  assert not [name for kind, name in uploaded.requests if kind == "read" and "/run/checkpoints/" in name]
  assert_same(RUN, local)


def test_who_begins_later_has_the_workdir(uploaded, tmp_path, monkeypatch, capsys):
  workdir = local_path(RUN, flag="workdir", use="run")
  with contextlib.ExitStack() as stack:
    stack.enter_context(remote.mirrored(workdir))
    workdir.mkdir(parents=True)
    (workdir / "one").write_text("1")
    remote.keep(workdir)
    with pytest.raises(InputError, match=rf"^{RUN} is taken: process {os.getpid()} on "):
      run(make_config(DATA), RUN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    other = local_path(RUN, flag="workdir", use="run")
    with remote.mirrored(other):
      assert f"{RUN}: process {os.getpid()} on " in capsys.readouterr().out
      assert (other / "one").read_text() == "1"
      (other / "one").write_text("2")
      remote.keep(other / "checkpoints")
    assert uploaded.names("bucket/run/") == ["mirror.json", "one"]
    (workdir / "one").write_text("3")
    with pytest.raises(StorageError, match=rf"{RUN}: process {os.getpid()} on .* has written there since; one start"):
      remote.keep(workdir)
    stack.pop_all()  # As it is left by an error.
    remote._open.clear()
  assert (uploaded.folder / "bucket%2Frun%2Fone").read_text() == "2"


def test_several_processes_need_a_folder(uploaded, monkeypatch):
  monkeypatch.setattr(processes, "several", lambda: True)
  with pytest.raises(InputError, match=f"--workdir={RUN}: a run of several processes needs .* mount the bucket"):
    run(make_config(DATA), RUN)


def test_what_has_changed_is_copied_again_and_nothing_else(uploaded):
  folder = local_path(DATA, flag="data", use="read")
  assert sorted(os.listdir(folder)) == ["items.jsonl", "sequences.txt", "text_features.npy"]
  assert folder.name == "data"
  uploaded.requests.clear()
  assert local_path(f"{DATA}/", flag="data", use="read") == folder
  assert [kind for kind, name in uploaded.requests if not name.endswith("mirror.json")] == ["list"]
  (uploaded.folder / "bucket%2Fdata%2Fitems.jsonl").write_text("[]\n" * ITEMS)  # Of the same size.
  (uploaded.folder / "bucket%2Fdata%2Ftext_features.npy").unlink()
  (uploaded.folder / "bucket%2Fdata%2Fdeep%2Fnew").touch()
  (folder / "sequences.txt").write_text("damaged here")
  local_path(DATA, flag="data", use="read")
  assert (folder / "items.jsonl").read_text() == "[]\n" * ITEMS
  assert sorted(os.listdir(folder)) == ["deep", "items.jsonl", "sequences.txt"]
  assert (folder / "sequences.txt").read_text() != "damaged here"
  (uploaded.folder / "bucket%2Fdata%2Fdeep%2Fnew").unlink()
  assert not (local_path(DATA, flag="data", use="read") / "deep").exists()
  assert local_path(f"{DATA}/items.jsonl", flag="data", use="read").read_text() == "[]\n" * ITEMS
  (uploaded.folder / "bucket%2Fdata%2Fitems.jsonl").write_text("{}\n" * ITEMS)
  (uploaded.folder / "bucket%2Fdata%2Fsequences.txt").write_text("0 1 2 x\n")
  with pytest.raises(InputError, match=f"^{DATA}/sequences.txt line 1"):
    bbqrec_jax.load_data(DATA)


def test_an_output_counts_when_it_is_whole(bucket):
  output = local_path("gs://bucket/made", flag="output", use="write")
  assert bucket.names() == [], "what tried whether it can be written is gone"
  check_new(output)
  output.mkdir()
  for name in ("a", "b"):
    (output / name).write_text(name)

  def fail(kind, name):
    if name.endswith("/b"):
      raise OSError("reset by peer")

  bucket.refuse = staticmethod(fail)
  with pytest.raises(StorageError, match=r"gs://bucket/made/b could not be written: OSError: reset by peer; mend that"):
    remote.deliver(output)
  bucket.refuse = staticmethod(lambda kind, name: None)
  with pytest.raises(InputError, match="gs://bucket/made: expected a file or a folder of files, found nothing"):
    local_path("gs://bucket/made", flag="bundle", use="read")
  assert not remote.exists(output)
  remote.deliver(output)
  copy = local_path("gs://bucket/made", flag="bundle", use="read")
  assert sorted(path.read_text() for path in copy.iterdir()) == ["a", "b"]
  again = local_path("gs://bucket/made", flag="output", use="write")
  with pytest.raises(InputError, match=r"^gs://bucket/made exists already: choose another --output"):
    check_new(again)
  file = local_path("gs://bucket/one.jsonl", flag="output", use="write")
  file.write_text("one")
  remote.deliver(file)
  assert local_path("gs://bucket/one.jsonl", flag="x", use="read").read_text() == "one"
  with pytest.raises(InputError, match="exists already"):
    check_new(local_path("gs://bucket/one.jsonl", flag="output", use="write"))


def test_any_file_system_of_fsspec_will_do(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  output = local_path("memory://of/tests", flag="output", use="write")
  output.mkdir()
  (output / "a").write_text("a")
  remote.deliver(output)
  assert (local_path("Memory://of/tests", flag="data", use="read") / "a").read_text() == "a"
  LOCAL_COPIES.clear()


def denied(*kinds):
  def refuse(kind, name):
    if kind in kinds:
      raise PermissionError(f"{kind} is not allowed")

  return staticmethod(refuse)


@pytest.mark.parametrize(
  ("url", "use", "said"),
  [
    (
      "gs://bucket/none",
      "read",
      "gs://bucket/none: expected a file or a folder of files, found nothing; check the URL",
    ),
    (
      "gs://",
      "read",
      "gs://: expected a URL such as gs://bucket/folder, got one with an empty, odd or long part; correct it",
    ),
    ("gs://bucket//data", "run", "gs://bucket//data: expected a URL such as"),
    (f"gs://bucket/{'x' * 150}/data", "run", f"gs://bucket/{'x' * 150}/data: expected a URL such as"),
    ("gs://bucket/../data", "run", "gs://bucket/../data: expected a URL such as"),
    ("gcp://bucket/data", "run", "gcp://bucket/data: expected a path, or a URL of a kind that fsspec knows"),
    ("s3://bucket/data", "write", "s3://bucket/data: a package is missing: "),
    (
      "gs://locked/data",
      "read",
      "gs://locked/data/mirror.json could not be read: PermissionError: read is not allowed; m",
    ),
    ("gs://locked/data", "write", "gs://locked/data could not be written: PermissionError: write is not allowed; mend"),
  ],
  ids=range(9),
)
def test_what_is_wrong_with_a_url_is_one_line(bucket, url, use, said, monkeypatch):
  if url.startswith("gs://locked"):
    bucket.refuse = denied("read", "write")
  if url.startswith("s3"):  # As if it was not installed, where it is.
    monkeypatch.setitem(sys.modules, "s3fs", None)
    said += "Install s3fs"
  with pytest.raises(InputError) as error:
    local_path(url, flag="data", use=use)
  assert str(error.value).startswith(f"--data={url}: {said.removeprefix(f'{url}: ')}")
  assert "\n" not in str(error.value)
  assert len([1 for kind, _ in bucket.requests if kind in ("read", "write")]) <= 1, (
    "no rights will come of asking again"
  )


def test_a_missing_package_is_named_before_anything_is_done(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)  # As if it was not installed, where it is.
  with pytest.raises(InputError) as error:
    run(make_config(DATA), RUN)
  said = str(error.value)
  assert said.startswith(f"--workdir={RUN}: a package is missing: Please install gcsfs")
  assert said.endswith("pip install 'bbqrec_jax[gcs]'")


def test_a_run_without_rights_is_refused_before_anything_is_computed(uploaded):
  uploaded.refuse = denied("write")
  with pytest.raises(InputError, match=rf"{RUN}/mirror.json could not be written: PermissionError: write is not"):
    run(make_config(DATA), RUN)
  assert uploaded.names("bucket/run") == []
  with pytest.raises(InputError, match=f"--workdir={DATA} is the folder of config field data.path"):
    run(make_config(DATA), DATA)


def test_names_that_lead_elsewhere_are_refused(bucket):
  (bucket.folder / "bucket%2Fdata%2F..%2F..%2Fx").touch()
  with pytest.raises(InputError, match=r"expected names that a folder can have, found '\.\./\.\./x'"):
    local_path(DATA, flag="data", use="read")


def test_a_damaged_manifest_is_told(bucket):
  (bucket.folder / "bucket%2Frun%2Fmirror.json").write_text('{"files": ["a"], "writer": "", "turn": 1, "checksum": ""}')
  with pytest.raises(
    InputError, match=r"gs://bucket/run/mirror.json: expected the names of the files there, got a dam"
  ):
    local_path(RUN, flag="workdir", use="read")


def start(tmp_path, store, *commands):
  """Starts the commands, one after another, in a process of its own."""
  return subprocess.Popen(
    [sys.executable, __file__, str(store.folder), json.dumps(commands)],
    env=os.environ
    | {
      "PYTHONPATH": str(ROOT),
      "XDG_CACHE_HOME": str(tmp_path / "cache"),
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_every_command_takes_urls_or_says_that_it_does_not(local, uploaded, tmp_path):
  uploaded.upload(local / "run", "bucket/run")
  uploaded.upload(local / "run", "bucket/other")
  (uploaded.folder / "bucket%2Fasked.jsonl").write_text('{"user": "a", "items": ["3", "4"]}\n')
  np.save(uploaded.folder / "bucket%2Fnew%2Ftext_features.npy", np.load(local / "data" / "text_features.npy")[:4] / 2)
  (uploaded.folder / "bucket%2Fnew%2Fitems.jsonl").write_text("".join(f'{{"id": "new-{n}"}}\n' for n in range(4)))
  of_run = (f"--workdir={RUN}", f"--data={DATA}")
  program = start(
    tmp_path,
    uploaded,
    ["recommend", *of_run, "--histories=gs://bucket/asked.jsonl", "--output=gs://bucket/found.jsonl", "--top=3"],
    ["export", *of_run, "--output=gs://bucket/bundle", "--platforms=cpu", "--batch_sizes=1", "--widths=8"],
    ["export", *of_run, "--output=gs://bucket/bundle", "--platforms=cpu", "--batch_sizes=1", "--widths=8"],
    ["report", *of_run, "--nopictures"],
    ["compare", RUN, "gs://bucket/other", "--output=gs://bucket/compared"],
    ["assign", f"--tokenizer={RUN}/tokenizer", "--features=gs://bucket/new", "--output=gs://bucket/more"],
    ["serve", "gs://bucket/nothing"],
    ["runs", "gs://bucket"],
    ["track", f"--workdir={RUN}", "--to=wandb"],
    ["features", DATA],
    ["prepare", "log.csv", "--output=gs://bucket/shop"],
    ["train", "--config=sasrec", "--data=gs://bucket/none", f"--workdir={RUN}"],
  )
  said, wrong = program.communicate(timeout=300)
  expected = [
    "gs://bucket/bundle exists already: choose another --output",
    "--bundle=gs://bucket/nothing: expected a file or a folder of files, found nothing",
    "--workdir=gs://bucket: expected a path, got a URL",
    f"--workdir={RUN}: expected a path, got a URL",
    f"--data={DATA}: expected a path, got a URL",
    "--output=gs://bucket/shop: expected a path, got a URL",
    "--data=gs://bucket/none: expected a file or a folder of files, found nothing",
  ]
  errors = [line for line in wrong.splitlines() if line.startswith("error: ")]
  assert len(errors) == len(expected), wrong
  assert [line.startswith(f"error: {start}") for line, start in zip(errors, expected, strict=True)] == [True] * 7, wrong
  for what in ("found.jsonl", "bundle: 12 items", "run/report/report.html: the page", "more, fingerprint"):
    assert f"gs://bucket/{what}" in said, said
  assert "cache" not in said
  (line,) = (uploaded.folder / "bucket%2Ffound.jsonl").read_text().splitlines()
  assert len(json.loads(line)["items"]) == 3
  assert serve.load_again("gs://bucket/bundle", None).num_items == ITEMS
  assert {"report.html", "mirror.json"} <= set(uploaded.names("bucket/run/report/"))
  assert {"comparison.md", "comparison.png"} <= set(uploaded.names("bucket/compared/"))
  assert SemanticIds.load(local_path("gs://bucket/more", flag="x", use="read")).codes.shape == (ITEMS + 4, 2)
  checkpoints = [path for path in (tmp_path / "cache").rglob("checkpoints") if "other" in str(path)]
  assert not checkpoints, "a comparison needs none"


def test_sigterm_saves_at_the_url(uploaded, tmp_path):
  fields = FIELDS | {"recommender.steps": 10**6, "recommender.evaluate_every": 10}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  program = start(tmp_path, uploaded, ["train", "--config=sasrec", f"--data={DATA}", f"--workdir={RUN}", *flags])
  while program.poll() is None and "checkpoints/recommender/10/digests.json" not in uploaded.names("bucket/run/"):
    time.sleep(0.1)
  program.send_signal(signal.SIGTERM)
  said, wrong = program.communicate(timeout=120)
  assert wrong == ""
  assert "stopped by SIGTERM, everything is saved; the same command goes on from here" in said
  manifest = json.loads((uploaded.folder / "bucket%2Frun%2Fmirror.json").read_bytes())
  last = json.loads((uploaded.folder / "bucket%2Frun%2Fmetrics.jsonl").read_text().splitlines()[-1])
  assert f"checkpoints/recommender/{last['step']}/digests.json" in manifest["files"]
  assert not manifest["works"]


def program(folder, commands):
  """Runs commands whose gs:// is a fake in a folder, one after another."""
  object_store.WAIT = 0.0
  with fake_store(pathlib.Path(folder)):
    for name, *arguments in json.loads(commands):
      child = os.fork()
      if not child:
        call(name, arguments)
        sys.exit()
      signal.signal(signal.SIGTERM, lambda number, frame, child=child: os.kill(child, number))
      os.waitpid(child, 0)


if __name__ == "__main__":
  program(*sys.argv[1:])
