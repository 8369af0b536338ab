"""Features of the items of a data set: of their texts, pictures and attributes, and of arrays joined by their ids."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import bbqrec_jax
from bbqrec_jax.data.amazon_reviews.image_features import read_image_features
from bbqrec_jax.data.directory import read_items as read_checked
from bbqrec_jax.data.encoding.catalogue import attributes_of, items_file, read_items, text_of
from bbqrec_jax.data.encoding.pictures import encode_pictures, picture_encoder
from bbqrec_jax.data.encoding.sentences import Sentences
from bbqrec_jax.data.encoding.settings import FeatureSettings
from bbqrec_jax.data.encoding.store import check_ours, fill, is_made, made
from bbqrec_jax.data.encoding.words import HashedWords
from bbqrec_jax.data.features import LARGEST, check_name
from bbqrec_jax.data.files import require_folder
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.data.preparation.card import note_features
from bbqrec_jax.data.preparation.items import Pictures
from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.errors import InputError, printable, shown
from bbqrec_jax.utils.files import is_given, local_path, read_archive, unfinished
from bbqrec_jax.utils.json_files import read_json
from bbqrec_jax.utils.messages import say, warn
from bbqrec_jax.utils.settings import from_config

_PRICES = 10  # Bins of as many items each.
BROKEN = "broken_pictures.jsonl"


def features(folder: str | Path, *, join: Mapping[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
  """Makes the features of a data set's items, as far as `items.jsonl.gz` says anything of them.

      bbqrec_jax.features("shop")
      bbqrec_jax.features("shop", text="sentence-transformers:all-MiniLM-L6-v2", image="none")
      bbqrec_jax.features("shop", join={"audio": (ids, vectors)})

  What was made already, from the same by the same, stays; what was begun is gone on with.

  Args:
    folder: of the data set; gets `text_features.npy`, `image_features.npy` and `attributes_features.npy` with
      `has_*.npy`, and `features.json`, which says how they were made.
    join: further modalities by name: (ids, vectors [n, D]), or a file of them, .npz with `ids` and `vectors`,
      .parquet with a column of ids and one of lists, or the .b that came with Amazon's reviews of 2014.
    **settings: fields of `FeatureSettings`.

  Returns:
    By modality, how many items have it.

  Raises:
    InputError: if there is nothing to make features of, or what is to make them is not there.
  """
  folder = require_folder(folder)
  chosen = _settings(settings)
  item_ids, titles = read_checked(folder)
  job = _Job(folder, chosen, item_ids or ItemIds.numbered(len(titles)), items_file(folder))
  found = {}
  for name, array in (join or {}).items():
    found[name] = job.join(name, array)
  have = job.survey()
  for name, wanted, make in (
    ("text", chosen.text, job.text),
    ("image", chosen.image, job.image),
    ("attributes", chosen.attributes, job.attributes),
  ):
    if wanted == "none":
      continue
    if not have[name]:
      if wanted != getattr(FeatureSettings(), name):
        raise InputError(f"{job.source}: expected something for --{name}={wanted} to read, found nothing; leave it out")
      continue
    found[name] = make()
  found = {name: count for name, count in found.items() if count}
  noted = made(folder)
  note_features(
    folder,
    [
      (name, printable(str(noted[name].get("made_by"))), count, _left_out(noted[name])) for name, count in found.items()
    ],
  )
  if not found:
    raise InputError(
      f"{job.source}: expected titles, descriptions, brands, categories, prices or images that tell items apart, found"
      " none; bbqrec prepare LOG --items=TABLE --images=FOLDER takes them in"
    )
  return found


def _settings(given: dict[str, Any]) -> FeatureSettings:
  """The settings, checked.

  Raises:
    InputError: if one is unknown or wrong.
  """
  fields = {field.name: field.default for field in dataclasses.fields(FeatureSettings)}
  try:
    return from_config(FeatureSettings, fields | given)
  except InputError as error:
    raise InputError(str(error).replace("config field ", "--").replace("--help-config", "--help")) from None


class _Job:
  """The features of one data set."""

  def __init__(self, folder: Path, settings: FeatureSettings, item_ids: ItemIds, source: Path):
    self.folder, self.settings, self.item_ids, self.source = folder, settings, item_ids, source
    self._count = len(item_ids)
    self._source_hash = _hash_file(source)
    self._prices: list[float] = []
    self._bounds = np.zeros(0)  # Of the bins of prices.
    self._no_prices = 0  # Items with a price that is none.

  def survey(self) -> dict[str, int]:
    """How many items have something for each modality."""
    have = {"text": 0, "image": 0, "attributes": 0}
    for record in read_items(self.source):
      tokens, price = attributes_of(record)
      have["text"] += bool(text_of(record))
      have["image"] += bool(self.settings.images or _picture_named(record))
      have["attributes"] += bool(tokens) or price is not None
      if price is not None:
        self._prices.append(price)
      self._no_prices += price is None and record.get("price") not in (None, "")
    return have

  def _note(self, name: str, made_by: str, **more: Any) -> dict[str, Any]:
    """What is noted of how features were made."""
    note = {"made_by": made_by, "source": self._source_hash, "version": bbqrec_jax.__version__} | more
    parts = [name, *(f"{key}={value}" for key, value in sorted(note.items()) if key != "version")]
    return note | {"fingerprint": hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]}

  def _stands(self, name: str, note: dict[str, Any]) -> bool:
    check_ours(self.folder, name)
    if is_made(self.folder, name, note["fingerprint"]):
      say(f"{name}: is there already, fingerprint {note['fingerprint']}")
      self._warn(name, made(self.folder)[name])
      return True
    return False

  def _warn(self, name: str, note: dict[str, Any]) -> None:
    """Says what was left out of a modality."""
    for what, count in _left_out(note).items():
      warn(f"{name}: {count:,} {what}")

  def _said(self, name: str, held: np.ndarray, note: dict[str, Any], width: int) -> int:
    self._warn(name, note)
    if not held.any():
      warn(f"{name}: all items that have it have the same, which tells nothing of them; it is left out")
      return 0
    say(
      f"{name}: {int(held.sum()):,} of {self._count:,} items, width {width}, by {note['made_by']}, fingerprint"
      f" {note['fingerprint']}"
    )
    return int(held.sum())

  def _present(self, name: str) -> int:
    array = np.load(self.folder / f"{name}_features.npy", mmap_mode="r", allow_pickle=False)
    mask = self.folder / f"has_{name}.npy"
    return int((np.load(mask, allow_pickle=False) if is_given(mask) else np.any(array, axis=1)).sum())

  def text(self) -> int:
    """Text features, and how many items have them."""
    s = self.settings
    kind, _, model = s.text.partition(":")
    if s.text == "tfidf":
      return self._words("text", HashedWords(width=s.text_width, seed=s.seed), self._texts, s.text_width)
    if kind != "sentence-transformers" or not model:
      raise InputError(f"--text={s.text}: expected tfidf, sentence-transformers:NAME or none; correct it")
    check_ours(self.folder, "text")
    encoder = Sentences(model, batch_size=s.batch_size)
    note = self._note("text", encoder.name, model=_hash_model(model))
    if self._stands("text", note):
      return self._present("text")
    cut = sum(map(encoder.cut, _batched(self._texts(), s.batch_size))) if encoder.limit else 0
    if cut:
      note["left_out"] = {f"texts are read no further than {encoder.limit} tokens": cut}

    def batches(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
      for batch in _batched(itertools.islice(self._texts(), first, None), s.batch_size):
        yield encoder.encode(batch), np.array(list(map(bool, batch)))

    held = fill(self.folder, "text", count=self._count, width=encoder.width, batches=batches, note=note)
    return self._said("text", held, note, encoder.width)

  def attributes(self) -> int:
    """Features of brands, categories and prices, and how many items have them."""
    s = self.settings
    words = HashedWords(width=s.attribute_width, seed=s.seed, tokens=True)
    return self._words("attributes", words, self._tokens, s.attribute_width)

  def _like(self, name: str) -> Path | None:
    """The file of what was learned of words for the data set that this one is to be like.

    Raises:
      InputError: if there is none.
    """
    if not self.settings.like:
      return None
    path = local_path(self.settings.like, flag="like") / f"{name}_words.npz"
    if not is_given(path):
      raise InputError(
        f"--like={self.settings.like}: expected {path.name}, which bbqrec features leaves beside the features that it"
        f" makes, found none; give another folder, or leave {name} out (--{name}=none)"
      )
    return path

  def _texts(self) -> Iterator[str]:
    return map(text_of, read_items(self.source))

  def _tokens(self) -> Iterator[list[str]]:
    for record in read_items(self.source):
      tokens, price = attributes_of(record)
      yield tokens if price is None else [*tokens, f"price={int(np.searchsorted(self._bounds, price, side='right'))}"]

  def _words(self, name: str, words: HashedWords, texts: Any, width: int) -> int:
    like = self._like(name)
    arrays = {} if like is None else read_archive(like)
    told = {} if like is None else {"like": _hash_file(like)}
    note = self._note(name, "hashed TF-IDF and SVD, version 2", width=width, seed=self.settings.seed, **told)
    if self._stands(name, note):
      return self._present(name)
    if name == "attributes" and self._no_prices:
      note["left_out"] = {"prices are no numbers": self._no_prices}
    if like is None:
      if self._prices:
        self._bounds = np.quantile(self._prices, np.linspace(0, 1, _PRICES + 1)[1:-1])
      words.fit(texts, self._count)
    else:
      try:
        self._bounds = np.sort(arrays.pop("prices")).astype(np.float64)
        words.restore(arrays)
      except (KeyError, ValueError, TypeError) as error:
        raise InputError(
          f"{like}: expected what bbqrec features learned of words, got something else ({error})"
        ) from None
    with open(unfinished(self.folder / f"{name}_words.npz"), "wb") as file:
      np.savez(file, prices=self._bounds, **words.arrays())  # type: ignore[arg-type]
    os.replace(unfinished(self.folder / f"{name}_words.npz"), self.folder / f"{name}_words.npz")

    def batches(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
      for batch in _batched(itertools.islice(texts(), first, None), 8192):
        yield words.encode_known(batch)

    held = fill(self.folder, name, count=self._count, width=words.width, batches=batches, note=note, mask=True)
    return self._said(name, held, note, words.width)

  def image(self) -> int:
    """Features of pictures, and how many items have them; broken pictures are told and masked.

    Raises:
      InputError: if an encoder was asked for and nothing says where the pictures are, or they are not there.
    """
    s = self.settings
    noted = self.folder / "preparation.json"
    given = s.images or (read_json(noted).get("images") if is_given(noted) else None)
    if not given:
      problem = "items name pictures, and nothing says in which folder they are"
      if s.image != FeatureSettings().image:
        raise InputError(f"{self.folder}: {problem}; say it with --images=FOLDER, or leave them out with --image=none")
      warn(f"image: {problem}; they are left out, --images=FOLDER takes them in")
      return 0
    root = local_path(given, flag="images")
    there, named = Pictures(root), map(_picture_named, read_items(self.source))
    pictures = [there.of(str(self.item_ids[row]), name) or name for row, name in enumerate(named)]
    check_ours(self.folder, "image")
    encoder = picture_encoder(s.image, s.weights)
    note = self._note("image", encoder.name, weights=_hash_model(s.weights), pictures=_hash_pictures(root, pictures))
    if self._stands("image", note):
      return self._present("image")
    quarantine = Quarantine(self.folder / BROKEN)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

      def batches(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        quarantine.reopen(before=first)
        for start in range(first, self._count, s.batch_size):
          encoded = encode_pictures(encoder, root, pictures[start : start + s.batch_size], start, quarantine, pool)
          quarantine.flush()  # Before these pictures are noted as done.
          yield encoded
        if counts := _by_reason(quarantine):
          note["left_out"] = {f"pictures are {reason}, see {BROKEN}": count for reason, count in counts.items()}

      try:
        held = fill(self.folder, "image", count=self._count, width=encoder.width, batches=batches, note=note, mask=True)
      finally:
        quarantine.close()
    return self._said("image", held, note, encoder.width)

  def _read_vectors(self, given: Any) -> tuple[list[Any], np.ndarray]:
    path = local_path(given, flag="join")
    if path.suffix == ".b":
      return read_image_features(path, set(map(str, self.item_ids.to_json())))
    return _read_vectors(path)

  def join(self, name: str, given: Any) -> int:
    """A modality of vectors that come with ids, and how many items have it.

    Raises:
      InputError: if they are none, or no item of the data set has any.
    """
    check_name(name, where="--join")
    check_ours(self.folder, name)
    ids, vectors = given if isinstance(given, tuple) else self._read_vectors(given)
    vectors = np.asarray(vectors)
    place = f"join {name}"
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or len(vectors) != len(ids) or not vectors.size:
      raise InputError(
        f"{place}: expected ids [n] and numbers [n, width], got {len(ids)} ids and {vectors.dtype}"
        f" {list(vectors.shape)}"
      )
    rows = self.item_ids.rows([str(one) for one in ids])
    known = np.flatnonzero(rows >= 0)
    if not len(known):
      raise InputError(
        f"{place}: expected ids of the data set's items, such as {shown(str(self.item_ids[0]))}, got none of them, the"
        f" first being {shown(str(ids[0]))}"
      )
    if len(np.unique(rows[known])) < len(known):
      twice = known[np.argmax(np.bincount(rows[known])[rows[known]] > 1)]
      raise InputError(f"{place}: expected each item once, got {shown(str(ids[twice]))} again; leave one out")
    wrong = ~np.all(np.abs(vectors[known].astype(np.float64)) <= LARGEST, axis=1)
    if wrong.any():
      bad = int(known[np.argmax(wrong)])
      raise InputError(f"{place} row {bad}: expected finite numbers, got others; leave the row out")
    note = self._note(name, "joined by id", vectors=hashlib.sha256(vectors.tobytes()).hexdigest()[:16])
    if self._stands(name, note):
      return self._present(name)
    place_of = np.full(self._count, -1, np.int64)
    place_of[rows[known]] = known

    def batches(first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
      for start in range(first, self._count, 8192):
        mine = place_of[start : start + 8192]
        yield vectors[mine].astype(np.float32), mine >= 0

    held = fill(self.folder, name, count=self._count, width=vectors.shape[1], batches=batches, note=note, mask=True)
    unknown = len(ids) - len(known)
    if unknown:
      say(f"{name}: {unknown:,} of {len(ids):,} vectors are of items that the data set does not have")
    return self._said(name, held, note, vectors.shape[1])


def _read_vectors(path: Path) -> tuple[list[Any], np.ndarray]:
  """The ids [n] and vectors [n, D] of a file.

  Raises:
    InputError: if it is none of the kinds.
  """
  if path.suffix == ".npz":
    arrays = read_archive(path)
    if arrays.keys() != {"ids", "vectors"} or arrays["ids"].ndim != 1:
      raise InputError(f"{path}: expected arrays ids [n] and vectors [n, width], got {', '.join(arrays)}; name them so")
    return arrays["ids"].tolist(), arrays["vectors"]
  if path.suffix in (".parquet", ".pq"):
    import pyarrow as pa
    import pyarrow.parquet

    try:
      table = pyarrow.parquet.read_table(path)
      columns = [column.to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError, ValueError) as error:
      raise InputError(f"{path}: expected a Parquet file, could not read one ({error})") from None
    lists = [field.name for field in table.schema if pa.types.is_list(field.type) or _is_fixed(field.type)]
    others = [field.name for field in table.schema if field.name not in lists]
    if len(lists) != 1 or len(others) != 1:
      raise InputError(
        f"{path}: expected a column of ids and one of lists, got {printable(', '.join(table.column_names))}"
      )
    held = dict(zip(table.column_names, columns, strict=True))
    rows = held[lists[0]]
    widths = {len(row or ()) for row in rows}
    if len(widths) != 1:
      raise InputError(f"{path} column {lists[0]!r}: expected lists of one length, got {sorted(widths)[:5]}")
    with np.errstate(over="ignore"):  # What is too large is infinite then, and refused.
      return held[others[0]], np.array(rows, np.float32)
  raise InputError(f"{path}: expected vectors with ids as .npz (ids, vectors), .parquet or .b, got another ending")


def _by_reason(quarantine: Quarantine) -> dict[str, int]:
  """How many pictures could not be used, by why."""
  counts: Counter[str] = Counter()
  for (_, reason), count in quarantine.counts.items():
    counts[reason] += count
  return dict(sorted(counts.items()))


def _left_out(note: dict[str, Any]) -> dict[str, int]:
  """What a note of `features.json` says was left out, by what it is."""
  told = note.get("left_out")
  if not isinstance(told, dict):
    return {}
  return {printable(what): count for what, count in told.items() if type(count) is int}


def _batched(values: Iterator[Any], size: int) -> Iterator[list[Any]]:
  while batch := list(itertools.islice(values, size)):
    yield batch


def _picture_named(record: dict[str, Any]) -> str:
  return str(record.get("image") or "")


def _is_fixed(kind: Any) -> bool:
  import pyarrow as pa

  return pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)


def _hash_file(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _hash_model(model: str) -> str:
  """What tells the files of a network from others: all of their bytes, where they are here; else its name."""
  path = Path(model)
  if not model or not path.exists():
    return model
  files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
  return hashlib.sha256("".join(map(_hash_file, files)).encode()).hexdigest()[:16]


def _hash_pictures(root: Path, names: list[str]) -> str:
  """Changes with any picture's name, size or time of change."""
  digest = hashlib.sha256()
  for name in names:
    try:
      status = (root / name).stat() if name else None
      digest.update(f"{name}\0{(status.st_size, status.st_mtime_ns) if status else ''}\n".encode())
    except OSError:
      digest.update(f"{name}\0missing\n".encode())
  return digest.hexdigest()[:16]
