"""Breaks a real run in every way it can think of, and looks whether the same command still ends with the same numbers.

    python experiments/faults.py --output=faults.json [--short]
    python experiments/faults.py --processes=4 --output=processes.json [--short]

One small run of both stages, on data in files, is done in peace. Then it is started again and again as a process of its
own, and

- killed at random moments (SIGKILL, SIGTERM, Ctrl-C), some of them anywhere, some during compilation, steps, saves,
  evaluations and k-means, which are told from the files that the run writes,
- given a disk that fills up (a small tmpfs; as root alone) or files that may not grow (`ulimit -f`), and a folder that
  cannot be written to (remounted read-only; by its rights, where this is not root),
- given checkpoints, semantic IDs, notes and data with a flipped bit, cut off or missing,
- started a second time while it runs, in folders of odd names, with settings of JAX, Python and the locale that a shell
  may carry, and without standard streams, or with full or unread ones.

With `--processes=4` the run is one of four processes, of which one is killed, stopped, slowed (stopped for 8 s) or cut
off from the others (as root alone: each process then has a network of its own), the first or another, amid a step, a
save and an evaluation. The others must go on where it is slowed; else they must end, each with one line.

After each, the same command is given once more, with what was taken away given back. It *survived* if it ends with the
metrics, parameters and semantic IDs of the run in peace, bit for bit; it was *refused* if it ends with one line on
standard error and a status that is not 0; anything else is *wrong*, and is told. `--short` does a few of all this, one
after the other on one run. What cannot be done here has a row with the reason and no figures.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.data.synthetic import make_synthetic
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.training.checkpointing import read_params
from bbqrec_jax.utils import processes
from bbqrec_jax.utils.files import check_output
from bbqrec_jax.utils.json_files import read_json, write_json

ROOT = pathlib.Path(__file__).parents[1]
STEPS, EVALUATE_EVERY, WARMUP = 60, 20, 15
SETTINGS = {
  "data.source": "directory", "partitioner": "single", "log_every": 5, "seed": 1,
  "tokenizer.num_codes": 8, "tokenizer.code_width": 8, "tokenizer.hidden": (16,), "tokenizer.steps": STEPS,
  "tokenizer.warmup_steps": WARMUP, "tokenizer.evaluate_every": EVALUATE_EVERY, "tokenizer.batch_items": 16,
  "tokenizer.batch_rows": 4, "tokenizer.max_length": 8, "tokenizer.row_length": 8, "tokenizer.kmeans_iterations": 3,
  "recommender.head": "dense", "recommender.width": 16, "recommender.mlp_width": 16, "recommender.num_layers": 1,
  "recommender.max_length": 8, "recommender.row_length": 8, "recommender.batch_rows": 16, "recommender.steps": STEPS,
  "recommender.evaluate_every": EVALUATE_EVERY, "recommender.num_buckets": 4, "evaluation.batch_size": 150,
}  # fmt: skip
SHORT = {"tokenizer.quantizer": "rq_kmeans", "recommender.similarity": ()}  # One stage less to compile.
PATIENCE = 900  # Seconds after which a run hangs.
# Names that orbax and tensorstore would take for patterns, URLs or other separators, or cannot hold.
NAMES = ("a[b] *?", "gs:", "back\\slash", "line\nfeed", "п\u0440огон e\u0301", "byte \udcff", "-x", "%20#$|'\" .")
# Settings that a shell may carry: what must change no number, and what must be refused in one line.
ENVIRONMENTS = (
  {"JAX_ENABLE_X64": "1"}, {"JAX_DEBUG_NANS": "1"}, {"JAX_DEBUG_INFS": "1"}, {"JAX_DISABLE_JIT": "1"},
  {"JAX_NUMPY_RANK_PROMOTION": "raise"}, {"JAX_NUMPY_DTYPE_PROMOTION": "strict"}, {"JAX_TRANSFER_GUARD": "disallow"},
  {"JAX_DEFAULT_PRNG_IMPL": "rbg"}, {"JAX_THREEFRY_PARTITIONABLE": "0"}, {"PYTHONOPTIMIZE": "2"},
  {"PYTHONWARNINGS": "error"}, {"PYTHONHASHSEED": "7"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
  {"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb", "COLUMNS": "1"}, {"OMP_NUM_THREADS": "1"},
  {"JAX_PLATFORMS": "nosuch"}, {"JAX_ENABLE_X64": "perhaps"},
)  # fmt: skip
REDIRECTIONS = (">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "| true")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SLOWED = 8  # Seconds that a process is stopped for, and then goes on.
ENDED_WITHIN = 1.5 * processes.LOST_AFTER  # Seconds in which the others of a lost process must end.


class Unfit(Exception):
  """A fault that did not come about, such as a kill after the end."""


class Process:
  """The program at work."""

  def __init__(self, command: list[str], environment: dict[str, str], output: pathlib.Path):
    """Starts it; what it says goes to a file."""
    self.output = output
    with open(output, "w") as file:
      self._process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.PIPE, text=True
      )

  def said(self) -> str:
    """What it has said so far. Nothing means that Python is still loading it."""
    return self.output.read_text()

  def logged(self) -> list[tuple[str, int]]:
    """(stage, step) of the training metrics that it has shown so far."""
    return [(stage, int(step)) for stage, step in re.findall(r"^(\w+) (\d+)/\d+  loss ", self.said(), re.MULTILINE)]

  def send(self, signum: int) -> None:
    """Sends it a signal."""
    self._process.send_signal(signum)

  def ended(self) -> bool:
    """Whether it has ended."""
    return self._process.poll() is not None

  def wait_for(self, happened: Callable[[], Any]) -> None:
    """Returns at once when it has happened.

    Raises:
      Unfit: if the program ends first.
    """
    while not happened():
      if self.ended():
        raise Unfit
      time.sleep(0.001)

  def end(self) -> tuple[int, str, str]:
    """Status and output, once it has ended."""
    try:
      _, err = self._process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
      self._process.kill()
      _, err = self._process.communicate()
      return 0, self.said(), f"hung for {PATIENCE} s\n{err}"
    return self._process.returncode, self.said(), err


@dataclasses.dataclass
class Run:
  """A workdir, and with what the program is started on it."""

  workdir: pathlib.Path
  data: pathlib.Path
  settings: dict[str, Any]
  environment: dict[str, str]
  output: pathlib.Path

  def start(
    self,
    *,
    fresh_cache: bool = False,
    limit: str = "unlimited",
    redirection: str = "",
    within: Sequence[str] = (),
    more: Sequence[str] = (),
  ) -> Process:
    """Starts the program.

    Args:
      fresh_cache: whether it compiles everything.
      limit: of the size of its files, in blocks of `ulimit -f`.
      redirection: of its standard streams, as a shell takes it; the status is the program's.
      within: a command that runs the one that follows it.
      more: flags.
    """
    fields = [f"--config.{name}={value}" for name, value in (self.settings | {"data.path": self.data}).items()]
    environment, run = dict(self.environment), '"$@"' if "|" in redirection else 'exec "$@"'
    if fresh_cache:
      environment["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(dir=self.output.parent)
    command = [
      *within, "bash", "-c", f'set -o pipefail; ulimit -f {limit}; {run} {redirection}', "bash",
      sys.executable, "-m", "bbqrec_jax.main",
      f"--config={ROOT / 'configs' / 'quickstart.py'}", f"--workdir={self.workdir}", *fields, *more,
    ]  # fmt: skip
    return Process(command, environment, self.output)

  def start_together(self, count: int, hosts: "Hosts | None" = None) -> list[Process]:
    """Starts the program as several processes that train together, each on a host of its own if there are any."""
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      port = probe.getsockname()[1]
    together = [f"--coordinator={hosts.addresses[0] if hosts else 'localhost'}:{port}", f"--num_processes={count}"]
    return [
      dataclasses.replace(self, output=self.output.with_suffix(f".out{index}")).start(
        within=hosts.inside(index) if hosts else (), more=["--distributed=on", *together, f"--process_id={index}"]
      )
      for index in range(count)
    ]

  def records(self) -> list[dict[str, Any]]:
    """What it has logged, without times."""
    lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "time": 0} for line in lines]


def numbers(workdir: pathlib.Path) -> dict[str, Any]:
  """All that a finished run must agree in with another: metrics, parameters and semantic IDs."""
  results = read_json(workdir / "results.json")
  params = read_params(workdir / "checkpoints" / "recommender", results["best_step"])
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
  compared = {name: value for name, value in results.items() if name not in ("seconds", "data")}
  return compared | {"params": digest.hexdigest(), "ids": SemanticIds.load(workdir / "tokenizer").fingerprint}


class Bench:
  """The run in peace, copies of it, and the book of what became of each fault."""

  def __init__(self, folder: pathlib.Path, *, short: bool, seed: int, count: int = 1):
    """Makes the data, and runs in peace, in one process or several."""
    self.folder, self.rng, self.count, self._made = folder, np.random.default_rng(seed), count, 0
    self.rows: dict[str, dict[str, Any]] = {}
    self.wrong: list[str] = []
    self.seconds = 0.0  # Of a run.
    dataset = make_synthetic(num_users=150, num_items=60)
    data = folder / "data"
    data.mkdir(parents=True)
    for name, features in dataset.features.items():
      np.save(data / f"{name}_features.npy", features)
    (data / "items.jsonl").write_text("".join(json.dumps({"title": title}) + "\n" for title in dataset.titles))
    histories = enumerate(np.split(dataset.interactions.items, dataset.interactions.offsets[1:-1]))
    (data / "sequences.txt").write_text("".join(f"{u} {' '.join(map(str, h))}\n" for u, h in histories))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    if short or count > 1:
      environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    settings = SETTINGS | (SHORT if short or count > 1 else {}) | ({"partitioner": "pmap"} if count > 1 else {})
    self.peace = Run(folder / "peace", data, settings, environment, folder / "peace.out")
    process, *others = self.start(self.peace)
    status, out, err = process.end()
    for other in others:
      other.end()
    if status or err:
      raise RuntimeError(f"the run in peace ended with status {status}\n{out}\n{err}")
    self.numbers, self.logs = numbers(self.peace.workdir), process.logged()
    if short or count > 1:
      return
    # Once more, as all that come find their programs compiled: they must be the same, and take as long.
    again = self.fresh()
    started = time.monotonic()
    status, out, err = again.start().end()
    self.seconds = time.monotonic() - started
    if status or err or numbers(again.workdir) != self.numbers or again.records() != self.peace.records():
      raise RuntimeError(f"two runs in peace differ\n{out}\n{err}")

  def start(self, run: Run, hosts: "Hosts | None" = None) -> list[Process]:
    """Starts a run, in as many processes as all; the first speaks."""
    return run.start_together(self.count, hosts) if self.count > 1 else [run.start()]

  def fresh(self, like: Run | None = None, *, folder: pathlib.Path | None = None) -> Run:
    """A run in a workdir of its own, a copy of another's or empty."""
    self._made += 1
    workdir = (folder or self.folder) / f"run{self._made}"
    if like is not None:
      shutil.copytree(like.workdir, workdir)
    return dataclasses.replace(self.peace, workdir=workdir, output=self.folder / f"{workdir.name}.out")

  def judge(self, fault: str, run: Run, *, log: bool = False) -> str:
    """Gives the command once more and writes down how it ended: survived, refused or wrong.

    Args:
      fault: what had befallen the run.
      run: the run.
      log: whether `metrics.jsonl` must be the same too.
    """
    ends = [process.end() for process in self.start(run)]
    status, out, err = max(end[0] for end in ends), ends[0][1], "".join(end[2] for end in ends)
    lines = err.splitlines()
    if status == 0 and not lines:
      found = numbers(run.workdir)
      differing = [name for name in found if found[name] != self.numbers[name]]
      if log and run.records() != self.peace.records():
        differing.append("metrics.jsonl")
      return self.note(fault, "wrong" if differing else "survived", f"{differing} differ\n{out}")
    clear = status in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")
    return self.note(fault, "refused" if clear else "wrong", f"status {status}\n{out}\n{err}")

  def row(self, fault: str) -> dict[str, Any]:
    """Where a fault is counted."""
    return self.rows.setdefault(fault, {"fault": fault, "injected": 0, "survived": 0, "refused": 0, "wrong": 0})

  def note(self, fault: str, verdict: str, what: str) -> str:
    """Counts one fault."""
    row = self.row(fault)
    row["injected"] += 1
    row[verdict] += 1
    if verdict == "wrong":
      self.wrong.append(f"{fault}: {what}")
    print(f"{fault}: {verdict}", flush=True)
    return verdict

  def not_run(self, fault: str, why: str) -> None:
    """Says that a fault could not be tried here."""
    self.rows[fault] = {"fault": fault, "not_run": why}

  def pick(self, options: Any) -> Any:
    """One of a sequence, at random."""
    return options[int(self.rng.integers(len(options)))]


