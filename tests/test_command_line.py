"""The programs as a shell meets them: bad input is one line on stderr, a status that is not 0, and nothing written."""

import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest
from absl import flags
from ml_collections import config_flags

from bbqrec_jax.command_line import define_path, define_run_flags, parse_flags, training, writing
from bbqrec_jax.commands import recommend
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import Diverged, InputError, StorageError
from bbqrec_jax.utils.files import check_output
from bbqrec_jax.utils.messages import say
from bbqrec_jax.utils.signals import Interrupted

ROOT = pathlib.Path(__file__).parents[1]


def call(command, *arguments):
  return subprocess.run(
    [sys.executable, "-m", "bbqrec_jax", command, *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )


@pytest.mark.parametrize(
  ("config", "arguments", "named"),
  [
    ("directory.py", ["--config.data.path=no/such/folder"], "no/such/folder"),
    ("quickstart.py", ["--config.recommender.head=nosuch"], "recommender.head"),
    ("quickstart.py", ["--config.recommender.steps=abc"], "--config.recommender.steps=abc: expected an integer"),
    ("quickstart.py", ["--workdir=/proc/nope"], "--workdir=/proc/nope cannot be made: "),
  ],
)
def test_bad_input_is_one_line(tmp_path, config, arguments, named):
  workdir = tmp_path / "run"
  result = call("train", f"--config=configs/{config}", f"--workdir={workdir}", *arguments)
  assert result.returncode not in (0, None)
  lines = result.stderr.splitlines()
  assert len(lines) == 1, result.stderr
  assert lines[0].startswith("error: ")
  assert named in lines[0]
  assert not workdir.exists()


@pytest.fixture
def parse():
  """A function that parses flags as a program does that has a config and a few others: arguments -> flags."""
  before = set(flags.FLAGS)

  def run(*arguments):
    argv = ["program", *map(str, arguments)]
    config_flags.DEFINE_config_file("config", sys_argv=argv)
    define_run_flags()
    flags.DEFINE_integer("top", 10, "A number.")
    flags.DEFINE_bool("repeat", False, "A choice.")
    define_path("output", "A file.", check=check_output)
    assert parse_flags(argv) == ["program"]
    return flags.FLAGS

  yield run
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


FIELD = """
from bbqrec_jax.config import default_config

def get_config():
  config = default_config()
  config.recommender.stepz = 3
"""


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--workdir=x", "--top=abc"], "--top=abc: expected an integer; --help lists the flags"),
    (["--workdir=x", "--repeat=abc"], "--repeat=abc: expected true or false; --help lists the flags"),
    (["--workdir=x", "--tpo=3"], "Unknown command line flag 'tpo'. Did you mean: top; --help lists the flags"),
    (["--workdir=x", "y"], "unexpected argument 'y': every argument is a flag, --name=value; --help lists them"),
    (["--workdir="], "--workdir=: expected a path, got nothing"),
    (
      ["--workdir=x", "--data=file:///a"],
      "--data=file:///a: expected a path, got a URL; give the path alone, --data=/a",
    ),
    (["--workdir=x", "--output=/"], "--output=/: expected the name of what is to be made, got a folder that is there"),
    ([], "--workdir is needed; --help lists the flags"),
  ],
)
def test_a_wrong_flag_is_one_line(parse, capsys, arguments, said):
  with pytest.raises(SystemExit) as end:
    parse(*arguments)
  assert end.value.code == 2
  assert capsys.readouterr() == ("", f"error: {said}\n")


