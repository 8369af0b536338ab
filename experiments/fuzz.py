"""Damaged and hostile input for everything that reads a file: it must be refused in one line, or loaded as it stands.

    python experiments/fuzz.py --cases=10000 --output=fuzz.json

Each reader gets small valid files, of which one is damaged: bits flipped, pieces cut out, doubled and swapped, numbers
and names replaced by strange ones, headers that promise more than the file holds, bombs, pickles, files that are not
there or are no files. An independent reader, written here in plain Python, says what the damaged files hold. A case is

- loaded: the program loaded exactly that;
- refused: one line of `InputError`, and the independent reader finds nothing to load either;
- wrong: anything else. Another exception, another value, a hang, a death, more memory than 2 GiB, or a refusal of files
  that are right.

Case number n is the same in every run. `tests/test_fuzz.py` runs a few of each reader.
"""

import ast
import codecs
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import unittest.mock
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pyarrow.parquet
from absl import flags

from bbqrec_jax.command_line import define_path, start
from bbqrec_jax.config import CHANGEABLE, default_config
from bbqrec_jax.data.amazon_reviews.image_features import read_image_features
from bbqrec_jax.data.amazon_reviews.prepare import prepare_category
from bbqrec_jax.data.amazon_reviews.releases import RELEASES
from bbqrec_jax.data.dataset import Dataset
from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.encoding.encode import features
from bbqrec_jax.data.encoding.pictures import ColoursAndEdges
from bbqrec_jax.data.features import load_new_items
from bbqrec_jax.data.histories import read_histories
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.preparation import card
from bbqrec_jax.data.preparation.prepare import prepare
from bbqrec_jax.data.recbole import load_recbole
from bbqrec_jax.data.titles import listed_items
from bbqrec_jax.errors import InputError, refuse
from bbqrec_jax.recommender.settings import BACKBONES, HEADS
from bbqrec_jax.recommender.train import check_fingerprint
from bbqrec_jax.runs.workdir import PARTS, SHOWN, claim, load_config, load_results, tokenizer_figure
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.tokenizer.inference import check_arrays, settings_from_json
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.utils.files import check_output
from bbqrec_jax.utils.json_files import write_json
from bbqrec_jax.utils.settings import flatten

# What a file may be instead of bytes.
MISSING, FOLDER, PIPE, LOOP, HUGE = "missing", "folder", "pipe", "loop", "huge"
Files = dict[str, Any]
Change = Callable[[np.random.Generator, bytes], bytes]
Damage = Callable[[np.random.Generator, Files], Files]

SECONDS = 20.0  # Of one case, after which it hangs.
MEMORY = 2 * 2**30  # Bytes that a process may take beyond what it has when it starts.
MARK = "a pickle was run"
FLOOR, GROWTH, TOKEN = 2**26, 100, 256  # The limits of bbqrec_jax/data/files.py.
CHUNK = 100  # Cases that a process does at once; one that dies takes the rest of its chunk with it.


class Bad(Exception):
  """The independent reader finds nothing that could be loaded."""


class Reader(NamedTuple):
  """One way into the program.

  Attributes:
    files: valid files by their name in a folder.
    damages: ways to damage them.
    read: the program's reader, folder -> what it loaded, in plain values.
    expect: the independent reader, files -> the same; raises if there is nothing to load.
    may_refuse: whether the program may refuse what the independent reader can read.
  """

  files: Files
  damages: tuple[Damage, ...]
  read: Callable[[pathlib.Path], Any]
  expect: Callable[[Files], Any]
  may_refuse: bool = False


# --- damage ---------------------------------------------------------------------------------------------------------

TOKENS = tuple(
  token if isinstance(token, bytes) else token.encode()
  for token in (
    b"\0", b"\xff", b"\xff\xfe", b"\xc3", "\ufeff", "\u2028", "\u0663", "\x1b[2J", "\x1c", "\x85", "\r", "\r\n", "\n",
    "\n\n", "\t", "\t\t", " ", "\v", "\f", "-1", "+1", "01", "1_0", "0x1", "1e400", "-1e39", "1e39", "nan", "NaN",
    "inf", "Infinity", "-0", "0", "3", "4", "1.5", "4294967296", "9223372036854775807", "18446744073709551617",
    "9" * 5000, "0" * 30 + "1", "x" * 300, "x" * 100_000, "null", "true", "{}", "{", "[", "[" * 3000, '{"a":' * 3000,
    '"', "\\", "\\ud800", "\\u0000", "\\u001b[2J", '"id"', '"title"', ":", ":token", ":float_seq", "../../x",
    "/etc/passwd", "$(id)", "%s", "__import__('os')", pickle.dumps(os.getcwd),
  )
)  # fmt: skip


def piece(rng: np.random.Generator, content: bytes) -> slice:
  """A random piece of the content, short ones more often."""
  start = int(rng.integers(len(content) + 1))
  return slice(start, start + int(rng.integers(1, 2 ** rng.integers(1, 8))))


def damage_bytes(rng: np.random.Generator, content: bytes) -> bytes:
  """One edit or a few that know nothing of the format."""
  for _ in range(rng.geometric(0.6)):
    here, there = piece(rng, content), piece(rng, content)
    token = TOKENS[rng.integers(len(TOKENS))]
    kind = rng.integers(7)
    if kind == 0 and content:
      place = int(rng.integers(len(content)))
      flipped = content[place] ^ (1 << int(rng.integers(8)))
      content = content[:place] + bytes([flipped]) + content[place + 1 :]
    elif kind == 1:
      content = content[: here.start]
    elif kind == 2:
      content = content[: here.start] + content[here.stop :]
    elif kind == 3:
      content = content[: here.stop] + content[here] + content[here.stop :]
    elif kind == 4:
      content = content[: here.start] + content[there] + content[here.start :]
    elif kind == 5:
      content = content[: here.start] + token + content[here.start :]
    else:
      content = content[: here.start] + token + content[here.stop :]
  return content


def damage_fields(rng: np.random.Generator, content: bytes) -> bytes:
  """Edits of lines and of the fields between blanks and tabs."""
  lines = content.split(b"\n")
  for _ in range(rng.geometric(0.6)):
    row, other = int(rng.integers(len(lines))), int(rng.integers(len(lines)))
    fields = re.split(rb"([ \t]+)", lines[row])
    field = int(rng.integers(len(fields)))
    kind = rng.integers(7)
    if kind == 0:
      lines[row], lines[other] = lines[other], lines[row]
    elif kind == 1:
      lines.insert(other, lines[row])
    elif kind == 2 and len(lines) > 1:
      del lines[row]
    elif kind == 3:
      fields[field] = TOKENS[rng.integers(len(TOKENS))]
    elif kind == 4:
      fields.insert(field, fields[rng.integers(len(fields))])
    elif kind == 5:
      fields[field] = b"%d" % rng.integers(-2, 7)
    else:
      fields[field] = b"%.3g" % rng.normal(scale=100)
    if kind >= 3:
      lines[row] = b"".join(fields)
  return b"\n".join(lines)


def compressed(change: Change) -> Change:
  """The change inside gzip."""

  def change_inside(rng: np.random.Generator, content: bytes) -> bytes:
    return gzip.compress(change(rng, gzip.decompress(content)), 1, mtime=0)

  return change_inside