def moments(bench: Bench, run: Run, process: Process, *, early: bool) -> dict[str, Callable[[], None]]:
  """For each part of a run, a function that returns at a random moment in it.

  Args:
    bench: has the dice.
    run: whose files tell where it is.
    process: whose words tell it.
    early: the first such part of the process, not any of them.
  """

  def rest(seconds: float) -> None:
    time.sleep(float(bench.rng.uniform(0, seconds)))

  def number(among: list[Any]) -> int:
    return 1 if early else int(bench.rng.integers(1, len(among) + 1))

  evaluated = [log for log in bench.logs if log[1] % EVALUATE_EVERY == 0]

  def anywhere() -> None:
    rest(bench.seconds)

  def compilation() -> None:
    process.wait_for(process.said)
    rest(2 * bench.seconds)

  def step() -> None:
    wanted = number(bench.logs)
    process.wait_for(lambda: len(process.logged()) >= wanted)
    rest(0.03)

  def evaluation() -> None:
    wanted = number(evaluated)
    process.wait_for(lambda: sum(step % EVALUATE_EVERY == 0 for _, step in process.logged()) >= wanted)
    rest(0.05)

  def save() -> None:
    def unfinished() -> set[pathlib.Path]:
      return set(run.workdir.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))

    wanted, before, seen = number(evaluated), unfinished(), set[pathlib.Path]()

    def happened() -> bool:
      seen.update(unfinished() - before)
      return len(seen) >= wanted

    process.wait_for(happened)
    rest(0.05)

  def k_means() -> None:
    process.wait_for(lambda: ("tokenizer", WARMUP) in process.logged())
    rest(0.05)

  parts = (anywhere, compilation, step, evaluation, save, k_means)
  return {part.__name__.replace("_", "-"): part for part in parts}