@pytest.mark.parametrize(
  ("config", "fields", "said"),
  [
    ("configs/quickstart.py:dense", [], "{}: configs/quickstart.py offers no choices, got 'dense'; give --config=conf"),
    ("configs/directory.py:hybird", [], "{}: expected one of generative, dense, parallel, hybrid, sasrec, sasrec_feat"),
    ("configs/beauty.py:hybird", [], "{}: expected one of generative, dense, parallel, hybrid, sasrec, sasrec_feature"),
    ("configs/tiger.py:nosuch", [], "{}: 'nosuch' is neither a field nor a choice that the file offers"),
    (
      "configs/benchmark.py",
      ["--config.nosuch=3"],
      "{}: 'nosuch' is neither a field nor a choice that the file offers",
    ),
    ("configs/quickstart.py", ["--config.recommender.dropout=abc"], ".recommender.dropout=abc: expected a number; --h"),
    ("configs/quickstart.py", ["--config.recommender.cross_pairs=abc"], ".recommender.cross_pairs=abc: expected true"),
    ("configs/nosuch.py", [], "configs/nosuch.py: expected a config file, found nothing; check the path"),
    ("configs:x/y.py", [], "configs: expected a config file before the first ':', which begins its choice, found a fo"),
    ("gs://configs/x.py:dense", [], "{}: expected a path, got a URL, and only mounted file systems are read"),
    ("configs", [], "configs: expected a config file, found a folder; put a regular file there"),
    ("\nimport nosuch", [], "{} cannot be used: ModuleNotFoundError: No module named 'nosuch' (line 2)"),
    ("def get_config(:", [], "{} cannot be used: SyntaxError: invalid syntax (own.py, line 1)"),
    ("def get_config():\n  return 3", [], "{} cannot be used: AttributeError: 'int' object has no attribute 'items'"),
    (
      FIELD,
      [],
      '{} cannot be used: AttributeError: Key "stepz" does not exist and cannot be added since the config is',
    ),
    ("1 / 0", [], "{} cannot be used: ZeroDivisionError: division by zero (line 1)"),
  ],
)
def test_a_config_that_cannot_be_used_is_one_line(parse, capsys, monkeypatch, tmp_path, config, fields, said):
  if "configs" not in config:
    (tmp_path / "own.py").write_text(config)
    config = tmp_path / "own.py"
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as end:
    parse("--workdir=x", f"--config={config}", *fields)
  assert end.value.code == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert len(err.splitlines()) == 1, err
  assert err.startswith("error: " + ("--config" if said[0] in ".{" else "") + said.format(f"={config}")), err


@pytest.mark.parametrize(
  ("written", "names"),
  [
    ("text", ("text",)),
    ("text,image", ("text", "image")),
    (" text, image ", ("text", "image")),
    ("text,", ("text",)),
    ("", ()),
    ("()", ()),
    ("[]", ()),
    ("(text,image)", ("text", "image")),
    ("[text, image]", ("text", "image")),
    ("('text','image')", ("text", "image")),
    ('["text", "image"]', ("text", "image")),
    ("('text',)", ("text",)),
    ("'text'", ("text",)),
    ("'text',image", ("text", "image")),
    ("('a, b',)", ("a, b",)),
    ("long name", ("long name",)),
    ("a-b/c", ("a-b/c",)),
    ("a(b)", ("a(b)",)),
    ("текст,1st", ("текст", "1st")),
  ],
)
def test_a_field_of_several_names_takes_them_as_people_write_them(parse, monkeypatch, written, names):
  monkeypatch.chdir(ROOT)
  options = parse("--workdir=x", "--config=configs/directory.py", f"--config.data.modalities={written}")
  assert options.config.data.modalities == names


def test_a_field_of_several_takes_numbers_repeats_and_words_of_their_own(parse, monkeypatch):
  monkeypatch.chdir(ROOT)
  options = parse(
    "--workdir=x", "--config=configs/directory.py", "--config.tokenizer.hidden=64,32",
    "--config.recommender.length_buckets", "5,10", "--config.recommender.similarity=fused",
    "--config.recommender.similarity=modalities", "--config.recommender.item_inputs=item,features",
  )  # fmt: skip
  config = options.config
  assert (config.tokenizer.hidden, config.recommender.length_buckets) == ((64, 32), (5, 10))
  assert config.recommender.similarity == ("fused", "modalities")
  assert config.recommender.item_inputs == ("item", "features")


@pytest.mark.parametrize("written", ["{'a': 1}", "(['a'],)", "None", "(1, None)"])
def test_a_field_of_several_refuses_what_is_neither_name_nor_number(parse, monkeypatch, capsys, written):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as end:
    parse("--workdir=x", "--config=configs/directory.py", f"--config.tokenizer.hidden={written}")
  assert end.value.code == 2
  err = capsys.readouterr().err
  assert "--config.tokenizer.hidden=" in err
  assert "expected names or numbers, separated by commas" in err


def test_flags_that_are_right_are_parsed_and_paths_may_begin_at_home(parse, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "own.py").write_text((ROOT / "configs" / "directory.py").read_text())
  options = parse("--workdir=~/run", "--config=~/own.py:dense", "--config.recommender.steps=7", "--top=3", "--norepeat")
  assert options.workdir == tmp_path / "run"
  assert (options.data, options.top, options.repeat) == (None, 3, False)
  assert (options.config.recommender.head, options.config.recommender.steps) == ("dense", 7)


