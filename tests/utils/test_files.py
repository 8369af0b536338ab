"""Files from anywhere: what is read of them, what is refused, and how little memory a refusal takes."""

import contextlib
import functools
import gzip
import json
import os
import pathlib
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.features import load_modality, load_new_items
from bbqrec_jax.data.recbole import load_recbole
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import (
  check_file,
  check_links,
  check_new,
  check_output,
  check_place,
  local_path,
  open_array,
  plain_path,
  read_archive,
  read_array,
)
from bbqrec_jax.utils.json_files import read_json, write_json

ARRAYS = {
  "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
  "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
  "big-endian": np.arange(3, dtype=">f8"),
  "flags": np.array([True, False]),
  "scalar": np.array(3, np.int64),
  "empty": np.zeros((0, 4), np.float16),
}


def npy(descr, shape, data=b"", version=(1, 0)):
  header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
  return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version[0] == 1 else "<I", len(header)) + header + data


def refusal(call, *parts):
  with pytest.raises(InputError) as error:
    call()
  message = str(error.value)
  assert message.isprintable()
  assert all(str(part) in message for part in parts), message


@contextlib.contextmanager
def little_memory():
  """Fails if what is done inside ever holds more than 4 MiB, whether it is touched or not."""
  tracemalloc.start()
  try:
    yield
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 2**22


@pytest.mark.parametrize("name", ARRAYS)
def test_what_numpy_saves_is_read(tmp_path, name):
  array = ARRAYS[name]
  np.save(tmp_path / "a.npy", array)
  for read in (open_array, read_array):
    assert_array_equal(read(tmp_path / "a.npy"), array, strict=True)
  assert read_array(tmp_path / "a.npy").flags.writeable
  assert isinstance(open_array(tmp_path / "a.npy"), np.memmap) == bool(array.size)


def test_an_archive_that_numpy_saves_is_read(tmp_path):
  np.savez(tmp_path / "a.npz", **ARRAYS)
  read = read_archive(tmp_path / "a.npz")
  assert read.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert_array_equal(read[name], array, strict=True)
  np.savez(tmp_path / "none.npz")
  assert read_archive(tmp_path / "none.npz") == {}


@pytest.mark.parametrize(
  "content",
  [
    npy("<f4", "(1000000000000, 768)", bytes(64)),
    npy("<f4", "(4294967296, 4294967296)", b""),
    npy("<f4", "(-4, -4)", bytes(64)),
    npy("<f4", "(1,)", bytes(8)),
    npy("<f4", "(2,)", bytes(4)),
    npy("|S0", "(1000000000000,)"),
    npy("|b1", "(2,)", b"\1\2"),
    npy("|O", "(1,)", b"\x80\x04N."),
    npy("<f4", "(1,)", bytes(4), version=(3, 0)),
    npy("<f4", "(" * 3000, bytes(4)),
    b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100,
  ],
  ids=["rows", "overflow", "negative", "longer", "shorter", "no width", "flag 2", "object", "v3", "nested", "header"],
)
def test_an_array_that_is_not_what_its_header_says_is_refused_before_it_is_made(tmp_path, content):
  path = tmp_path / "a.npy"
  path.write_bytes(content)
  for read in (open_array, read_array):
    with little_memory():
      refusal(functools.partial(read, path), path, "expected a .npy file of plain numbers", "numpy.save")
  with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
    archive.writestr("a.npy", content)
  with little_memory():
    refusal(lambda: read_archive(tmp_path / "a.npz"), "expected an .npz file of plain numbers")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, compression):
  with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
    archive.writestr("a.npy", npy("<f4", "(5000000,)", bytes(20_000_000)))
  assert (tmp_path / "a.npz").stat().st_size < 2**16
  with little_memory():
    refusal(lambda: read_archive(tmp_path / "a.npz"), "compressed")


def test_members_that_are_twice_there_or_are_no_arrays_are_refused(tmp_path):
  path = tmp_path / "a.npz"

  def write(*names):
    with zipfile.ZipFile(path, "w") as archive:
      for name in names:
        archive.writestr(name, npy("<f4", "(1,)", bytes(4)))
    return path

  assert read_archive(write("one.npy")).keys() == {"one"}
  refusal(lambda: read_archive(write("one")), path, "no array")
  with pytest.warns(UserWarning, match="Duplicate"):
    write("one.npy", "one.npy")
  refusal(lambda: read_archive(path), path, "twice")