def killed(part: str, signum: int) -> str:
  """What to call a kill."""
  return f"{signal.Signals(signum).name} {'' if part == 'anywhere' else 'during '}{part}"


def kill(bench: Bench, run: Run, part: str, signum: int, *, early: bool = False, second: bool = False) -> None:
  """Starts a run (with `second` once more, when it is underway) and sends it a signal; sees that it ends as it should.

  Raises:
    Unfit: if the run was over before the moment came.
  """
  process = run.start(fresh_cache=part == "compilation")
  try:
    moments(bench, run, process, early=early)[part]()
    if second:
      started_twice(bench, run, process)
  finally:
    begun = bool(process.said())
    process.send(signum)
    status, out, err = process.end()
  if (run.workdir / "results.json").exists():
    raise Unfit
  # While Python loads the program, a signal does what it does to any process.
  expected = {signal.SIGKILL: -9, signal.SIGTERM: 0, signal.SIGINT: 130}[signum]
  clear = signum == signal.SIGKILL or "the same command goes on from here" in out
  if begun and (status != expected or not clear or err):
    bench.note(killed(part, signum), "wrong", f"ended with status {status}\n{out}\n{err}")
    raise Unfit


def kills(bench: Bench, count: int) -> None:
  """Kills runs of their own at random moments, each followed by one that must end well."""
  parts = ["anywhere", "step", "save", "evaluation", "step", "save", "compilation", "anywhere", "evaluation", "k-means"]
  done = tries = 0
  while done < count and tries < 4 * count:
    tries += 1
    part, signum = parts[done % len(parts)], SIGNALS[done % len(SIGNALS)]
    run = bench.fresh()
    with contextlib.suppress(Unfit):
      kill(bench, run, part, signum)
      bench.judge(killed(part, signum), run, log=True)
      done += 1
    shutil.rmtree(run.workdir, ignore_errors=True)


