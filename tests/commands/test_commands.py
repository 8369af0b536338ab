"""The console script: one word names a program, and what it says of itself costs no import of JAX."""

import runpy
import subprocess
import sys

import pytest

from bbqrec_jax import commands
from bbqrec_jax.commands.train import format_fields
from bbqrec_jax.config import RunSettings, default_config
from bbqrec_jax.utils.settings import flatten

HELP = """
import os, sys
from bbqrec_jax.commands import COMMANDS, call
for command in COMMANDS:
  if os.fork():
    os.wait()
    continue
  call(command, ["--help"])  # An end without an error is an end of the streams, and not of the process.
  os.write(1, f"done {'jax' in sys.modules}".encode())
  os._exit(0)
"""


def test_help_shows_an_example_and_does_not_import_jax():
  shown = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, timeout=120).stdout
  for command in commands.COMMANDS:
    assert f"    bbqrec {command} " in shown
  assert shown.count("done False") == len(commands.COMMANDS)


def run(monkeypatch, capsys, *words):
  monkeypatch.setattr(sys, "argv", ["bbqrec", *words])
  try:
    commands.main()
  except SystemExit as end:
    return end.code, *capsys.readouterr()
  return 0, *capsys.readouterr()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_without_a_command_they_are_listed(monkeypatch, capsys, words):
  status, out, _ = run(monkeypatch, capsys, *words)
  assert status == 0
  assert all(f"  {command} " in out for command in commands.COMMANDS)


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
  status, out, err = run(monkeypatch, capsys, "trian", "--workdir=x")
  assert (status, out) == (2, "")
  (line,) = err.splitlines()
  assert "did you mean train?" in line


def test_every_field_is_explained():
  lines = format_fields(RunSettings()).splitlines()
  assert {line.split(" = ")[0] for line in lines[::2]} == set(flatten(default_config()))
  assert any(line.startswith("partitioner = 'pmap'  (pmap, mesh, single)") for line in lines)
  assert all(line.startswith("    ") and line.strip() for line in lines[1::2])


@pytest.mark.parametrize(
  ("module", "command"),
  [("main", "train"), *((name, name) for name in ("recommend", "assign", "export", "benchmark"))],
)
def test_modules_of_the_first_commands_are_these(module, command, monkeypatch):
  called = []
  monkeypatch.setattr(commands, "call", lambda *arguments: called.append(arguments))
  monkeypatch.setattr(sys, "argv", ["python -m", "--workdir=a"])
  runpy.run_module(f"bbqrec_jax.{module}", run_name="__main__")
  assert called == [(command, ["--workdir=a"])]