def test_no_more_of_a_large_file_is_read_than_its_header(tmp_path):
  path = tmp_path / "a.npy"
  path.write_bytes(npy("<f4", "(2,)", bytes(8)))
  os.truncate(path, 2**30)
  with little_memory():
    refusal(lambda: open_array(path), path, "too long")


@pytest.mark.parametrize("read", [open_array, read_array, read_archive, read_json, check_file])
def test_what_is_no_file_is_refused_at_once(tmp_path, read):
  refusal(lambda: read(tmp_path / "none"), "none", "found nothing")
  refusal(lambda: read(tmp_path), "found a folder")
  os.mkfifo(tmp_path / "pipe")
  refusal(lambda: read(tmp_path / "pipe"), "found a pipe")
  (tmp_path / "loop").symlink_to("loop")
  refusal(lambda: read(tmp_path / "loop"), "Too many levels of symbolic links")


def test_json_is_no_larger_nor_deeper_than_can_be_read(tmp_path):
  path = tmp_path / "a.json"
  path.write_text("[" * 10_000)
  refusal(lambda: read_json(path), path, "expected a JSON file")
  write_json(path, json.loads('{"a":' * 20 + "1" + "}" * 20))
  assert read_json(path)["a"].keys() == {"a"}
  for deep in ('{"a":' * 21 + "[]" + "}" * 21, '{"a":' + "[" * 20 + "1" + "]" * 20 + "}"):
    path.write_text(deep)
    refusal(lambda: read_json(path), path, "nested deeper than 20 levels")
  path.write_text("[1]")
  refusal(lambda: read_json(path), path, "it holds a list")
  write_json(path, {})
  assert read_json(path) == {}
  os.truncate(path, 2**40)
  with little_memory():
    refusal(lambda: read_json(path), path, "of at most 1073741824 bytes, got 1099511627776")


ITEM = "item_id:token\tx:float_seq\na\t1\nb\t2\n"
INTER = "user_id:token\titem_id:token\nu\ta\nu\tb\nu\ta\n"


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "sequences.txt").write_text("ann 0 1 2\n")
  (tmp_path / "items.jsonl").write_text("{}\n" * 3)
  np.save(tmp_path / "text_features.npy", np.ones((3, 2), np.float32))
  return tmp_path


@pytest.fixture
def atomic(tmp_path):
  (tmp_path / "tiny.inter").write_text(INTER)
  (tmp_path / "tiny.item").write_text(ITEM)
  return tmp_path


def test_features_that_declare_more_than_they_hold_are_refused_from_their_header(folder):
  (folder / "text_features.npy").write_bytes(npy("<f4", "(1000000000000, 768)", bytes(64)))
  for call in (
    lambda: load_directory(folder),
    lambda: load_modality(folder / "text_features.npy", num_items=10**12),
    lambda: load_new_items(folder, {"text": 2}),
  ):
    with little_memory():
      refusal(call, "text_features.npy", "expected a .npy file")
  np.save(folder / "text_features.npy", np.array(1.0))
  refusal(lambda: load_new_items(folder, {"text": 2}), "expected a row for each new item")