def twice(bench: Bench) -> None:
  """Ctrl-C twice ends a run at once, wherever it is."""
  run = bench.fresh()
  process = run.start()
  with contextlib.suppress(Unfit):
    moments(bench, run, process, early=False)["compilation"]()
  for _ in range(2):
    process.send(signal.SIGINT)
    time.sleep(0.05)
  asked = time.monotonic()
  status, out, err = process.end()
  if (run.workdir / "results.json").exists():
    return
  if status == 130 and time.monotonic() - asked < 5:
    bench.judge("Ctrl-C twice", run, log=True)
  else:
    bench.note("Ctrl-C twice", "wrong", f"status {status}\n{out}\n{err}")


def cut(bench: Bench, stage: str, step: int) -> Run:
  """A run that was stopped in a stage, when it had logged a step."""
  run = bench.fresh()
  process = run.start()
  process.wait_for(lambda: (stage, step) in process.logged())
  process.send(signal.SIGTERM)
  process.end()
  return run


def one_line(status: int, err: str) -> bool:
  """Whether a process said in one line what it could not do."""
  lines = err.splitlines()
  return status == 1 and len(lines) == 1 and lines[0].startswith("error: ")


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kibibytes: int) -> Iterator[Callable[[str], None]]:
  """A disk of its own at `folder`; gives a function that changes its options."""

  def mount(options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True, capture_output=True)

  folder.mkdir()
  subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], check=True)
  try:
    yield mount
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def may_mount(bench: Bench) -> bool:
  """Whether disks can be mounted here."""
  try:
    with small_disk(bench.folder / "probe", 64):
      return True
  except (OSError, subprocess.CalledProcessError):
    (bench.folder / "probe").rmdir()
    return False