@pytest.mark.parametrize("words", [["--config=dense"], ["--config", "dense"], ["-config=dense"]])
def test_a_preset_is_known_by_its_name(parse, monkeypatch, tmp_path, words):
  monkeypatch.chdir(tmp_path)
  options = parse(*words, "--workdir=dense", "--config.recommender.steps=7")
  assert (options.config.recommender.head, options.config.recommender.steps) == ("dense", 7)
  assert options.workdir == pathlib.Path("dense")


def test_a_name_that_is_neither_preset_nor_file_is_one_line(parse, capsys):
  with pytest.raises(SystemExit):
    parse("--config=hybird", "--workdir=x")
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(
    "error: --config=hybird: expected a config file or a preset, found neither; did you mean hybrid"
  )


def test_odd_names_are_parsed_and_shown(parse, monkeypatch, tmp_path):
  folder = tmp_path / "[a]*\n\udcff"
  folder.mkdir()
  (folder / "o n'.py").write_text((ROOT / "configs" / "directory.py").read_text())
  out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", out)
  options = parse(f"--workdir={folder}", f"--config={folder}/o n'.py:dense", f"--config.data.path={folder}")
  assert (options.workdir, options.config.data.path) == (folder, str(folder))
  say(f"{options.workdir} \u00e9")
  assert out.buffer.getvalue() == f"{tmp_path}/[a]*\n\\udcff \\xe9\n".encode()


def test_an_unknown_config_field_is_named(tmp_path):
  workdir = tmp_path / "run"
  result = call("train", "--config=configs/quickstart.py", f"--workdir={workdir}", "--config.recommender.nosuch=1")
  assert result.returncode != 0
  assert "Traceback" not in result.stderr, result.stderr
  assert "nosuch" in result.stderr
  assert not workdir.exists()


def test_recommending_from_no_run_is_one_line(tmp_path):
  result = call("recommend", f"--workdir={tmp_path}", "--history=1,2")
  assert result.returncode != 0
  assert result.stderr.splitlines() == [
    f"error: {tmp_path}/config.json does not exist: --workdir must be that of a run of bbqrec train"
  ]
  assert result.stdout == ""
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("given", "said"),
  [
    ({"history": "1", "top": 0}, "--top must be at least 1, got 0"),
    ({}, "give one of --history=3,17,256, --user=ID"),
    ({"history": "1", "user": "u"}, "give one of --history=3,17,256, --user=ID"),
    ({"history": "1", "histories": "h"}, "give one of --history=3,17,256, --user=ID"),
    ({"histories": "h"}, "--output=FILE goes with --histories=FILE"),
    ({"history": "1", "output": "o"}, "--output=FILE goes with --histories=FILE"),
    ({"history": "1", "timestamps": "t"}, "--timestamps: --times goes with --history"),
    ({"histories": "h", "output": "o", "times": "1"}, "--times: --times goes with --history"),
    ({"histories": "h", "output": "no/such/folder/o"}, "no/such/folder is no folder"),
    ({"histories": "h", "output": "."}, ". exists already"),
  ],
)
def test_flags_of_recommend_that_do_not_go_together(given, said):
  nothing = dict.fromkeys(("history", "user", "titles", "histories", "times", "timestamps", "output"))
  given = {name: pathlib.Path(value) if name == "output" else value for name, value in given.items()}
  with pytest.raises(InputError, match=re.escape(said)):
    recommend.check_options(types.SimpleNamespace(**({"top": 10} | nothing | given)))


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(
  ("unit", "times", "seconds"),
  [
    ("seconds", "1433221332 1433221392.5", [1433221332, 1433221392.5]),
    ("milliseconds", "1433221332000 1433221392500", [1433221332, 1433221392.5]),
    ("milliseconds", "0 60500", [0, 60.5]),
    ("seconds", "1433221332000 1433221392500", "expected seconds, as the times of the data"),
    ("nanoseconds", "1433221332 1433221392", "expected nanoseconds, as the times of the data"),
    ("seconds", "1433221332 1433221392000", "expected times of one unit, got 1433221392000 where"),
  ],
)
def test_recommend_takes_times_in_the_unit_of_the_data(tmp_path, many, unit, times, seconds):
  options = dict.fromkeys(("history", "user", "titles", "histories", "times", "timestamps"))
  dataset = types.SimpleNamespace(item_ids=ItemIds.numbered(4), time_unit=unit)
  if many:
    options |= {"histories": tmp_path / "histories.txt", "timestamps": tmp_path / "times.txt"}
    options["histories"].write_text("ann 3 1\nbob 0 2\n")
    options["timestamps"].write_text(f"ann {times}\nbob {times}\n")
  else:
    options |= {"history": "3,1", "times": times.replace(" ", ",")}
  options = types.SimpleNamespace(**options)
  if isinstance(seconds, list):
    histories = recommend.asked_for(options, dataset)
    assert histories.items.tolist() == [3, 1, 0, 2][: len(histories.items)]
    assert histories.times.tolist() == seconds * (1 + many)
    return
  with pytest.raises(InputError) as error:
    recommend.asked_for(options, dataset)
  assert seconds in str(error.value)
  assert str(error.value).startswith(f"{tmp_path}/times.txt line 1: " if many else "--times entry ")


