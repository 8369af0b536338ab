"""One start of a run at a time in a workdir: held by a process, as long as that lives."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

import bbqrec_jax
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils import lock, processes
from bbqrec_jax.utils.lock import locked

# Another process that holds the lock, without what takes seconds to import; it has a child that outlives it.
HOLDER = """
import os, pathlib, sys, time, types
names = ("bbqrec_jax", "bbqrec_jax.utils", "bbqrec_jax.utils.processes", "bbqrec_jax.utils.messages")
package, utils, processes, messages = (sys.modules.setdefault(name, types.ModuleType(name)) for name in names)
package.__path__, utils.__path__, utils.processes = [sys.argv[1]], [sys.argv[1] + "/utils"], processes
processes.is_first, processes.text_of_the_first, messages.warn = lambda: True, lambda text: text, print
from bbqrec_jax.utils.lock import locked
with locked(pathlib.Path(sys.argv[2])):
  child = os.fork()
  if not child:
    os.close(1)
    time.sleep(60)
    os._exit(0)
  print(child, flush=True)
  sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder):
  """Another process that holds a folder, and the number of its child."""
  command = [sys.executable, "-c", HOLDER, os.path.dirname(bbqrec_jax.__file__), str(folder)]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
    child = int(process.stdout.readline())
    try:
      yield process, child
    finally:
      process.kill()
      os.kill(child, signal.SIGKILL)


def refusal(folder):
  with pytest.raises(InputError) as error, locked(folder):
    pass
  return str(error.value)


def test_whoever_comes_second_is_told_who_is_there_until_that_is_killed(tmp_path):
  with holder(tmp_path) as (process, child):
    before = sorted(os.walk(tmp_path)), (tmp_path / "lock").read_text()
    said = refusal(tmp_path)
    for fact in (str(tmp_path), f"process {process.pid} ", f" on {os.uname().nodename} ", " since 2", "--workdir"):
      assert fact in said
    process.send_signal(signal.SIGSTOP)
    assert refusal(tmp_path) == said, "one that is stopped goes on some time"
    assert (sorted(os.walk(tmp_path)), (tmp_path / "lock").read_text()) == before
    process.kill()
    process.wait()
    os.kill(child, 0)  # Its child is there still.
    with locked(tmp_path):
      pass


def test_a_process_frees_a_folder_at_its_end_however_it_ends(tmp_path):
  def interrupted():
    assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt), locked(tmp_path):
    interrupted()
  assert (tmp_path / "lock").read_text() == ""
  with holder(tmp_path) as (process, _):
    process.communicate()
  with locked(tmp_path), locked_elsewhere(tmp_path):
    pass


@contextlib.contextmanager
def locked_elsewhere(folder):
  (folder / "other").mkdir()
  with locked(folder / "other"):
    yield


def test_a_second_thread_is_refused_by_whatever_name_and_costs_nothing(tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "link").symlink_to("run")
  said = []
  with locked(tmp_path / "run"):
    thread = threading.Thread(target=lambda: said.append(refusal(tmp_path / "link")))
    thread.start()
    thread.join()
    assert f"process {os.getpid()} " in said[0]
    # To look at the file would have given up the lock: another process still finds it.
    command = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", command, tmp_path / "run" / "lock"], capture_output=True, check=False)
    assert b"BlockingIOError" in other.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_and_used(tmp_path, monkeypatch, capsys, number):
  def lockf(*arguments):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, "lockf", lockf)
  with locked(tmp_path):
    assert refusal(tmp_path), "within the process it counts all the same"
  out = capsys.readouterr().out
  assert out.startswith(f"warning: {tmp_path}: ")
  assert os.strerror(number) in out


@pytest.mark.parametrize(("number", "raised"), [(errno.EACCES, InputError), (errno.EIO, OSError)])
def test_what_else_a_file_system_answers(tmp_path, monkeypatch, number, raised):
  def lockf(*arguments):
    raise OSError(number, os.strerror(number))

  (tmp_path / "lock").write_bytes(b"\xff")  # Whoever holds it may be about to write.
  monkeypatch.setattr(fcntl, "lockf", lockf)
  with pytest.raises(raised), locked(tmp_path):
    pass
  assert not lock._held


def test_all_processes_of_a_run_end_if_the_first_is_refused(tmp_path, monkeypatch):
  told = []

  def share(text):
    told.append(text)
    return "taken"

  monkeypatch.setattr(processes, "text_of_the_first", share)
  with locked_by_this(tmp_path), pytest.raises(InputError, match="taken"), locked(tmp_path):
    pass
  assert "is taken" in told[0]
  monkeypatch.setattr(processes, "is_first", lambda: False)
  with pytest.raises(InputError, match="taken"), locked(tmp_path / "no such folder"):
    pass
  assert told[1] == ""
  monkeypatch.setattr(processes, "text_of_the_first", lambda text: "")
  with locked(tmp_path / "no such folder"):
    pass


@contextlib.contextmanager
def locked_by_this(folder):
  lock._held[os.path.realpath(folder)] = "this"
  yield
  del lock._held[os.path.realpath(folder)]


def test_text_reaches_all_processes_whole(monkeypatch):
  assert processes.text_of_the_first("товар") == "товар"
  monkeypatch.setattr(processes, "several", lambda: True)
  monkeypatch.setattr(processes, "of_the_first", lambda array: array)
  for text in ("", "товар is taken 🔒"):
    assert processes.text_of_the_first(text) == text