def full_disk(bench: Bench) -> None:
  """A run on a disk that fills up at a random place; then there is room."""
  fault = "disk full (tmpfs)"
  needed = sum(path.stat().st_blocks for path in bench.peace.workdir.rglob("*")) // 2
  with small_disk(bench.folder / "disk", int(bench.rng.uniform(8, needed))) as remount:
    run = bench.fresh(folder=bench.folder / "disk")
    status, out, err = run.start().end()
    if not one_line(status, err):
      bench.note(fault, "wrong", f"status {status}\n{out}\n{err}")
      return
    remount("size=64m")
    bench.judge(fault, run, log=True)


def limited_files(bench: Bench) -> None:
  """A run whose files may not grow past a random size; then they may."""
  fault = "file size limit (ulimit -f)"
  largest = max(path.stat().st_size for path in bench.peace.workdir.rglob("*"))
  run = bench.fresh()
  status, out, err = run.start(limit=str(int(bench.rng.uniform(1, largest / 1024)))).end()
  if one_line(status, err):
    bench.judge(fault, run, log=True)
  elif status or err:
    bench.note(fault, "wrong", f"status {status}\n{out}\n{err}")


def read_only(bench: Bench, like: Run | None, fault: str) -> None:
  """A run in a folder that cannot be written to; then it can."""
  root = os.geteuid() == 0
  with small_disk(bench.folder / "disk", 65536) if root else contextlib.nullcontext(None) as remount:
    run = bench.fresh(like, folder=bench.folder / "disk" if root else None)
    run.workdir.mkdir(exist_ok=True)
    folders = [run.workdir, *(path for path in run.workdir.rglob("*") if path.is_dir())]
    if remount:
      remount("ro")
    else:
      for folder in folders:
        folder.chmod(0o500)
    status, out, err = run.start().end()
    if remount:
      remount("rw")
    else:
      for folder in folders:
        folder.chmod(0o700)
    finished = (run.workdir / "results.json").exists()
    if one_line(status, err) or (finished and status == 0 and not err):
      bench.judge(fault, run)
    else:
      bench.note(fault, "wrong", f"status {status}\n{out}\n{err}")


def spoil(bench: Bench, path: pathlib.Path, how: str) -> None:
  """Damages a file: "flipped bit", "cut off" at a random place, or "missing"."""
  content = bytearray(path.read_bytes())
  if how == "missing" or not content:
    path.unlink()
  elif how == "cut off":
    path.write_bytes(content[: int(bench.rng.integers(len(content)))])
  else:
    content[int(bench.rng.integers(len(content)))] ^= 1 << int(bench.rng.integers(8))
    path.write_bytes(content)


def started_twice(bench: Bench, run: Run, process: Process) -> None:
  """Starts a run that is underway once more: the second is told in one line who is there, and writes nothing."""
  fault = "a second start of a run that is underway"
  second = dataclasses.replace(run, output=run.output.with_suffix(".second"))
  process.send(signal.SIGSTOP)
  before = sorted(os.walk(run.workdir))
  status, out, err = second.start().end()
  same = sorted(os.walk(run.workdir)) == before
  process.send(signal.SIGCONT)
  refused = status == 2 and err.count("\n") == 1 and err.startswith("error: ") and same
  bench.note(fault, "refused" if refused else "wrong", f"status {status}, files as before: {same}\n{out}\n{err}")


def underway(bench: Bench) -> None:
  """A run is started a second time amid its steps, and ends well all the same."""
  run = bench.fresh()
  process = run.start()
  with contextlib.suppress(Unfit):
    moments(bench, run, process, early=False)["step"]()
    started_twice(bench, run, process)
  status, out, err = process.end()
  if status or err:
    bench.note("a run whose second start was refused", "wrong", f"status {status}\n{out}\n{err}")
  else:
    bench.judge("a run whose second start was refused", run, log=True)