def test_an_export_of_no_run_or_onto_something_is_one_line(tmp_path):
  for arguments, said in (
    ([f"--workdir={tmp_path}", f"--output={tmp_path}"], f"{tmp_path} exists already: choose another --output"),
    ([f"--workdir={tmp_path}", f"--output={tmp_path}/new"], f"{tmp_path}/config.json does not exist"),
    ([f"--workdir={tmp_path}", f"--output={tmp_path}/new", "--platforms=cpu,abacus"], "got ['abacus']"),
  ):
    result = call("export", *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


def test_a_server_of_no_bundle_is_one_line(tmp_path):
  (tmp_path / "token").write_text("two words", encoding="utf-8")
  for arguments, said in (
    ([f"{tmp_path}/none"], f"{tmp_path}/none/bundle.json: expected a JSON file, found nothing"),
    ([f"{tmp_path}", f"--token_file={tmp_path}/token"], "expected a token of printable ASCII"),
  ):
    program = [sys.executable, "-c", "from bbqrec_jax.commands import main; main()", "serve"]
    result = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert said in line


@pytest.fixture
def parsed():
  """absl's own flags, as a program has them."""
  flags.FLAGS(["program"])
  yield
  flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
  ("error", "status", "said"),
  [
    (InputError("bad\nfield"), 2, "error: bad field\n"),
    (StorageError("no disk"), 1, "error: no disk\n"),
    (Diverged("nan"), 1, "error: nan\n"),
    (
      OSError(28, "No space left on device"),
      1,
      "error: runs/x: could not write what a run leaves there: No space left on device; mend that, and the same command"
      " goes on from the last checkpoint\n",
    ),
    (
      PermissionError(13, "Permission denied", "runs/x/run.json"),
      1,
      "error: runs/x: could not write what a run leaves there: Permission denied (runs/x/run.json); mend that, and the"
      " same command goes on from the last checkpoint\n",
    ),
    (Interrupted(signal.SIGTERM), 0, ""),
    (Interrupted(signal.SIGINT), 130, ""),
    (KeyboardInterrupt(), 130, ""),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_whatever_ends_a_training_is_one_line_and_a_status(parsed, capsys, error, status, said):
  with pytest.raises(SystemExit) as end, training(pathlib.Path("runs/x")):
    raise error
  assert end.value.code == status
  out, err = capsys.readouterr()
  assert err == said
  if isinstance(error, Interrupted):
    assert out == f"stopped by {error}, everything is saved; the same command goes on from here\n"


class Finaliser:
  """Python cannot raise what a signal raises while it is called."""

  def __del__(self):
    os.kill(os.getpid(), signal.SIGINT)


class Faulty:
  def __del__(self):
    raise ValueError("bug")


def test_what_python_tells_of_dropped_objects_is_left_out_where_it_is_dealt_with(parsed, capsys, monkeypatch):
  monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

  def work():
    with training(pathlib.Path("runs/x")):
      Finaliser()

  with pytest.raises(SystemExit) as end:
    work()
  assert end.value.code == 130
  assert capsys.readouterr() == ("stopped by SIGINT, everything is saved; the same command goes on from here\n", "")
  # Other errors that nobody can catch are still told.
  Faulty()
  assert "ValueError: bug" in capsys.readouterr().err


def test_an_error_of_the_program_itself_keeps_its_traceback(parsed):
  for error in (ValueError("bug"), FileNotFoundError(2, "No such file")):
    with pytest.raises(type(error)), training(pathlib.Path("runs/x")):
      raise error


def test_a_place_that_cannot_be_written_to_is_one_line(capsys):
  with pytest.raises(SystemExit) as end, writing(pathlib.Path("runs/x")):
    raise NotADirectoryError(20, "Not a directory", "runs")
  assert end.value.code == 1
  assert capsys.readouterr().err == "error: runs/x could not be written: Not a directory\n"
