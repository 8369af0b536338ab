"""JSON files: what was written is what is read, or nothing."""

import json

import pytest

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.json_files import read_json, write_json

VALUE = {"ndcg@10": 0.1 + 0.2, "count": 3, "best": float("-inf"), "name": "Größe", "nested": {"list": [1, 2.5, None]}}


@pytest.fixture
def path(tmp_path):
  write_json(tmp_path / "folder" / "value.json", VALUE | {"tuple": (1, 2)})
  return tmp_path / "folder" / "value.json"


def test_what_is_written_is_read(path):
  assert read_json(path) == VALUE | {"tuple": [1, 2]}
  assert json.loads(path.read_text())["ndcg@10"] == VALUE["ndcg@10"], "anybody can read it"
  assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_a_flipped_bit_is_refused_or_changes_nothing(path):
  whole, expected = path.read_bytes(), VALUE | {"tuple": [1, 2]}
  refused, flips = 0, range(0, 8 * len(whole), 3)
  for place in flips:
    content = bytearray(whole)
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    try:
      assert read_json(path) == expected
    except InputError:
      refused += 1
  # The blanks alone may change.
  assert refused > 0.95 * len(flips) * len("".join(whole.decode().split())) / len(whole)


def test_files_that_are_cut_off_missing_or_without_checksum_are_refused(path):
  whole = path.read_bytes()
  for content in (whole[:-3], whole[:10], b"", b"[]", b"3", b'{"count": 3}', b'{"checksum": "0"}', b"[" * 100_000):
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"value\.json: expected .*; restore it from a copy, or use another folder"):
      read_json(path)
    with pytest.raises(InputError, match=r"value\.json: expected .*; delete it"):
      read_json(path, mend="delete it")
  path.unlink()
  with pytest.raises(InputError, match=r"value\.json: expected a JSON file, found nothing"):
    read_json(path)


def test_a_write_that_fails_leaves_what_was_there(path):
  with pytest.raises(TypeError):
    write_json(path, {"object": object()})
  assert read_json(path)["count"] == 3