def oddities(bench: Bench, base: Run) -> None:
  """A run goes on in folders of odd names, in odd environments, and with odd standard streams."""
  for name in NAMES:
    run = bench.fresh(base, folder=bench.folder / name)
    bench.judge("goes on in a folder of an odd name", run)
  for settings in ENVIRONMENTS:
    run = bench.fresh(base)
    run.environment = run.environment | settings
    bench.judge(f"environment: {' '.join(f'{name}={value}' for name, value in settings.items())}", run)
  for redirection in REDIRECTIONS:
    run = bench.fresh(base)
    status, out, err = run.start(redirection=redirection).end()
    told = [line for line in err.splitlines() if line]
    expected = "warning: standard output could not be written: " if redirection == ">/dev/full" else None
    if status or len(told) != (expected is not None) or not all(line.startswith(str(expected)) for line in told):
      bench.note(f"standard streams: {redirection}", "wrong", f"status {status}\n{out}\n{err}")
    else:
      bench.judge(f"standard streams: {redirection}", run)


def circumstances(bench: Bench, count: int) -> None:
  """Second starts, odd names, settings of a shell, and standard streams."""
  for _ in range(max(1, count // 16)):
    underway(bench)
  oddities(bench, cut(bench, "recommender", 45))


HOWS = ("flipped bit", "cut off", "missing")


def damages(bench: Bench, name: str, base: Run, pattern: str, count: int) -> None:
  """Damages one random file a time of those that match, each in a copy of the run."""
  for number in range(count):
    run = bench.fresh(base)
    how = HOWS[number % len(HOWS)]
    spoil(bench, bench.pick(sorted(path for path in run.workdir.glob(pattern) if path.is_file())), how)
    bench.judge(f"{name}: {how}", run)
    shutil.rmtree(run.workdir)


def damaged_data(bench: Bench, base: Run, count: int) -> None:
  """Damages a file of the data that a run goes on with."""
  for number in range(count):
    run = bench.fresh(base)
    run.data = run.workdir.with_suffix(".data")
    shutil.copytree(base.data, run.data)
    how = HOWS[number % len(HOWS)]
    spoil(bench, bench.pick(sorted(run.data.iterdir())), how)
    bench.judge(f"data: {how}", run)


def long(bench: Bench, count: int) -> None:
  """Everything."""
  mounts = may_mount(bench)
  tokenizing, recommending = cut(bench, "tokenizer", 45), cut(bench, "recommender", 45)
  unfinished = bench.fresh(bench.peace)
  (unfinished.workdir / "results.json").unlink()
  fifth = max(1, count // 5)
  damages(bench, "checkpoint of the tokenizer", tokenizing, "checkpoints/tokenizer/**/*", fifth)
  damages(bench, "checkpoint of the recommender", recommending, "checkpoints/recommender/**/*", fifth)
  damages(bench, "checkpoint of a finished training", unfinished, "checkpoints/recommender/**/*", fifth)
  damages(bench, "semantic IDs", recommending, "tokenizer/*", fifth)
  damages(bench, "notes", recommending, "*.json", fifth)
  damages(bench, "results of a finished run", bench.peace, "results.json", fifth // 2)
  damaged_data(bench, recommending, fifth)
  for like, what in ((None, "before a run"), (recommending, "amid a run"), (bench.peace, "after a run")):
    if mounts or os.geteuid():
      read_only(bench, like, f"read-only {what}")
    else:
      bench.not_run(f"read-only {what}", "root, whom rights do not bind, and no leave to mount")
  for _ in range(fifth):
    limited_files(bench)
    if mounts:
      full_disk(bench)
    else:
      bench.not_run("disk full (tmpfs)", "no leave to mount")
  for _ in range(max(1, count // 16)):
    twice(bench)
  circumstances(bench, count)
  kills(bench, count)


def short(bench: Bench) -> None:
  """A few of all, one after the other on one run, whose end tells of them all."""
  run = bench.fresh(folder=bench.folder / NAMES[0])
  faults = ["goes on in a folder of an odd name"]
  for part, signum in (("step", signal.SIGTERM), ("save", signal.SIGKILL), ("evaluation", signal.SIGINT)):
    with contextlib.suppress(Unfit):
      kill(bench, run, part, signum, early=True, second=part == "step")
      faults.append(killed(part, signum))
  checkpoints = [path for path in (run.workdir / "checkpoints" / "recommender").iterdir() if path.name.isdecimal()]
  newest = max(checkpoints, key=lambda path: int(path.name))
  spoil(bench, bench.pick(sorted(newest.glob("state/**/d/*"))), "flipped bit")
  faults.append("checkpoint of the recommender: flipped bit")
  status, out, err = run.start(limit="4").end()
  run.environment = run.environment | ENVIRONMENTS[0]
  faults += ["environment: JAX_ENABLE_X64=1", "file size limit (ulimit -f)"]
  verdict = bench.judge(faults.pop(), run, log=True) if one_line(status, err) else "wrong"
  for fault in faults:
    bench.note(fault, verdict, f"see the last\n{out}\n{err}")


class Hosts:
  """Networks of their own, joined by a bridge: to a process, each is another host. For root alone."""

  def __init__(self, folder: pathlib.Path, count: int):
    """Makes them.

    Raises:
      OSError, subprocess.CalledProcessError: where that is not allowed.
    """
    name = f"f{os.getpid()}"
    self._bridge, self._names = f"{name}br", [f"{name}h{index}" for index in range(count)]
    self.addresses = [f"10.213.0.{index + 1}" for index in range(count)]
    self._known = folder / "hosts"
    self._known.write_text("".join(f"{a} {n}\n" for a, n in zip(self.addresses, self._names, strict=True)))
    try:
      self._ip(f"link add {self._bridge} type bridge", f"link set {self._bridge} up")
      for host, address in zip(self._names, self.addresses, strict=True):
        self._ip(
          f"netns add {host}", f"link add {host} type veth peer name eth0 netns {host}",
          f"link set {host} master {self._bridge} up", f"-n {host} addr add {address}/24 dev eth0",
          f"-n {host} link set lo up", f"-n {host} link set eth0 up",
        )  # fmt: skip
    except BaseException:
      self.close()
      raise

  def _ip(self, *commands: str) -> None:
    for command in commands:
      subprocess.run(["ip", *command.split()], check=True, capture_output=True)

  def inside(self, index: int) -> list[str]:
    """A command that runs another on a host, which knows itself and the others by name."""
    script = f'mount --bind {self._known} /etc/hosts && hostname {self._names[index]} && exec "$@"'
    return ["ip", "netns", "exec", self._names[index], "unshare", "--uts", "bash", "-c", script, "bash"]

  def cut_off(self, index: int) -> None:
    """Takes a host's cable out."""
    self._ip(f"link set {self._names[index]} down")

  def close(self) -> None:
    """Removes them."""
    # What belongs to a network is otherwise removed some time after it.
    links = [f"link del {name}" for name in (*self._names, self._bridge)]
    for command in (*links, *(f"netns del {host}" for host in self._names)):
      with contextlib.suppress(OSError, subprocess.CalledProcessError):
        self._ip(command)


def one_of_several(bench: Bench, run: Run, how: str, part: str, victim: int) -> tuple[str, dict[str, Any]]:
  """Lets something befall one of the processes of a run, and sees what becomes of the others.

  Args:
    bench: of that many processes.
    run: goes on.
    how: "killed", "stopped", "slowed" or "cut off".
    part: see `moments`.
    victim: which of them.

  Returns:
    What was wrong, "" if nothing was, and figures for the table.

  Raises:
    Unfit: if the run was over before the moment came.
  """
  with contextlib.ExitStack() as stack:
    hosts = Hosts(bench.folder, bench.count) if how == "cut off" else None
    if hosts:
      stack.callback(hosts.close)
    together = bench.start(run, hosts)
    stack.callback(lambda: [process.send(signal.SIGKILL) for process in together])
    others = [process for index, process in enumerate(together) if index != victim]
    moments(bench, run, together[0], early=True)[part]()
    if hosts:
      hosts.cut_off(victim)
    else:
      together[victim].send(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    since = time.monotonic()
    if how == "slowed":
      time.sleep(SLOWED)
      together[victim].send(signal.SIGCONT)
    while not all(process.ended() for process in others) and (how == "slowed" or time.monotonic() - since < PATIENCE):
      time.sleep(0.05)
    seconds = time.monotonic() - since
    if how == "stopped":
      together[victim].send(signal.SIGCONT)
    ends = {index: process.end() for index, process in enumerate(together)}
  finished = (run.workdir / "results.json").exists()
  if finished and how != "slowed":
    raise Unfit
  figures = {
    "seconds_of_the_others": round(seconds, 1),
    "statuses": [status for status, _, _ in ends.values()],
    "standard_error": [err.splitlines() for _, _, err in ends.values()],
  }
  if how == "slowed":
    clear = finished and all(status == 0 and not err for status, _, err in ends.values())
  else:
    told = {index: err.splitlines() for index, (_, _, err) in ends.items() if (index, how) != (victim, "killed")}
    clear = seconds < ENDED_WITHIN and all(
      ends[index][0] not in (0, 2) and len(lines) == 1 and re.match("error: process(es)? [0-9]", lines[0])
      for index, lines in told.items()
    )
  return "" if clear else f"the others ended after {seconds:.0f} s\n{ends}", figures


def several(bench: Bench, *, short: bool) -> None:
  """One of several processes is killed, stopped, cut off or slowed, the first and another, in every part of a run.

  Four such things befall one run after the other, and its end tells of them all.
  """
  try:
    Hosts(bench.folder, bench.count).close()
    networks = True
  except (OSError, subprocess.CalledProcessError):
    networks = False
  other, run, endured = bench.count - 1, None, list[str]()
  kinds, parts = ("killed", "stopped", "cut off", "slowed"), ("step", "save", "evaluation")
  faults = [(how, part, victim) for victim in (other, 0) for part in parts for how in kinds]
  for how, part, victim in [("killed", "step", other), ("slowed", "save", 0)] if short else faults:
    fault = f"process {victim} {how} during {part}"
    if how == "cut off" and not networks:
      bench.not_run(fault, "no leave to make networks")
      continue
    for _ in range(4):
      if run is None:
        run = bench.fresh(bench.peace)
        (run.workdir / "results.json").unlink()
        shutil.rmtree(run.workdir / "checkpoints" / "recommender")  # The tokenizer is there already.
      try:
        problem, figures = one_of_several(bench, run, how, part, victim)
        print(f"{fault}: the others ended after {figures['seconds_of_the_others']} s", flush=True)
        bench.row(fault).update(figures)
        if problem:
          bench.note(fault, "wrong", problem)
        else:
          endured.append(fault)
      except Unfit:
        problem = None
      if (run.workdir / "results.json").exists():
        if endured:
          verdict = bench.judge(endured.pop(), run, log=True)
        while endured:
          bench.note(endured.pop(), verdict, "see the one before")
        run = None
      if problem is not None:
        break


def table(rows: list[dict[str, Any]]) -> str:
  """The rows in Markdown."""
  columns = ["injected", "survived", "refused", "wrong"]
  columns += ["seconds_of_the_others"] if any("seconds_of_the_others" in row for row in rows) else []
  lines = [f"| fault | {' | '.join(columns)} |".replace("_", " "), "|---" * (1 + len(columns)) + "|"]
  for row in rows:
    figures = [str(row.get(name, "")) for name in columns]
    if "not_run" in row:
      figures[0] = f"not run: {row['not_run']}"
    lines.append(f"| {row['fault']} | {' | '.join(figures)} |")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Does it all, prints the table and writes the rows."""
  del argv
  logging.set_verbosity(logging.FATAL)
  jax.config.update("jax_platforms", "cpu")  # The processes that are broken may need the accelerator.
  options = flags.FLAGS
  started = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    bench = Bench(pathlib.Path(folder), short=options.short, seed=options.seed, count=options.processes)
    if options.processes > 1:
      several(bench, short=options.short)
    elif options.short:
      short(bench)
    elif options.circumstances:
      circumstances(bench, options.count)
    else:
      long(bench, options.count)
    rows = list(bench.rows.values())
    total = collections.Counter()
    for row in rows:
      total.update({name: value for name, value in row.items() if isinstance(value, int)})
    rows.append({"fault": "all", **{name: total[name] for name in ("injected", "survived", "refused", "wrong")}})
    print(table(rows))
    for what in bench.wrong:
      print(f"\nWRONG {what}", file=sys.stderr)
    write_json(options.output, {"rows": rows, "seconds": time.monotonic() - started})
    sys.exit(1 if bench.wrong else 0)


if __name__ == "__main__":
  define_path("output", "The JSON file.", check=check_output)
  flags.DEFINE_bool("short", False, "A few faults on one run.")
  flags.DEFINE_bool("circumstances", False, "Only second starts, odd names, a shell's settings and standard streams.")
  flags.DEFINE_integer("count", 50, "Kills of the long form; the other faults are in proportion.")
  flags.DEFINE_integer("processes", 1, "Of the run; more than one: only what may befall one of several.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of the moments and places.")
  flags.mark_flags_as_required(["output"])
  start(main)