def test_a_bomb_of_gzip_is_refused_before_it_fills_the_memory(folder, monkeypatch):
  (folder / "items.jsonl").unlink()
  content = gzip.compress(b"{}\n" * 10 * 2**20, 9)  # 30 MiB from 30 KiB.
  (folder / "items.jsonl.gz").write_bytes(content)
  monkeypatch.setattr("bbqrec_jax.data.files.FLOOR", 2**20)
  with little_memory():
    refusal(lambda: load_directory(folder), "items.jsonl.gz", f"100 times its {len(content)} bytes", "uncompressed")
  # A small file may hold what it likes.
  (folder / "items.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 3 + b'{"title": "%s"}\n' % (b"x" * 2**18)))
  np.save(folder / "text_features.npy", np.ones((4, 2), np.float32))
  assert load_directory(folder).num_items == 4


@pytest.mark.parametrize("name", ["sequences.txt", "items.jsonl", "tiny.inter", "tiny.item"])
def test_a_text_file_too_large_for_any_machine_is_refused_unread(folder, atomic, name):
  os.truncate(folder / name, 2**40)
  load = load_recbole if name.startswith("tiny") else load_directory
  with little_memory():
    refusal(lambda: load(folder), name, "of at most 68719476736 bytes")


def test_one_long_label_cannot_make_all_of_them_long(folder, atomic):
  lines = "".join(f"user{row} 0 1 2\n" for row in range(200))
  (folder / "sequences.txt").write_text(lines + "x" * 256 + " 0 1 2\n")
  assert load_directory(folder).interactions.num_users == 201
  (folder / "sequences.txt").write_text(lines + "x" * 100_000 + " 0 1 2\n")
  with little_memory():
    refusal(lambda: load_directory(folder), "line 201 field 1", "at most 256 bytes, got 100000", "xxx...")
  for name, row in (("user_id", "x" * 100_000 + "\ta\n"), ("item_id", "u\t" + "x" * 100_000 + "\n")):
    (folder / "tiny.inter").write_text(INTER + row + "u\ta\n" * 200)
    with little_memory():
      refusal(lambda: load_recbole(folder), f"tiny.inter line 5 field '{name}'", "at most 256 bytes, got 100000")


def test_a_sparse_table_cannot_grow_without_end(atomic, monkeypatch):
  monkeypatch.setattr("bbqrec_jax.data.files.FLOOR", 2**20)
  rows = "a\t" + "1 " * 10_000 + "\n" + "".join(f"{row}\t\n" for row in range(2000))  # 80 MB from 28 kB.
  (atomic / "tiny.item").write_text("item_id:token\tx:float_seq\n" + rows)
  with little_memory():
    refusal(lambda: load_recbole(atomic), "tiny.item", "100 times")


def test_an_optional_file_that_cannot_be_read_is_not_an_absent_one(folder):
  for name in ("timestamps.txt", "has_text.npy"):
    (folder / name).symlink_to("nowhere")
    refusal(lambda: load_directory(folder), name, "found nothing")
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal(lambda: load_directory(folder), name, "found a folder")
    (folder / name).rmdir()


@pytest.mark.parametrize("name", ["id", "fused", ".hidden", "a\x1b[2J", "x" * 200, "a\\b"])
def test_a_modality_with_a_name_that_cannot_be_one_is_refused(folder, name):
  (folder / "text_features.npy").rename(folder / f"{name}_features.npy")
  refusal(lambda: load_directory(folder), folder, "expected a modality's name")


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "id"])
def test_a_column_or_a_tokenizer_cannot_name_a_modality_outside_its_folder(atomic, name):
  (atomic / "tiny.item").write_text(ITEM.replace("x:float_seq", f"{name}:float_seq"))
  refusal(lambda: load_recbole(atomic), "expected a modality's name", repr(name))
  refusal(lambda: load_new_items(atomic / "new", {name: 1}), "the tokenizer's modalities", repr(name))


def test_links_that_lead_out_of_a_workdir_are_refused(tmp_path):
  workdir = tmp_path / "run"
  (workdir / "checkpoints").mkdir(parents=True)
  (workdir / "inside").symlink_to("checkpoints")
  check_links(workdir)
  check_links(tmp_path / "none")
  for target in ("../../elsewhere", "/etc/hostname"):
    (workdir / "checkpoints" / "out").symlink_to(target)
    refusal(lambda: check_links(workdir), "checkpoints/out", f"a link to {target}")
    (workdir / "checkpoints" / "out").unlink()
  (tmp_path / "linked").symlink_to("run")
  check_links(tmp_path / "linked")


@pytest.mark.parametrize(
  "url",
  ["gs://b/x", "GS://b/x", "gs:/b/x", "gs:b", "gs:", "s3://b", "s3a://b", "hdfs:///x", "https://h/x", "abfss://c@h/x",
   "dbfs:/x", "me@host:/x", "host:", "C:/x", " gs://b", "./gs://b", pathlib.Path("gs://b/x"), "gs://" + "x" * 5000],
)  # fmt: skip
def test_a_url_is_no_path(url):
  refusal(lambda: local_path(url, flag="data"), f"--data={url}"[:200], "got a URL", "/mnt/bbqrec", "absolute path")


