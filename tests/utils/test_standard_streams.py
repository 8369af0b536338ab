"""Programs print to whatever there is: closed descriptors, pipes without a reader, full disks, ASCII."""

import errno
import io
import os
import subprocess
import sys

import pytest

import bbqrec_jax
from bbqrec_jax.training import logging
from bbqrec_jax.utils import messages
from bbqrec_jax.utils.standard_streams import lasting, lasting_streams

# A program that prints as ours do, without what takes them seconds to import.
PROGRAM = """
import contextlib, os, sys, types
package = types.ModuleType("bbqrec_jax")
package.__path__ = [sys.argv[1]]
sys.modules["bbqrec_jax"] = package
from bbqrec_jax.utils.standard_streams import lasting_streams
with lasting_streams(needed=sys.argv[2] == "needed"):
  for number in range(2000):
    print("товар ±", number)
  print("что", file=sys.stderr)
  with open(sys.argv[3], "w") as file:  # Must not get the number of a standard stream.
    for descriptor in (1, 2):  # As libraries in C do, which look at no error: a reader may leave at any moment.
      with contextlib.suppress(BrokenPipeError):
        os.write(descriptor, b"library\\n")
    file.write(f"done, descriptor {file.fileno() > 2}, columns {os.environ.get('COLUMNS')}, input {sys.stdin.read()!r}")
  sys.exit(0)
"""


def _without_columns():
  """The environment without a terminal's width, which whoever starts the tests may have told."""
  return {name: value for name, value in os.environ.items() if name != "COLUMNS"}


def call(tmp_path, redirections, *, needed="needed", **environment):
  """Runs PROGRAM in a shell: (status, standard error, what it wrote into its file)."""
  (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
  result = subprocess.run(
    ["bash", "-c", f'set -o pipefail; "$@" {redirections}', "bash", sys.executable, "program.py",
     os.path.dirname(bbqrec_jax.__file__), needed, "file"],
    cwd=tmp_path, env=_without_columns() | {"PYTHONIOENCODING": "utf-8"} | environment, stdin=subprocess.DEVNULL,
    capture_output=True, check=False, timeout=60,
  )  # fmt: skip
  return result.returncode, result.stderr.decode(), (tmp_path / "file").read_text()


def done(columns=None):
  return f"done, descriptor True, columns {columns}, input ''"


@pytest.mark.parametrize("needed", ["needed", "not"])
@pytest.mark.parametrize("redirections", [">&-", "2>&- >/dev/null", "<&- >&- 2>&-", "| head -1", "</dev/null | true"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stream_that_nobody_has_or_reads_ends_nothing(tmp_path, redirections, needed, unbuffered):
  status, err, written = call(tmp_path, redirections, needed=needed, PYTHONUNBUFFERED=unbuffered)
  assert (status, written) == (0, done())
  assert "Traceback" not in err
  assert "rror" not in err


def test_a_full_disk_is_told_once_and_is_a_failure_where_the_print_was_the_point(tmp_path):
  status, err, written = call(tmp_path, ">/dev/full")
  assert (status, written) == (1, done())
  assert err.splitlines()[-1] == "error: standard output could not be written: No space left on device"
  status, err, written = call(tmp_path, ">/dev/full", needed="not")
  assert (status, written) == (0, done())
  assert err.splitlines()[-1].startswith("warning: standard output could not be written: No space left on device")
  assert call(tmp_path, ">/dev/full 2>/dev/full", needed="not")[0] == 0


@pytest.mark.parametrize("environment", [
  {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
  {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
])  # fmt: skip
def test_what_an_encoding_lacks_is_escaped(tmp_path, environment):
  status, err, written = call(tmp_path, ">out", **environment)
  assert (status, written) == (0, done())
  assert r"\u0447\u0442\u043e" in err


@pytest.mark.parametrize(("columns", "seen"), [("1", "20"), ("200", "200"), ("0", "0")])
def test_a_terminal_is_never_narrower_than_a_line(tmp_path, columns, seen):
  assert call(tmp_path, ">/dev/null", COLUMNS=columns) == (0, "что\nlibrary\n", done(seen))


def test_a_chosen_way_with_lacking_characters_is_kept(tmp_path):
  for errors, expected in (("replace", b"?"), ("strict", rb"\u0434"), ("surrogateescape", rb"\u0434")):
    with open(tmp_path / "out", "w", encoding="ascii", errors=errors) as file:
      stream, raw = lasting(file)
      print("д", file=stream)
    assert (tmp_path / "out").read_bytes() == expected + b"\n"
    assert raw.lost is None


def test_a_stream_tells_of_its_first_error_and_takes_all_that_follows():
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as file:
    stream, raw = lasting(file)
    for _ in range(3):
      print("x" * 100_000, file=stream)
    stream.flush()
  assert raw.lost.errno == errno.EPIPE


def test_streams_of_somebody_else_are_left_alone(monkeypatch):
  mine = io.StringIO()
  monkeypatch.setattr(sys, "stdout", mine)
  monkeypatch.setattr(sys, "stderr", mine)
  with lasting_streams():
    assert sys.stdout is sys.stderr is mine
  with pytest.raises(SystemExit) as end, lasting_streams():
    sys.exit(3)
  assert end.value.code == 3


class Full(io.StringIO):
  def write(self, text):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_speaks_to_nobody_if_nobody_is_there(monkeypatch):
  closed = io.StringIO()
  closed.close()
  for nobody in (None, closed, Full()):
    monkeypatch.setattr(sys, "stdout", nobody)
    messages.say("hello")
    messages.warn("hello")
    logging.Progress("stage", total=3, done=0).report({"loss": 1.0})


def test_a_run_escapes_what_the_output_lacks(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
  messages.say("товар")
  assert raw.getvalue() == rb"\u0442\u043e\u0432\u0430\u0440" + b"\n"