@functools.cache
def bomb() -> bytes:
  """Half a MiB of gzip that becomes 128 MiB of valid lines."""
  return gzip.compress(b"{}\n" * (2**27 // 3), 9, mtime=0)


def gzip_bomb(rng: np.random.Generator, content: bytes) -> bytes:
  """Now and then (it is slow to make) a bomb; otherwise two members in one file."""
  return bomb() if rng.random() < 0.01 else content + content


DEEP = "[" * 5000 + "]" * 5000
VALUES: tuple[Any, ...] = (
  None, True, False, 0, -1, 1, 2, 40, 2**31, 2**70, 10**4000, -0.5, 0.5, 1e308, float("nan"), float("inf"), "", "0",
  "x", "x" * 10_000, "../../x", "/etc/passwd", "\ud800", "\x1b[2J", "os:system", "antigravity:x", "a\nb", [], {}, [[]],
  [0], ["x"], [None], [{}], {"x": 1}, {"a": {"b": {"c": 1}}}, [["text", 2]], [["text", 10**12]], [10**9],
)  # fmt: skip


def places(holder: Any) -> Iterator[tuple[Any, Any]]:
  """Every (dict or list, key) below a JSON value."""
  for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
    yield holder, key
    if isinstance(holder[key], dict | list):
      yield from places(holder[key])


def change_json(rng: np.random.Generator, value: Any) -> Any:
  """Replaces, removes, renames or adds a value anywhere in a JSON value, which may be changed itself."""
  document = [value]
  for _ in range(rng.geometric(0.6)):
    found = list(places(document))
    holder, key = found[rng.integers(len(found))]
    value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    kind = rng.integers(7)
    if kind == 0 and holder is not document:
      del holder[key]
    elif kind == 1 and isinstance(holder, dict):
      holder[str(value)[:50]] = holder.pop(key)
    elif kind == 2 and isinstance(holder[key], dict):
      holder[key][str(value)[:50]] = value
    elif kind == 3 and isinstance(holder[key], int | float):
      holder[key] = holder[key] + 1
    elif kind == 4 and isinstance(holder[key], str):
      holder[key] = holder[key] + "x"
    elif kind == 5 and isinstance(holder, dict):
      holder[key] = holder.pop(key)  # The same in another order.
    else:
      holder[key] = value
  return document[0]


def sealed(value: dict[str, Any]) -> bytes:
  """A JSON file with the checksum of what it holds, as whoever forges one would write it."""
  held = {name: part for name, part in value.items() if name != "checksum"}
  digest = hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
  return json.dumps(held | {"checksum": digest[:16]}).encode()


def damage_json(rng: np.random.Generator, content: bytes) -> bytes:
  """The same in a JSON file, mostly with the checksum of what it then holds; or nested deeper than can be read."""
  value = change_json(rng, json.loads(content))
  if isinstance(value, dict) and "checksum" in value and rng.random() < 0.7:
    return sealed(value)
  text = json.dumps(value)
  return (text.replace("0", DEEP, 1) if rng.random() < 0.05 else text).encode()


def damage_json_line(rng: np.random.Generator, content: bytes) -> bytes:
  """The same in one line of many."""
  lines = content.split(b"\n")
  row = int(rng.integers(len(lines) - 1))
  return b"\n".join([*lines[:row], damage_json(rng, lines[row]), *lines[row + 1 :]])


SHAPES = (
  "()", "(0,)", "(1,)", "(4,)", "(4, 2)", "(2, 4)", "(8,)", "(8, 1)", "(4, 2, 1)", "(4, 0)", "(0, 2)", "(3, 2)",
  "(5, 2)", "(4, 1)", "(-1, 2)", "(-4, -2)", "(True, 8)", "(4.0, 2)", "(1000000000000,)", "(1000000000000, 2)",
  "(4, 1000000000000)", "(8589934592, 2147483648)", "(4294967296, 4294967296)", "(9223372036854775807,)",
  "(10" + "0" * 30 + ",)", "None", "4", "[4, 2]", "(4, 2,)", "(1000000000000, 0)", "(" + "1, " * 70 + ")", "(4L, 2L)",
  "(4, 2)()",
)  # fmt: skip
DTYPES = (
  "'<f2'", "'<f4'", "'>f4'", "'<f8'", "'<f16'", "'<i4'", "'<i8'", "'|b1'", "'|u1'", "'|i1'", "'<u8'", "'|O'", "'<c8'",
  "'|S4'", "'<U2'", "'|V8'", "'|S0'", "'|V0'", "'<U0'", "'<M8[s]'", "[('a', '<f4')]", "[('a', '|O')]", "('<f4', (2,))",
  "('|V0', (10000000000,))", "'junk'", "5", "None", "''", "'float32'", "'f'", "'<f4,<f4'",
)  # fmt: skip


def npy(descr: str, fortran: str, shape: str, data: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
  """A `.npy` file that declares what it is told to."""
  header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()
  header += b" " * (-(len(header) + 11) % 64) + b"\n"
  length = struct.pack("<H" if version == (1, 0) else "<I", len(header) % 2**16)
  return b"\x93NUMPY" + bytes(version) + length + header + data


def split_npy(content: bytes) -> tuple[dict[str, Any], bytes]:
  """Header and data of a `.npy` file of version 1."""
  (length,) = struct.unpack("<H", content[8:10])
  return ast.literal_eval(content[10 : 10 + length].decode()), content[10 + length :]


def damage_header(rng: np.random.Generator, content: bytes) -> bytes:
  """Another shape, dtype, order or version in front of the same data, or data that fits them."""
  header, data = split_npy(content)
  descr, fortran, shape = (repr(header[key]) for key in ("descr", "fortran_order", "shape"))
  version = (1, 0)
  for _ in range(rng.integers(1, 3)):
    kind = rng.integers(6)
    if kind == 0:
      descr = DTYPES[rng.integers(len(DTYPES))]
    elif kind == 1:
      shape = SHAPES[rng.integers(len(SHAPES))]
    elif kind == 2:
      fortran = ("True", "False", "1", "'x'", "None")[rng.integers(5)]
    elif kind == 3:
      version = ((1, 0), (2, 0), (3, 0), (9, 9), (0, 0))[rng.integers(5)]
    elif kind == 4:
      shape = ("(" * 3000 + ")" * 3000, "-" * 5000 + "1", "[" * 90 + "]" * 90, "1" * 5000, "{}", "f'{1}'")[
        rng.integers(6)
      ]
    else:
      data = (data + data, data[:-1], data + b"\0", b"", data[: len(data) // 2])[rng.integers(5)]
  return npy(descr, fortran, shape, data, version)


def damage_numbers(rng: np.random.Generator, content: bytes) -> bytes:
  """Strange numbers in an array that stays whole, or the array in another dtype."""
  array = np.load(io.BytesIO(content), allow_pickle=False).copy()
  with np.errstate(all="ignore"):
    if rng.random() < 0.5:
      names = ["f2", "f4", "f8", ">f4", "i4", "u1", "?", "i8", "f4,f4", "O", "c8", "S3"]
      array = array.astype(names[rng.integers(len(names))])
    if array.dtype.kind in "f" and array.size and rng.random() < 0.7:
      strange = (np.nan, np.inf, -np.inf, 1e300, 3.5e38, 0.0, -0.0, 1e-45, 65504.0)
      array.flat[rng.integers(array.size)] = strange[rng.integers(len(strange))]
    if array.dtype.kind in "iu?" and array.size:
      raw = array.view(np.uint8)
      raw.flat[rng.integers(raw.size)] = rng.integers(256)
    if rng.random() < 0.1:
      array = np.zeros_like(array)
    if rng.random() < 0.2:
      array = np.asfortranarray(array)
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=True)
  return buffer.getvalue()


class Bomb:
  """Unpickling it runs a function, and leaves a mark in this process."""

  def __reduce__(self):
    return codecs.register_error, (MARK, len)


def exploded() -> bool:
  """Whether one was ever unpickled."""
  try:
    codecs.lookup_error(MARK)
  except LookupError:
    return False
  return True


def pickled(rng: np.random.Generator, content: bytes) -> bytes:
  """A pickle that runs a function, with or without the header of a `.npy` file before it."""
  del content
  load = pickle.dumps(Bomb())
  return (load, npy("'|O'", "False", "(1,)", load), npy("'|O'", "False", "()", load))[rng.integers(3)]


def damage_archive(rng: np.random.Generator, content: bytes) -> bytes:
  """Members of a zip archive damaged, compressed, doubled, renamed, left out or added."""
  with zipfile.ZipFile(io.BytesIO(content)) as archive:
    members = [(info.filename, archive.read(info)) for info in archive.infolist()]
  place = int(rng.integers(len(members)))
  name, data = members[place]
  kind, compression = rng.integers(7), zipfile.ZIP_STORED
  if kind == 0:
    members[place] = (name, damage_bytes(rng, data))
  elif kind == 1:
    members[place] = (name, damage_header(rng, data))
  elif kind == 2:
    members[place] = (name, damage_numbers(rng, data))
  elif kind == 3:
    names = ["../../x.npy", "/x.npy", "", "x", name.upper(), "x" * 3000 + ".npy", "mean/\x1b.npy", "id.npy"]
    members[place] = (names[rng.integers(len(names))], data)
  elif kind == 4:
    del members[place]
  elif kind == 5:
    members.append((name, damage_numbers(rng, data)))
  else:
    compression = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[rng.integers(3)]
    if rng.random() < 0.5:
      members[place] = (name, npy("'<f4'", "False", "(5000000,)", bytes(20_000_000)))
  buffer = io.BytesIO()
  with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", compression) as archive:
    for name, data in members:
      archive.writestr(zipfile.ZipInfo(name), data, compression)
  return buffer.getvalue()


# --- independent readers --------------------------------------------------------------------------------------------


def text_lines(files: Files, name: str) -> list[str]:
  """The lines of a text file."""
  content = files[name]
  if not isinstance(content, bytes):
    raise Bad
  if name.endswith(".gz"):
    size = len(content)
    content = gzip.decompress(content)
    if len(content) > max(FLOOR, GROWTH * size):
      raise Bad
  text = content.decode().removeprefix("\ufeff").replace("\r\n", "\n")
  if "\0" in text:
    raise Bad
  lines = text.split("\n")
  while lines and not lines[-1].strip(" \t\r\v\f"):
    lines.pop()
  return lines


def split_blanks(text: str) -> list[str]:
  """What stands between ASCII blanks; the first is "" where the text starts with one."""
  return re.split("[ \t\r\v\f]+", text.rstrip(" \t\r\v\f"))


def number(token: str) -> float:
  """A finite number in ASCII."""
  if not token.isascii() or "_" in token or not np.isfinite(float(token)):
    raise Bad
  return float(token)


def whole_array(content: Any) -> np.ndarray:
  """A `.npy` file that holds exactly what its header says."""
  if not isinstance(content, bytes) or content[:6] != b"\x93NUMPY" or content[6:8] not in (b"\1\0", b"\2\0"):
    raise Bad
  start = 10 if content[6] == 1 else 12
  stop = start + int.from_bytes(content[8:start], "little")
  header = ast.literal_eval(re.sub(r"(\d)\s*L\b", r"\1", content[start:stop].decode("latin1")))
  descr, fortran, shape = (header.pop(key) for key in ("descr", "fortran_order", "shape"))
  if header or type(fortran) is not bool or type(shape) is not tuple or stop - start > 10_000 or stop > len(content):
    raise Bad
  if not all(isinstance(size, int) and size >= 0 for size in shape) or not isinstance(descr, str):
    raise Bad
  dtype = np.dtype(descr)
  count = functools.reduce(lambda a, b: a * b, shape, 1)
  if dtype.kind not in "biuf" or count * dtype.itemsize != len(content) - stop:
    raise Bad
  values = np.frombuffer(content[stop:], dtype, count)
  if dtype.kind == "b" and np.any(values.view(np.uint8) > 1):
    raise Bad
  return values.reshape(shape, order="F" if fortran else "C")


def plain(array: np.ndarray) -> Any:
  """Shape, dtype and bytes."""
  return list(array.shape), array.dtype.str, array.tobytes()


def modality(files: Files, name: str, num_items: int | None) -> tuple[np.ndarray, list[bool]]:
  """The features and presence of one modality."""
  features = whole_array(files[f"{name}_features.npy"])
  if features.ndim != 2 or features.dtype.kind != "f" or features.dtype.itemsize > 8 or 0 in features.shape:
    raise Bad
  if len(features) != (len(features) if num_items is None else num_items):
    raise Bad
  present = [any(value != 0 for value in row) for row in features.tolist()]
  if files.get(f"has_{name}.npy", MISSING) != MISSING:
    mask = whole_array(files[f"has_{name}.npy"])
    if mask.dtype.kind not in "biu" or mask.shape != (len(features),) or not set(mask.tolist()) <= {0, 1}:
      raise Bad
    present = [bool(value) for value in mask.tolist()]
  if not np.all(np.abs(features[present].astype(np.float64)) <= float(np.finfo(np.float32).max)):
    raise Bad
  return features, present


def modalities(files: Files, num_items: int | None, names: tuple[str, ...] = ("image", "text")) -> Any:
  """All of them, by name; without a number they are of new items, which may all lack one."""
  pairs, enough = {}, any if num_items is None else all
  for name in names:
    if files.get(f"{name}_features.npy", MISSING) != MISSING:
      pairs[name] = modality(files, name, num_items)
      num_items = len(pairs[name][0])
  if not enough(any(present) for _, present in pairs.values()):
    raise Bad
  return {name: (plain(features), present) for name, (features, present) in pairs.items()}


def seconds(times: list[float]) -> list[float]:
  """Times in seconds, by what magnitude most of them have, where the others are near zero."""
  powers = [sum(abs(time) >= bound for bound in (1e8, 1e11, 1e14, 1e17, 1e20)) for time in times]
  far = Counter(power for power in powers if power)
  if len(far) > 1 and 0 not in powers:
    raise Bad
  for power, count in far.items():
    if len(far) == 1 and 2 * count >= len(times) and power < 5:
      return [time / 1000 ** (power - 1) for time in times]
  return times


def expect_directory(files: Files) -> Any:
  """What a folder of the project's own format holds."""
  titles, own_ids = [], []
  (items,) = (name for name in files if name.startswith("items"))
  for row, line in enumerate(text_lines(files, items)):
    record = json.loads(line)
    if not isinstance(record, dict):
      raise Bad
    own = record.get("id")
    own_ids.append(own if isinstance(own, str) else row)
    if isinstance(own, str):
      if not 0 < len(own.encode("utf-8")) <= TOKEN or "\n" in own:
        raise Bad
    elif own is not None and (type(own) is not int or own != row):
      raise Bad
    title = "" if record.get("title") is None else record["title"]
    if not isinstance(title, str) or title.encode("utf-8", "ignore").decode() != title:
      raise Bad
    titles.append(title)
  histories = []
  for line in text_lines(files, "sequences.txt"):
    user, *tokens = split_blanks(line)
    if not user or not tokens or len(user.encode()) > TOKEN or not all(re.fullmatch("[0-9]+", t) for t in tokens):
      raise Bad
    history = [int(token.lstrip("0")[:20] or 0) for token in tokens]
    if max(history) >= len(titles):
      raise Bad
    histories.append((user, history))
  if not titles or not histories or len({user for user, _ in histories}) < len(histories):
    raise Bad
  times = None
  if files.get("timestamps.txt", MISSING) != MISSING:
    times, lines = [], text_lines(files, "timestamps.txt")
    for line, (user, history) in zip(lines, histories, strict=True):
      label, *tokens = split_blanks(line.lstrip(" \t\r\v\f"))
      own = [number(token) for token in tokens]
      if label != user or len(own) != len(history) or own != sorted(own):
        raise Bad
      times.extend(own)
    times = seconds(times)
  if len({type(own) for own in own_ids}) > 1 or len(set(own_ids)) < len(own_ids):
    raise Bad
  if files.get("users.txt", MISSING) != MISSING:
    users = text_lines(files, "users.txt")
    if len(set(users)) < len(users) or not all(user.strip() and len(user.encode()) <= TOKEN for user in users):
      raise Bad
    histories = [(user, history) for user, (_, history) in zip(users, histories, strict=True)]
  return histories, times, own_ids, titles, modalities(files, len(titles))


def split_table(files: Files, name: str) -> tuple[dict[str, str], list[dict[str, str]]]:
  """The types of a RecBole table's columns, and its rows by column."""
  lines = text_lines(files, name)
  pairs = [column.partition(":")[::2] for column in lines[0].split("\t")] if lines else [("", "")]
  kinds = dict(pairs)
  if len(kinds) < len(pairs) or not all(part for pair in pairs for part in pair) or kinds.get("item_id") != "token":
    raise Bad
  rows = [dict(zip(kinds, line.split("\t"), strict=True)) for line in lines[1:]]
  if not all(row["item_id"] for row in rows):
    raise Bad
  return kinds, rows


def expect_items(files: Files) -> tuple[dict[str, int], list[str], dict[str, Any]]:
  """What a RecBole table of items holds: numbers by name, titles and modalities."""
  kinds, rows = split_table(files, "tiny.item")
  items = {row["item_id"]: place for place, row in enumerate(rows)}
  if not rows or len(items) < len(rows) or any(len(item.encode()) > TOKEN for item in items):
    raise Bad
  column = next((name for name in ("title", "item_name", "movie_title", "name") if name in kinds), None)
  titles = [row[column] if column else "" for row in rows]
  tables: dict[str, Any] = {}
  for name in kinds:
    if kinds[name] != "float_seq":
      continue
    short = next((name[: -len(end)] for end in ("_features", "_feature", "_emb") if name.endswith(end)), name)
    cells = [[number(token) for token in split_blanks(row[name].lstrip(" \t\r\v\f")) if token] for row in rows]
    (width,) = {len(cell) for cell in cells if cell}
    if (
      short in tables or not fits_name(short) or any(abs(v) > float(np.finfo(np.float32).max) for c in cells for v in c)
    ):
      raise Bad
    table = np.array([cell or [0.0] * width for cell in cells], np.float64)
    there = table[table.any(axis=1)]
    if not len(there):
      raise Bad
    spread = there.std(axis=0)
    narrow = (spread < 1e-4 * abs(there.mean(axis=0))) | (spread < 1e-30) | (spread > 1e30)
    if not np.any(narrow & (np.ptp(there, axis=0) > 0)):
      table = table.astype(np.float32)
    tables[short] = (plain(table), table.any(axis=1).tolist())
  return items, titles, tables


def expect_recbole(files: Files) -> Any:
  """What a folder of RecBole's atomic files holds."""
  kinds, rows = split_table(files, "tiny.inter")
  if kinds.get("user_id") != "token" or not rows:
    raise Bad
  if files["tiny.item"] == MISSING:
    names = dict.fromkeys(row["item_id"] for row in rows)
    items, titles, tables = {name: place for place, name in enumerate(names)}, [""] * len(names), {}
  else:
    items, titles, tables = expect_items(files)
  histories: dict[str, list[tuple[float, int]]] = {}
  for row in rows:
    used = [row[name] for name in ("user_id", "item_id", "timestamp") if name in kinds]
    if not row["user_id"] or row["item_id"] not in items or max(len(token.encode()) for token in used) > TOKEN:
      raise Bad
    time = number(row["timestamp"].strip(" \t\r\v\f")) if "timestamp" in kinds else 0.0
    histories.setdefault(row["user_id"], []).append((time, items[row["item_id"]]))
  if "timestamp" in kinds:
    read = iter(seconds([time for history in histories.values() for time, _ in history]))
    histories = {user: [(next(read), item) for _, item in history] for user, history in histories.items()}
  ordered = {user: sorted(history, key=lambda pair: pair[0]) for user, history in histories.items()}
  if not ordered:
    raise Bad
  times = [time for history in ordered.values() for time, _ in history] if "timestamp" in kinds else None
  return (
    [(user, [item for _, item in own]) for user, own in ordered.items()],
    times,
    list(items),
    titles,
    dict(sorted(tables.items())),
  )


def expect_asked(files: Files) -> Any:
  """The histories that somebody asks about, by ids, as lines of text or of JSON."""
  (name,) = files
  known, found = {own: row for row, own in enumerate(ASKED_IDS)}, []
  for line in text_lines(files, name):
    if name.endswith(".jsonl"):
      record = json.loads(line)
      user, items = record["user"], record["items"]
      if not isinstance(items, list) or not all(type(one) in (str, int) for one in (user, *items)):
        raise Bad
    else:
      user, *items = split_blanks(line)
    if (not user and name.endswith(".txt")) or len(str(user).encode()) > TOKEN or not items:
      raise Bad
    found.append((str(user), [known[str(item)] for item in items]))
  if not found or len({user for user, _ in found}) < len(found):
    raise Bad
  return found


def fits_name(name: str) -> bool:
  """Whether a modality may be called so."""
  safe = name.isprintable() and not set(name) & set("/\\") and not name.startswith(".") and len(name.encode()) <= 128
  return bool(name) and safe and name not in ("id", "fused")


# --- the readers ----------------------------------------------------------------------------------------------------


def read_dataset(dataset: Dataset) -> Any:
  """What was loaded, as the independent readers give it."""
  interactions = dataset.interactions
  histories = [(str(user), interactions.history(row).tolist()) for row, user in enumerate(interactions.users)]
  times = None if interactions.times is None else interactions.times.tolist()
  arrays = {name: (plain(array), dataset.present[name].tolist()) for name, array in dataset.features.items()}
  return histories, times, dataset.item_ids.to_json(), list(dataset.titles), arrays


def read_asked(path: pathlib.Path) -> Any:
  """Histories that somebody asks about."""
  asked = read_histories(path, ItemIds(ASKED_IDS))
  return [(str(user), asked.history(row).tolist()) for row, user in enumerate(asked.users)]


def read_new_items(folder: pathlib.Path) -> Any:
  """The features of new items."""
  features, present = load_new_items(folder, NEW_WIDTHS)
  return {name: (plain(array), present[name].tolist()) for name, array in features.items()}


def expect_new_items(files: Files) -> Any:
  """The same, by the independent reader; every modality must be there, and as wide as it was."""
  arrays = modalities(files, None)
  if {name: shape[1] for name, ((shape, _, _), _) in arrays.items()} != NEW_WIDTHS:
    raise Bad
  return arrays


def saved(array: np.ndarray) -> bytes:
  """The array as a `.npy` file."""
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  return buffer.getvalue()


def archive(**arrays: np.ndarray) -> bytes:
  """The arrays as an `.npz` file."""
  buffer = io.BytesIO()
  np.savez(buffer, allow_pickle=False, **arrays)
  return buffer.getvalue()


WORDS = (b"red", b"blue", b"oak", b"tin")
ITEMS = "".join(json.dumps({"id": k, "title": title}) + "\n" for k, title in enumerate(["A", "", "\u0106", "D"]))
NEW_WIDTHS = {"image": 3, "text": 2}
IMAGE = np.array([[1, 2, 3], [0, 0, 0], [4, 5, 6], [7, 8, 9]], np.float16)
FEATURES = {
  "text_features.npy": saved(np.arange(1, 9, dtype=np.float32).reshape(4, 2)),
  "image_features.npy": saved(IMAGE),
  "has_image.npy": saved(np.array([True, False, True, True])),
}
DIRECTORY: Files = FEATURES | {
  "sequences.txt": b"ann 0 1 2\nbob 3 2 1 0\n\xc5\xbeo 2 2 3\n",
  "timestamps.txt": b"ann 1 2 3.5\nbob 0 1e3 2000 2000\n\xc5\xbeo -1 5 6\n",
}
USERS: Files = {"users.txt": "Ann Lee\n7\n\u017do\n".encode()}
ASKED_IDS = ("sku-1", "7", "a b", "\u0416")
ASKED: Files = {"asked.txt": b"ann sku-1 7\nbob 7\n\xc5\xbeo \xd0\x96 7 sku-1\n"}
ASKED_JSON: Files = {
  "asked.jsonl": b'{"user": "ann", "items": ["sku-1", 7]}\n{"user": 3, "items": ["a b"]}\n'
  b'{"items": ["7"], "user": "x"}\n',
}
RECBOLE: Files = {
  "tiny.inter": b"user_id:token\titem_id:token\ttimestamp:float\nu2\tb\t30\nu1\tc\t5\nu1\ta\t5\nu2\ta\t10\n"
  b"u1\tb\t1.5\nu2\tb\t2e1\nu1\tb\t99\n",
  "tiny.item": "item_id:token\tmovie_title:token_seq\ttext_emb:float_seq\taudio:float_seq\na\tFilm A\t1 2\t\n"
  "b\tFilm B\t3.5 -4e-1\t1 0 2\nc\tFilm \u010c\t0 0\t3 4 5\n".encode(),
}


SETTINGS = TokenizerSettings(
  modalities=(("text", 3), ("image", 2)), num_items=6, code_width=2, num_levels=3, num_codes=5, hidden=(4,)
)
STATISTICS = ("mean", "deviation")


def semantic_ids() -> SemanticIds:
  """A small artefact."""
  rng = np.random.default_rng(0)
  codes = rng.integers(5, size=(4, 6, 3)).astype(np.int32)
  return SemanticIds(
    streams=("text", "image", "id", "fused"),
    codes=np.stack([np.arange(6) % 5, np.arange(6) // 5, np.arange(6) % 2], axis=1).astype(np.int32),
    stream_codes=codes,
    present=rng.random((4, 6)) < 0.6,
    codebooks=rng.normal(size=(1, 3, 5, 2)).astype(np.float32),
    data_hash="0123abcd 4567cdef",
    item_ids=ItemIds([f"sku-{item}" for item in range(6)]),
    settings=dataclasses.asdict(SETTINGS),
    encoder={
      "item_id": rng.normal(size=2).astype(np.float32),
      **{f"{part}/{name}": np.ones(width, np.float32) for name, width in SETTINGS.modalities for part in STATISTICS},
      **{
        f"params/behaviour_encoders_{name}/Dense_{layer}/{part}": rng.normal(size=shape).astype(np.float32)
        for name, width in SETTINGS.modalities
        for layer, shapes in enumerate((((width, 4), 4), ((4, 2), 2)))
        for part, shape in zip(("kernel", "bias"), shapes, strict=True)
      },
    },
  )


def show_ids(ids: SemanticIds) -> Any:
  """What an artefact holds."""
  arrays = {name: plain(getattr(ids, name)) for name in ("codes", "stream_codes", "present", "codebooks")}
  encoder = {name: plain(array) for name, array in sorted(ids.encoder.items())}
  settings = json.dumps(ids.settings, sort_keys=True)
  return list(ids.streams), ids.data_hash, ids.item_ids.to_json(), settings, arrays, encoder


def folder_of(save: Callable[[pathlib.Path], None]) -> Files:
  """The files that `save` writes into a folder."""
  with tempfile.TemporaryDirectory() as folder:
    save(pathlib.Path(folder))
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(folder).iterdir())}


FIGURES = {
  "split_hash": "0123abcd",
  "features_hash": "4567cdef",
  "ids_hash": "89ab",
  "times_hash": None,
  "titles_hash": None,
}
RESULTS: dict[str, Any] = {
  "model": "dense head",
  "data": {
    "name": "tiny", "source": "synthetic", "users": 3, "items": 4, "interactions": 10, "split_hash": "0123abcd"
  },
  **{part: {name: 0.25 for name in SHOWN} for part in PARTS},
  "best_step": 40,
  "steps": 120,
  "seconds": {"tokenizer": 1.0, "recommender": 2.5, "evaluation": 0.5},
}  # fmt: skip


def save_run(folder: pathlib.Path) -> None:
  """The JSON files of a workdir."""
  config = default_config()
  config.data.source, config.data.path, config.data.modalities = "directory", "data/tiny", ("text", "image")
  claim(folder, config, FIGURES)
  write_json(folder / "results.json", RESULTS)
  check_fingerprint(folder, semantic_ids())
  write_json(folder / "health.json", {"usage": [1.0, 0.5], "num_codes": 5, "seconds": 1.5})


def read_run(folder: pathlib.Path) -> Any:
  """Whether a run of this config and data may go on here; nothing is returned."""
  config = default_config()
  config.data.source, config.data.path, config.data.modalities = "directory", "elsewhere", ("text", "image")
  claim(folder, config, FIGURES)


def document(files: Files, name: str) -> Any:
  """What a JSON file holds, if its checksum says so."""
  if not isinstance(files[name], bytes):
    raise Bad
  found = json.loads(files[name].decode())
  if not isinstance(found, dict) or found != json.loads(sealed(found)):
    raise Bad
  del found["checksum"]
  return found


def expect_run(files: Files, valid: Files) -> None:
  """Nothing, if the file says of the run what the valid one says."""
  if document(files, "run.json") != document(valid, "run.json"):
    raise Bad


def expect_note(files: Files, fingerprint: str) -> None:
  """Nothing, if the file names the semantic IDs that there are."""
  if document(files, "recommender.json")["semantic_ids"] != fingerprint:
    raise Bad


def expect_results(files: Files) -> Any:
  """What a results file holds, whatever it is: no other file says what it should be."""
  return document(files, "results.json")


def forge_config(rng: np.random.Generator, files: Files) -> Files:
  """Damages the config of a run and makes the note of what the run is agree with it, as whoever forges one would."""
  content = damage_json(rng, files["config.json"])
  with contextlib.suppress(*NOTHING_THERE):
    fields = {name: value for name, value in flatten(json.loads(content)).items() if name not in CHANGEABLE}
    data = {name: value for name, value in document(files, "run.json").items() if name.startswith("data ")}
    files = files | {"run.json": sealed(fields | data)}
  return files | {"config.json": content}


def expect_forged_config(files: Files) -> Any:
  """The fields of a config, whatever they are, if it names no code outside the project."""
  found = flatten(document(files, "config.json"))
  if found["recommender.head"] not in HEADS or found["recommender.backbone"] not in BACKBONES:
    raise Bad
  return found


def expect_config(files: Files, valid: Files) -> Any:
  """The fields of a config that differs from the run's in nothing but what may change between two starts."""
  found, right = flatten(document(files, "config.json")), flatten(document(valid, "config.json"))
  same = found | {name: right[name] for name in CHANGEABLE} == right
  numbers = (type(found[name]) is int and 0 < found[name] < 2**63 for name in ("keep_checkpoints", "max_skipped"))
  factor = type(found["spike_factor"]) in (int, float) and 0 < found["spike_factor"] < 2**63
  named = type(found["data.path"]) is str and found["on_nonfinite"] in ("stop", "skip")
  if not same or not all(numbers) or not factor or not named:
    raise Bad
  return found


def parse_ids(files: Files) -> SemanticIds:
  """What the files of an artefact hold, whatever it is."""
  about = document(files, "semantic_ids.json")
  arrays = {name: whole_array(files[f"{name}.npy"]) for name in ("codes", "stream_codes", "present", "codebooks")}
  with zipfile.ZipFile(io.BytesIO(files["encoder.npz"])) as archive:
    encoder = {info.filename.removesuffix(".npy"): whole_array(archive.read(info)) for info in archive.infolist()}
  streams, data_hash, settings = (about[name] for name in ("streams", "data_hash", "settings"))
  item_ids = ItemIds(document(files, "item_ids.json")["items"])
  return SemanticIds(streams, data_hash=data_hash, item_ids=item_ids, settings=settings, encoder=encoder, **arrays)


def expect_ids(files: Files) -> Any:
  """What the artefact holds, if it is what `semantic_ids` made."""
  found = parse_ids(files)
  fingerprint = document(files, "semantic_ids.json")["fingerprint"]
  if show_ids(found) != show_ids(semantic_ids()) or fingerprint != semantic_ids().fingerprint:
    raise Bad
  return show_ids(found)


def reseal(rng: np.random.Generator, files: Files) -> Files:
  """Damages an artefact and gives it the fingerprint of what it then holds, as whoever forges one would."""
  name = ("codes.npy", "stream_codes.npy", "present.npy", "codebooks.npy", "semantic_ids.json")[rng.integers(5)]
  if name.endswith("json"):
    changes: tuple[Change, ...] = (damage_json,)
  else:
    changes = (damage_header, damage_numbers, damage_numbers, absurd_codes)
  files = files | {name: changes[rng.integers(len(changes))](rng, files[name])}
  with contextlib.suppress(*NOTHING_THERE):
    about = json.loads(files["semantic_ids.json"])
    about["fingerprint"] = parse_ids(files).fingerprint
    files["semantic_ids.json"] = sealed(about)
  return files


def absurd_codes(rng: np.random.Generator, content: bytes) -> bytes:
  """The array with an axis cut, repeated, added or taken away."""
  array = np.load(io.BytesIO(content), allow_pickle=False)
  axis = int(rng.integers(array.ndim))
  made = (
    np.repeat(array, 3, axis), np.take(array, [0], axis), np.take(array, [], axis), array[None], array[0],
    np.swapaxes(array, 0, axis), array.reshape(-1),
  )  # fmt: skip
  return saved(made[rng.integers(len(made))])


def expect_sound_ids(files: Files) -> Any:
  """What the artefact holds, if its arrays fit one another."""
  ids = parse_ids(files)
  streams, items, levels = ids.stream_codes.shape
  sets, same_levels, num_codes, width = ids.codebooks.shape
  fits = ids.codes.shape == (items, ids.codes.shape[1]) and ids.present.shape == (streams, items)
  fits = fits and same_levels == levels and sets in (1, streams) and 0 not in (*ids.codes.shape, levels, width)
  dtypes = [getattr(ids, name).dtype.str for name in ("codes", "stream_codes", "present", "codebooks")]
  whole = fits and dtypes == ["<i4", "<i4", "|b1", "<f4"] and np.isfinite(ids.codebooks).all()
  for codes in (ids.codes, ids.stream_codes):
    whole = whole and codes.min() >= 0 and codes.max() < num_codes
  named = len(ids.streams) == streams == len(set(ids.streams)) and ids.streams[-1] == "fused"
  if not whole or not named or not all(isinstance(name, str) and name for name in ids.streams):
    raise Bad
  if not isinstance(ids.settings, dict) or not isinstance(ids.data_hash, str):
    raise Bad
  return show_ids(ids)


def reseal_settings(rng: np.random.Generator, files: Files) -> Files:
  """Damages the settings of an artefact, or an array of its encoder, and gives it the fingerprint of that."""
  about = json.loads(files["semantic_ids.json"])
  if rng.random() < 0.7:
    about["settings"] = change_json(rng, about["settings"])
  else:
    files = files | {"encoder.npz": damage_archive(rng, files["encoder.npz"])}
  files = files | {"semantic_ids.json": sealed(about)}
  with contextlib.suppress(*NOTHING_THERE):
    about["fingerprint"] = parse_ids(files).fingerprint
    files["semantic_ids.json"] = sealed(about)
  return files


def read_settings(folder: pathlib.Path) -> Any:
  """The settings of a tokenizer that could quantize new items."""
  ids = SemanticIds.load(folder)
  settings = settings_from_json(ids.settings)
  check_arrays(settings, ids.encoder, ids.codebooks)
  return dataclasses.asdict(settings)


def expect_settings(files: Files) -> Any:
  """The fields that the artefact gives, if all are there and the arrays are as they must be."""
  ids = parse_ids(files)
  if ids.settings.keys() != dataclasses.asdict(SETTINGS).keys():
    raise Bad
  given = dict(ids.settings)
  given["modalities"] = tuple((name, width) for name, width in given["modalities"])
  given["hidden"] = tuple(given["hidden"])
  shapes = {name: (array.shape, array.dtype.str) for name, array in ids.encoder.items()}
  needed = {name: (array.shape, array.dtype.str) for name, array in semantic_ids().encoder.items()}
  if shapes != needed or not all(np.isfinite(array).all() for array in ids.encoder.values()):
    raise Bad
  if min(ids.encoder[f"deviation/{name}"].min() for name in ("text", "image")) <= 0:
    raise Bad
  return given


# --- raw data -------------------------------------------------------------------------------------------------------


def _rows() -> list[dict[str, Any]]:
  """A log of eight users and five items."""
  return [
    {"user": f"u {user}", "item": f"i{(user + step) % 5}", "time": 10**9 + 60 * step + user, "note": f"n, {step}"}
    for user in range(8)
    for step in range(4)
  ]


def _table(rows: list[dict[str, Any]], *, separator: str = ",") -> bytes:
  text = io.StringIO()
  writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", delimiter=separator)
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue().encode()


def _lines(rows: list[dict[str, Any]], *, literal: bool = False) -> bytes:
  return "".join((repr(row) if literal else json.dumps(row)) + "\n" for row in rows).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
  file = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
  return file.getvalue()


def _catalogue() -> list[dict[str, Any]]:
  return [
    {
      "id": f"i{item}",
      "title": f"It's {item}",
      "brand": "B" * item,
      "price": f"${item}.50",
      "categories": f"A > {item}",
    }
    for item in range(5)
  ]


CATEGORY = "Musical_Instruments"
RAW = {"log.csv": _table(_rows()), "items.csv": _table(_catalogue())}


def _dump(release: str) -> Files:
  """The files of a category as they are published: packed but in 2018, one object a line, or over many in 2018."""
  of, spread = RELEASES[release], release == "2018"
  log = [
    {of.log[kind]: row[kind] for kind in ("user", "item")}
    | {of.log["time"]: row["time"] * (1000 if release == "2023" else 1), of.log["rating"]: 5.0}
    for row in _rows()
  ]
  items = [
    {str(of.items["item_id"]): row["id"], "title": row["title"], of.items["category"][0]: [["A"], [row["brand"]]]}
    for row in _catalogue()
  ]
  reviews = "".join(json.dumps(row, indent=1 if spread else None) + "\n" for row in log).encode()
  files = {
    of.reviews[0].format(CATEGORY): reviews, of.meta[0].format(CATEGORY): _lines(items, literal=release == "2014")
  }  # fmt: skip
  return files if spread else {f"{name}.gz": gzip.compress(file, mtime=0) for name, file in files.items()}


def dump(release: str) -> Reader:
  """A category of one of the releases, of whose two files one is damaged."""
  files, log = _dump(release), RELEASES[release].reviews[0].format(CATEGORY)
  changes: tuple[Change, ...] = (damage_bytes, damage_fields)
  if release != "2018":
    changes, log = (damage_bytes, gzip_bomb, *map(compressed, changes)), f"{log}.gz"

  def prepare_dump(folder: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
    return prepare_category(
      folder, output, release=release, category=CATEGORY, max_bad=1.0, min_per_user=3, min_per_item=1
    )

  return Reader(files, in_files(tuple(files), changes, NO_FILE), prepared(prepare_dump, log), always("sound"), True)


def read_prepared(log: str, items: str) -> Callable[[pathlib.Path], Any]:
  """A reader that prepares a folder's log and item table."""
  return prepared(lambda folder, output: prepare(folder / log, output, items=folder / items, max_bad=1.0), log)


def prepared(make: Callable[[pathlib.Path, pathlib.Path], dict[str, Any]], log: str) -> Callable[[pathlib.Path], Any]:
  """A reader that makes a data set of a folder elsewhere, and holds what came of it against what went in."""

  def read(folder: pathlib.Path) -> Any:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
      output = pathlib.Path(name, "out")
      with unittest.mock.patch.object(card, "_draw"):  # Its pictures take longer than all else.
        report = make(folder, output)
      data = load_directory(output)
      first, last = report["steps"][0], report["steps"][-1]
      aside = {file: sum(reasons.values()) for file, reasons in report["quarantine"].items()}
      if data.interactions.num_interactions != last["interactions"] or data.num_items != last["items"]:
        raise AssertionError("what was written is not what was said")
      if report["rows"] > first["interactions"] + aside.get(log, 0):
        raise AssertionError(f"{report['rows']} rows, of which {first['interactions']} are used and {aside} set aside")
      kept = (output / "quarantine.jsonl").read_bytes().count(b"\n") if aside else 0
      if kept != sum(aside.values()):
        raise AssertionError("the rows set aside are not those counted")
      times = data.interactions.times  # None where the column's name was damaged.
      if data.interactions.num_users > 64 or not (times is None or np.isfinite(times).all()):
        raise AssertionError("users or times that were never there")
    return "sound"

  return read


def always(what: Any) -> Callable[[Files], Any]:
  """An expectation that does not depend on the files: soundness is looked at by what reads them."""
  return lambda files: what


def read_pictures(folder: pathlib.Path) -> Any:
  """The features of three pictures, of which one is damaged: that one is masked, or is as good as any."""
  encoder, broken = ColoursAndEdges(), ""
  for name in ("a.png", "b.jpg", "c.gif"):
    try:
      prepared = encoder.prepare(folder / name)
    except Exception as error:  # Whatever it is, `encode.features` masks the item and says so.
      if isinstance(error, MemoryError):
        raise
      broken = name
      continue
    vector = encoder.encode([prepared])
    if vector.shape != (1, encoder.width) or not np.isfinite(vector).all() or np.abs(vector).max() > 1 + 1e-6:
      raise AssertionError("features that are none")
  if broken:
    raise InputError(f"{broken}: expected a picture, got something else")
  return "sound"


def _picture(kind: str) -> bytes:
  file = io.BytesIO()
  PIL.Image.new("RGB", (8, 6), "red").save(file, kind)
  return file.getvalue()


def vectors(files: Files) -> dict[str, bytes]:
  """The records of a file of pictures' features, each item once."""
  content = files["x.b"]
  size = 10 + 4 * 4096
  if len(content) % size or not content:
    raise Bad
  found: dict[str, bytes] = {}
  for place in range(0, len(content), size):
    name = content[place : place + 10].rstrip(b"\0").decode("ascii")
    if not name.strip() or not name.isprintable():
      raise Bad
    found.setdefault(name, content[place + 10 : place + size])
  return {name: vector for name, vector in found.items() if name in ("B000000001", "B000000002")}


def read_vectors(folder: pathlib.Path) -> dict[str, bytes]:
  """The same by the program."""
  ids, found = read_image_features(folder / "x.b", {"B000000001", "B000000002"})
  return {name: vector.tobytes() for name, vector in zip(ids, found, strict=True)}


LISTS: Files = {"allow.txt": "sku-1\n 7\n\na b\n\u0416\n".encode(), "deny.txt": b"7\nsku-1\n"}


def read_lists(folder: pathlib.Path) -> list[list[int]]:
  """The items that alone may be recommended, and those that may not."""
  ids = ItemIds(ASKED_IDS)
  return [listed_items(f"@{folder / name}.txt", ids, flag=f"--{name}").tolist() for name in ("allow", "deny")]


def expect_lists(files: Files) -> list[list[int]]:
  """The same, by the independent reader."""
  known = {own: row for row, own in enumerate(ASKED_IDS)}
  allow, deny = ([known[line.strip()] for line in text_lines(files, name) if line.strip()] for name in LISTS)
  if not allow:
    raise Bad
  return [allow, deny]


MADE: Files = {
  "items.jsonl": b"".join(
    b'{"id": "%d", "title": "%s mug", "brand": "%s", "price": "ask"}\n' % (10 + k, word, word)
    for k, word in enumerate(WORDS)
  ),
  "sequences.txt": b"ann 0 1 2\nbob 3 2 1 0\n",
}
JOINED: Files = {"audio.npz": archive(ids=np.arange(13, 9, -1), vectors=IMAGE.astype(np.float32))}
# What `bbqrec features` learned of words: all 65,536 columns, two directions.
LEARNED: Files = {
  "text_words.npz": archive(
    prices=np.zeros(0),
    columns=np.arange(2**16),
    directions=np.stack([np.ones(2**16, np.float32), np.arange(2**16, dtype=np.float32) / 2**16]),
    rarity=np.ones(2**16),
  )
}


def make_features(folder: pathlib.Path, **given: Any) -> Dataset:
  """The data set of a folder with the features that are made of it, elsewhere."""
  chosen = {"text": "none", "image": "none", "attributes": "none"} | given
  with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
    copied = pathlib.Path(name, "made")
    copied.mkdir()
    for file in (*MADE, "features.json", "text_features.npy", "attributes_features.npy", "has_attributes.npy"):
      if (folder / file).is_file():
        shutil.copyfile(folder / file, copied / file)
    features(copied, **chosen)
    data = load_directory(copied)
    return dataclasses.replace(data, features={kind: np.array(array) for kind, array in data.features.items()})


def read_joined(folder: pathlib.Path) -> Any:
  """The vectors that are joined by ids: bytes and presence."""
  data = make_features(folder, join={"audio": folder / "audio.npz"})
  return plain(data.features["audio"]), data.present["audio"].tolist()


def expect_joined(files: Files) -> Any:
  """The same, by the independent reader."""
  with zipfile.ZipFile(io.BytesIO(files["audio.npz"])) as packed:
    (_, ids), (_, vectors) = sorted((info.filename, whole_array(packed.read(info))) for info in packed.infolist())
    if sorted(packed.namelist()) != ["ids.npy", "vectors.npy"] or ids.ndim != 1 or vectors.ndim != 2:
      raise Bad
  rows = [int(own) - 10 if own in ("10", "11", "12", "13") else -1 for own in map(str, ids.tolist())]
  known = [row for row in rows if row >= 0]
  if len(rows) != len(vectors) or len(set(known)) < len(known) or vectors.dtype.kind == "b":
    raise Bad
  found, present = np.zeros((4, vectors.shape[1]), np.float16), [row in known for row in range(4)]
  for row, vector in zip(rows, vectors, strict=True):
    if row >= 0:
      if not np.all(np.abs(vector.astype(np.float64)) <= 65504):
        raise Bad
      found[row] = vector.astype(np.float32)
  if len(np.unique(found[present], axis=0)) < 2:
    raise Bad  # All items that have it have the same.
  return plain(found), present


def read_sound(**given: Any) -> Callable[[pathlib.Path], str]:
  """A reader that makes features of a folder, which must be finite and of its items; {0} in a value is the folder."""

  def read(folder: pathlib.Path) -> str:
    chosen = {name: value.format(folder) for name, value in given.items() if name != "join"}
    join = {name: value.format(folder) for name, value in given.get("join", {}).items()}
    data = make_features(folder, join=join, **chosen)
    for name, array in data.features.items():
      there = data.present[name]
      if len(array) != 4 or not np.isfinite(array[there]).all() or array.dtype != np.float16 or not there.any():
        raise AssertionError(f"{name}: features that are none")
    return "sound"

  return read


def read_notes(folder: pathlib.Path) -> list[str]:
  """How the features of a folder were made; and making them again goes well, or is refused."""
  notes = [note for note in load_directory(folder).notes if " features by " in note]
  if not all(note.isprintable() for note in notes):
    raise AssertionError(f"signs that would change a terminal: {notes}")
  with contextlib.suppress(InputError):
    make_features(folder, text="tfidf", attributes="tfidf")
  return notes


def expect_notes(files: Files) -> list[str]:
  """The same, by the independent reader."""
  if files["features.json"] == MISSING:
    return []
  found = []
  for name in ("attributes", "text"):
    note = document(files, "features.json").get(name)
    if not isinstance(note, dict):
      continue
    told = f"{name} features by {note.get('made_by')}, fingerprint {note.get('fingerprint')}"
    found.append("".join(sign if sign.isprintable() else " " if sign.isspace() else ascii(sign)[1:-1] for sign in told))
  return found


def features_of_words() -> Files:
  """A small data set with features of its titles and brands, and the note of how they were made."""
  with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
    folder = pathlib.Path(name)
    write(folder, MADE)
    features(folder, image="none")
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".npz")}


def in_files(names: tuple[str, ...], changes: tuple[Change, ...], others: tuple[str, ...] = ()) -> tuple[Damage, ...]:
  """Damages of one file: each change of its content about as often as all that may stand in its place together."""

  def apply(change: Change | None) -> Damage:
    def damage(rng: np.random.Generator, files: Files) -> Files:
      name = names[rng.integers(len(names))]
      return files | {name: change(rng, files[name]) if change else others[rng.integers(len(others))]}

    return damage

  return tuple(apply(change) for change in (*changes, *((None,) if others else ())))


NO_FILE = (MISSING, FOLDER, PIPE, LOOP, HUGE)
ARRAY_CHANGES = (damage_bytes, damage_header, damage_header, damage_numbers, damage_numbers, pickled)


@functools.cache
def readers() -> dict[str, Reader]:
  """All of them by name."""
  plain_items, zipped_items = (
    {"items.jsonl": ITEMS.encode()},
    {"items.jsonl.gz": gzip.compress(ITEMS.encode(), mtime=0)},
  )
  ids, run = folder_of(semantic_ids().save), folder_of(save_run)

  def directory(name: str, changes: tuple[Change, ...], items: Files = plain_items) -> Reader:
    def read(folder: pathlib.Path) -> Any:
      return read_dataset(load_directory(folder))

    return Reader(DIRECTORY | items, in_files((name,), changes, NO_FILE), read, expect_directory)

  def recbole(name: str) -> Reader:
    def read(folder: pathlib.Path) -> Any:
      return read_dataset(load_recbole(folder))

    return Reader(RECBOLE, in_files((name,), (damage_bytes, damage_fields), NO_FILE), read, expect_recbole)

  def workdir(name: str, read: Callable[[pathlib.Path], Any], expect: Callable[[Files], Any]) -> Reader:
    # A workdir that lacks a file is that of a run that has not come so far.
    return Reader(run, in_files((name,), (damage_bytes, damage_json, pickled), NO_FILE[1:]), read, expect, True)

  lines = (damage_bytes, damage_fields, damage_json_line)
  return {
    "sequences.txt": directory("sequences.txt", (damage_bytes, damage_fields)),
    "timestamps.txt": directory("timestamps.txt", (damage_bytes, damage_fields)),
    "users.txt": directory("users.txt", (damage_bytes, damage_fields), plain_items | USERS),
    "items.jsonl": directory("items.jsonl", lines),
    "items.jsonl.gz": directory(
      "items.jsonl.gz", (damage_bytes, gzip_bomb, *map(compressed, lines)), zipped_items
    ),
    "features.npy": directory("text_features.npy", ARRAY_CHANGES),
    "has.npy": directory("has_image.npy", ARRAY_CHANGES),
    "new items' features": Reader(
      FEATURES,
      in_files(("text_features.npy", "image_features.npy", "has_image.npy"), ARRAY_CHANGES, NO_FILE),
      read_new_items,
      expect_new_items,
    ),
    "asked histories, text": Reader(
      ASKED, in_files(("asked.txt",), (damage_bytes, damage_fields), NO_FILE),
      lambda folder: read_asked(folder / "asked.txt"), expect_asked,
    ),
    "asked histories, JSON": Reader(
      ASKED_JSON, in_files(("asked.jsonl",), (damage_bytes, damage_json_line), NO_FILE),
      lambda folder: read_asked(folder / "asked.jsonl"), expect_asked,
    ),
    "RecBole .inter": recbole("tiny.inter"),
    "RecBole .item": recbole("tiny.item"),
    "logs, CSV": Reader(
      RAW, in_files(("log.csv",), (damage_bytes, damage_fields), NO_FILE), read_prepared("log.csv", "items.csv"),
      always("sound"), True,
    ),
    "logs, TSV": Reader(
      RAW | {"log.tsv": _table(_rows(), separator="\t")},
      in_files(("log.tsv",), (damage_bytes, damage_fields), NO_FILE), read_prepared("log.tsv", "items.csv"),
      always("sound"), True,
    ),
    "logs, Parquet": Reader(
      RAW | {"log.parquet": _parquet(_rows())}, in_files(("log.parquet",), (damage_bytes,), NO_FILE),
      read_prepared("log.parquet", "items.csv"), always("sound"), True,
    ),
    "logs, JSON": Reader(
      RAW | {"log.jsonl": _lines(_rows())},
      in_files(("log.jsonl",), (damage_bytes, damage_fields, damage_json_line), NO_FILE),
      read_prepared("log.jsonl", "items.csv"), always("sound"), True,
    ),
    "item tables, CSV": Reader(
      RAW, in_files(("items.csv",), (damage_bytes, damage_fields), NO_FILE), read_prepared("log.csv", "items.csv"),
      always("sound"), True,
    ),
    "item tables, literals": Reader(
      RAW | {"meta.json.gz": gzip.compress(_lines(_catalogue(), literal=True), mtime=0)},
      in_files(
        ("meta.json.gz",),
        (damage_bytes, gzip_bomb, compressed(damage_bytes), compressed(damage_fields)),
        NO_FILE,
      ),
      read_prepared("log.csv", "meta.json.gz"), always("sound"), True,
    ),
    **{f"dump of {release}": dump(release) for release in RELEASES},
    "asked histories, Parquet": Reader(
      {"asked.parquet": _parquet([{"user": "a", "items": ASKED_IDS[:2]}, {"user": "b", "items": ASKED_IDS[2:]}])},
      in_files(("asked.parquet",), (damage_bytes,), NO_FILE),
      lambda folder: bool(read_asked(folder / "asked.parquet")), always(True), True,
    ),
    "pictures": Reader(
      {"a.png": _picture("PNG"), "b.jpg": _picture("JPEG"), "c.gif": _picture("GIF")},
      in_files(("a.png", "b.jpg", "c.gif"), (damage_bytes,), NO_FILE), read_pictures, always("sound"), True,
    ),
    "pictures' features": Reader(
      {"x.b": b"".join(b"B%09d" % item + np.full(4096, item, "<f4").tobytes() for item in range(1, 4))},
      in_files(("x.b",), (damage_bytes,), NO_FILE), read_vectors, vectors,
    ),
    "item tables, Parquet": Reader(
      RAW | {"items.parquet": _parquet(_catalogue())}, in_files(("items.parquet",), (damage_bytes,), NO_FILE),
      read_prepared("log.csv", "items.parquet"), always("sound"), True,
    ),
    "item tables, JSON": Reader(
      RAW | {"items.jsonl": _lines(_catalogue())},
      in_files(("items.jsonl",), (damage_bytes, damage_fields, damage_json_line), NO_FILE),
      read_prepared("log.csv", "items.jsonl"), always("sound"), True,
    ),
    **{
      f"RecBole prepared, .{kind}": Reader(
        RECBOLE, in_files((f"tiny.{kind}",), (damage_bytes, damage_fields), NO_FILE),
        prepared(lambda folder, output: prepare(folder, output, max_bad=1.0), "tiny.inter"), always("sound"), True,
      )
      for kind in ("inter", "item")
    },
    "allow and deny files": Reader(
      LISTS, in_files(tuple(LISTS), (damage_bytes, damage_fields), NO_FILE), read_lists, expect_lists
    ),
    "vectors to join": Reader(
      MADE | JOINED, in_files(("audio.npz",), (damage_bytes, damage_archive, damage_archive, pickled), NO_FILE),
      read_joined, expect_joined, True,
    ),
    "vectors to join, Parquet": Reader(
      MADE | {"audio.parquet": _parquet([{"id": f"{10 + k}", "vector": [k, 2.0, -k]} for k in range(4)])},
      in_files(("audio.parquet",), (damage_bytes,), NO_FILE), read_sound(join={"audio": "{0}/audio.parquet"}),
      always("sound"), True,
    ),
    "words to be like": Reader(
      MADE | LEARNED, in_files(("text_words.npz",), (damage_bytes, damage_archive, damage_archive, pickled), NO_FILE),
      read_sound(text="tfidf", like="{0}"), always("sound"), True,
    ),
    "features.json": Reader(
      features_of_words(), in_files(("features.json",), (damage_bytes, damage_json, pickled), NO_FILE), read_notes,
      expect_notes, True,
    ),
    "artefact arrays": Reader(
      ids,
      in_files(("codes.npy", "stream_codes.npy", "present.npy", "codebooks.npy"), ARRAY_CHANGES, NO_FILE),
      lambda folder: show_ids(SemanticIds.load(folder)), expect_ids, True,
    ),
    "artefact encoder.npz": Reader(
      ids, in_files(("encoder.npz",), (damage_bytes, damage_archive, damage_archive, pickled), NO_FILE),
      lambda folder: show_ids(SemanticIds.load(folder)), expect_ids, True,
    ),
    "artefact semantic_ids.json": Reader(
      ids, in_files(("semantic_ids.json",), (damage_bytes, damage_json, pickled), NO_FILE),
      lambda folder: show_ids(SemanticIds.load(folder)), expect_ids, True,
    ),
    "artefact item_ids.json": Reader(
      ids, in_files(("item_ids.json",), (damage_bytes, damage_json, pickled), NO_FILE),
      lambda folder: show_ids(SemanticIds.load(folder)), expect_ids, True,
    ),
    "artefact forged": Reader(
      ids, (reseal,), lambda folder: show_ids(SemanticIds.load(folder)), expect_sound_ids, True
    ),
    "tokenizer settings": Reader(ids, (reseal_settings,), read_settings, expect_settings, True),
    "run.json": workdir("run.json", read_run, lambda files: expect_run(files, run)),
    "config.json": workdir(
      "config.json", lambda folder: flatten(load_config(folder)), lambda files: expect_config(files, run)
    ),
    "config.json forged": Reader(
      run, (forge_config,), lambda folder: flatten(load_config(folder)), expect_forged_config, True
    ),
    "results.json": workdir(
      "results.json", load_results, expect_results
    ),
    "recommender.json": workdir(
      "recommender.json",
      lambda folder: check_fingerprint(folder, semantic_ids()),
      lambda files: expect_note(files, semantic_ids().fingerprint),
    ),
    "health.json": workdir(
      "health.json",
      lambda folder: tokenizer_figure(folder, "seconds"),
      lambda files: float(document(files, "health.json")["seconds"]),
    ),
  }  # fmt: skip


# --- a case ---------------------------------------------------------------------------------------------------------

# What an independent reader raises where there is nothing to load.
NOTHING_THERE = (
  Bad, ValueError, TypeError, AttributeError, KeyError, IndexError, SyntaxError, RecursionError, MemoryError, OSError,
  EOFError, RuntimeError, OverflowError, struct.error, zlib.error, zipfile.BadZipFile,
)  # fmt: skip


def write(folder: pathlib.Path, files: Files) -> None:
  """Lays the files of a case out in an empty folder."""
  for name, content in files.items():
    path = folder / name
    if isinstance(content, bytes):
      path.write_bytes(content)
    elif content == FOLDER:
      path.mkdir()
    elif content == PIPE:
      os.mkfifo(path)
    elif content == LOOP:
      path.symlink_to(name)
    elif content == HUGE:
      path.write_bytes(b"")
      os.truncate(path, 2**40)  # No block of it is ever written.


class Hang(BaseException):
  """The time of a case is over."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
  """Raises `Hang` after that time."""

  def stop(_signum, _frame):
    raise Hang

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def attempt(reader: Reader, files: Files) -> tuple[str, Any]:
  """("loaded", what), ("refused", the message) or ("wrong", how it went)."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write(folder, files)
    before = sorted(path.name for path in folder.iterdir())
    try:
      with limited(SECONDS):
        outcome = "loaded", reader.read(folder)
    except InputError as error:
      outcome = "refused", str(error)
    except (Exception, Hang) as error:
      return "wrong", f"{type(error).__name__}: {str(error)[:200]}"
    if sorted(path.name for path in folder.iterdir()) != before:
      return "wrong", "wrote a file"
  return ("wrong", MARK) if exploded() else outcome


def verdict(reader: Reader, files: Files) -> tuple[str, str]:
  """("loaded", ""), ("refused", the message) or ("wrong", why)."""
  try:
    expected, there = reader.expect(files), True
  except NOTHING_THERE:
    expected, there = None, False
  kind, what = attempt(reader, files)
  if kind == "refused" and (not what.isprintable() or len(what) > 2000):
    return "wrong", f"not one short line: {what[:200]!r}"
  if kind == "refused" and there and not reader.may_refuse:
    return "wrong", f"refused what is right: {what}"
  if kind == "loaded" and not there:
    return "wrong", f"loaded what cannot be: {str(what)[:200]}"
  if kind == "loaded" and what != expected:
    return "wrong", f"loaded {str(what)[:200]} for {str(expected)[:200]}"
  return kind, "" if kind == "loaded" else what


def damaged(name: str, case: int) -> Files:
  """The files of a case; those of case 0 are valid."""
  reader = readers()[name]
  if not case:
    return reader.files
  rng = np.random.default_rng([zlib.crc32(name.encode()), case])
  return reader.damages[rng.integers(len(reader.damages))](rng, reader.files)


def run_cases(name: str, first: int, last: int) -> tuple[Counter[str], list[str]]:
  """The verdicts of cases first..last - 1, and a line for each that is wrong."""
  counts, wrong = Counter[str](), []
  for case in range(first, last):
    kind, said = verdict(readers()[name], damaged(name, case))
    counts[kind] += 1
    if kind == "wrong":
      wrong.append(f"{name} case {case}: {said}")
  return counts, wrong


def limit_memory() -> None:
  """Lets this process have `MEMORY` more than it has: an allocation beyond fails at once, touched or not."""
  pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
  size = pages * resource.getpagesize() + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(name: str, cases: int) -> tuple[dict[str, Any], list[str]]:
  """The row of one reader: cases, loaded, refused, wrong; and what was wrong."""
  counts, wrong = Counter[str](), []
  context = multiprocessing.get_context("spawn")
  pool = None
  for first in range(0, cases, CHUNK):
    last = min(first + CHUNK, cases)
    pool = pool or concurrent.futures.ProcessPoolExecutor(1, context, initializer=limit_memory)
    try:
      found, lines = pool.submit(run_cases, name, first, last).result(timeout=60 + SECONDS * CHUNK)
    except (concurrent.futures.BrokenExecutor, TimeoutError) as error:
      # A death or a hang that no exception could end.
      found, lines = Counter(wrong=last - first), [f"{name} cases {first} to {last - 1}: {type(error).__name__}"]
      for process in list(pool._processes.values()):
        process.kill()
      pool = None
    counts += found
    wrong += lines
  if pool:
    pool.shutdown()
  return {"reader": name, "cases": cases, **{kind: counts[kind] for kind in ("loaded", "refused", "wrong")}}, wrong


def main(argv: list[str]) -> None:
  """Prints a line a reader and what was wrong, and writes the rows."""
  del argv
  options = flags.FLAGS
  rows = []
  unknown = sorted(set(options.readers) - readers().keys())
  if unknown:
    message = f"--readers: expected some of {'; '.join(readers())}, got {unknown[0]!r}; quote names that have a comma"
    refuse(InputError(message))
  for name in options.readers or readers():
    row, wrong = fuzz(name, options.cases)
    rows.append(row)
    print(f"{name:28s}  {row['loaded']:6d} loaded  {row['refused']:6d} refused  {row['wrong']:6d} wrong", flush=True)
    print(*wrong[: options.show], sep="\n", end="\n" if wrong else "", flush=True)
  if options.output:
    options.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
  sys.exit(1 if any(row["wrong"] for row in rows) else 0)


if __name__ == "__main__":
  flags.DEFINE_integer("cases", 1000, "Cases of each reader.", lower_bound=1)
  flags.DEFINE_list("readers", [], "Some of the readers alone, by name.")
  flags.DEFINE_integer("show", 20, "Lines about wrong cases, of each reader.")
  define_path("output", "The JSON file.", check=check_output)
  start(main)