@pytest.mark.parametrize(
  ("url", "plain"),
  [("file:///a/b", "/a/b"), ("FILE:/a/b", "/a/b"), ("file://localhost/a", "/a"), ("file:///a%20b", "/a b"),
   ("file:a/b", "a/b"), ("file://a/b", "a/b")],
)  # fmt: skip
def test_of_a_file_url_the_plain_path_is_told(url, plain):
  with pytest.raises(InputError) as error:
    local_path(url, flag="data")
  assert str(error.value) == f"--data={url}: expected a path, got a URL; give the path alone, --data={plain}"


@pytest.mark.parametrize(
  ("path", "said"),
  [("", "got nothing"), ("a\0b", "none can hold"), ("a\ud800", "none can hold"), ("a/" + "x" * 256, "255 a name"),
   ("\u00e9" * 128, "255 a name"), ("/x" * 2000, "at most 3840 bytes")],
)  # fmt: skip
def test_what_no_file_system_can_hold_is_no_path(path, said):
  refusal(lambda: local_path(path, flag="data"), "--data=", said)


@pytest.mark.parametrize(
  "path",
  ["/gs:/x", "/a/gs://b", "a:b", "a/b:/c", "-a", "a b ", "a.", "$HOME", "[a]*?", "a\nb", "\udcff", "%20#", "x" * 255,
   "..", pathlib.Path("a/b"), b"a\xff"],
)  # fmt: skip
def test_any_other_path_is_taken_as_it_is(path):
  assert local_path(path, flag="data") == pathlib.Path(os.fsdecode(path))


def test_a_relative_path_needs_a_current_folder(tmp_path, monkeypatch):
  (tmp_path / "gone").mkdir()
  monkeypatch.chdir(tmp_path / "gone")
  (tmp_path / "gone").rmdir()
  refusal(lambda: local_path("x", flag="data"), "--data=x", "the current folder", "is gone", "absolute path")
  assert local_path("/x", flag="data") == pathlib.Path("/x")
  monkeypatch.setenv("HOME", "/home/me")
  assert local_path("~/x", flag="data") == pathlib.Path("/home/me/x")


@pytest.mark.parametrize("path", ["/a/b c/d.e_f-g,h=i@j+k~", "/gsx/a", "/a/gs/s3"])
def test_a_plain_path_stays_what_it_is(path):
  with plain_path(pathlib.Path(path)) as plain:
    assert plain == pathlib.Path(path)


@pytest.mark.parametrize(
  "path", ["/gs/b", "/s3", "//tmp/x", "/a/[b]", "/a/logs:/b", "/a\\b", "/\u00e9", "/a\n", "/\udcff"]
)
def test_another_path_has_a_link_for_as_long_as_it_is_needed(path):
  with plain_path(pathlib.Path(path)) as plain:
    assert plain != pathlib.Path(path)
    assert os.readlink(plain) == path
  assert not plain.parent.exists()


def test_a_link_needs_a_plain_place_of_its_own(tmp_path, monkeypatch):
  def link():
    with plain_path(pathlib.Path("/a[b]")):
      pass

  (tmp_path / "[x]").mkdir()
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "[x]"))
  refusal(link, "/a[b]", "link", "set TMPDIR=/tmp")
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
  refusal(link, "/a[b]", "none can be made", "No such file")
  assert not list((tmp_path / "[x]").iterdir())


def test_an_output_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.touch()
  for path, said in (
    (tmp_path, "a folder that is there"), (tmp_path / "new" / "..", "a folder that is there"),
    (tmp_path / ("x" * 250), "at most 244 bytes"), (file / "x.json", f"{file} is none"),
  ):  # fmt: skip
    refusal(functools.partial(check_output, path), f"--output={path}"[:200], said)
  check_output(tmp_path / "new" / ("x" * 244))
  check_output(file)
  refusal(lambda: check_new(file), file, "exists already")
  monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # Root may write anywhere.
  for path in (tmp_path, tmp_path / "new" / "er"):
    refusal(functools.partial(check_place, path, flag="workdir"), f"--workdir={path}: {tmp_path} cannot be written to")
  refusal(lambda: check_output(file), f"--output={file}: {tmp_path} cannot be written to")


def test_messages_are_one_short_line_that_a_terminal_shows_as_it_is():
  assert str(InputError("a\nb\x1b[2J  c\ud800")) == "a b\\x1b[2J  c\\ud800"
  assert len(str(InputError("x" * 10**6))) < 1100
