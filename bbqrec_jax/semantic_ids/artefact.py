"""The artefact of a tokenizer: one folder of semantic IDs, codebooks and encoders, which any program can read."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.utils.files import read_archive, read_array
from bbqrec_jax.utils.json_files import read_json, write_json

# Each with its dtype and shape; the letters are those of `SemanticIds`.
_ARRAYS = {
  "codes": (np.int32, "[items, levels]"),
  "stream_codes": (np.int32, "[streams, items, levels]"),
  "present": (np.bool_, "[streams, items]"),
  "codebooks": (np.float32, "[1 or streams, levels, codes, width]"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class SemanticIds:
  """Semantic IDs of a catalogue.

  Attributes:
    streams: names of the S streams: each modality, "id" if there is one, and "fused".
    codes: [N, L'] int32, each item's own ID: the codes of the streams that make it, after repair.
    stream_codes: [S, N, L] int32, what the quantizer chose for each stream, before any repair.
    present: [S, N] bool, False where an item lacks the modality.
    codebooks: [G, L, K, d] float32; G is 1 where all streams share them, S where each has its own.
    data_hash: of the features and histories that all this was learned from.
    item_ids: what the data calls the N items.
    settings: what the tokenizer was built from, the fields of `tokenizer.settings.TokenizerSettings`.
    encoder: what quantizes new items: parameters and feature statistics, arrays by name.
  """

  streams: tuple[str, ...]
  codes: np.ndarray
  stream_codes: np.ndarray
  present: np.ndarray
  codebooks: np.ndarray
  data_hash: str
  item_ids: ItemIds
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  encoder: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def num_codes(self) -> int:
    """K."""
    return self.codebooks.shape[2]

  @property
  def modalities(self) -> tuple[str, ...]:
    """The streams that are modalities."""
    return tuple(name for name in self.streams if name not in ("id", "fused"))

  def check_data(self, data_hash: str, *, item_ids: ItemIds, where: object) -> None:
    """Refuses IDs that were learned from other data.

    Raises:
      InputError: if `data_hash` is not theirs (names both), or they are of other items than `item_ids`.
    """
    if data_hash != self.data_hash:
      raise InputError(
        f"{where} holds semantic IDs of other data: they were learned from {self.data_hash}, this run's split and"
        f" features are {data_hash}; leave tokenizer.artefact empty to train one on this data, in another workdir"
      )
    if len(item_ids) != len(self.codes):
      raise InputError(
        f"{where} holds semantic IDs of {len(self.codes)} items, this run's data has {len(item_ids)}; leave"
        " tokenizer.artefact empty to train a tokenizer on this data"
      )
    self.check_items(item_ids, where=where, mend="leave tokenizer.artefact empty to train one on this data")

  def check_items(self, known: ItemIds, *, where: object, mend: str) -> None:
    """Refuses other items than `known`, which there are no more of than here; as text, so that 3 is "3"."""
    ours, theirs = self.item_ids.to_json()[: len(known)], known.to_json()
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
      if str(mine) != str(other):
        raise InputError(f"{where}: row {row} is item {shown(str(mine))}, expected {shown(str(other))}; {mend}")

  def check_extension(self, known: "SemanticIds", *, where: object) -> None:
    """Refuses IDs that are not another artefact's with new items after the known ones.

    Raises:
      InputError: if a known item has other codes here, or the codebooks differ.
    """
    first = len(known.codes)
    pairs = (
      (self.codes[:first], known.codes),
      (self.stream_codes[:, :first], known.stream_codes),
      (self.present[:, :first], known.present),
      (self.codebooks, known.codebooks),
    )
    if self.streams != known.streams or not all(np.array_equal(ours, theirs) for ours, theirs in pairs):
      raise InputError(
        f"{where} does not extend the semantic IDs that the recommender was trained on (fingerprint"
        f" {known.fingerprint}): make it from them with bbqrec assign"
      )
    self.check_items(known.item_ids, where=where, mend="make it from the run's own with bbqrec assign")

  @property
  def fingerprint(self) -> str:
    """16 hexadecimal digits that change with any code, codeword, setting, parameter or statistic, or with the data."""
    about = [self.streams, self.data_hash, self.item_ids.digest, dict(self.settings)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    arrays = [(name, getattr(self, name)) for name in _ARRAYS] + sorted(self.encoder.items())
    for name, values in arrays:
      array = np.ascontiguousarray(values)
      digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
      digest.update(array.tobytes())
    return digest.hexdigest()[:16]

  def stream_codebooks(self, stream: str) -> np.ndarray:
    """The codebooks of a stream, [L, K, d]."""
    return self.codebooks[self.streams.index(stream) % len(self.codebooks)]

  def vectors(self, stream: str) -> np.ndarray:
    """The quantized vectors of a stream [N, d] float32; zero rows where an item lacks it."""
    index = self.streams.index(stream)
    codes = self.stream_codes[index]
    codebooks = self.stream_codebooks(stream)
    total = sum(codebooks[level][codes[:, level]] for level in range(codes.shape[1]))
    return np.where(self.present[index][:, None], total, 0.0).astype(np.float32)

  def save(self, folder: pathlib.Path) -> None:
    """Writes `codes.npy` and the other arrays, `item_ids.json`, which says whose their rows are, and `encoder.npz`.

    Last comes `semantic_ids.json`; its presence says that all is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
      np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
    write_json(folder / "item_ids.json", {"items": self.item_ids.to_json()})
    np.savez(folder / "encoder.npz", **self.encoder)  # type: ignore[arg-type]
    about = {
      "streams": self.streams,
      "data_hash": self.data_hash,
      "settings": dict(self.settings),
      "fingerprint": self.fingerprint,
    }
    write_json(folder / "semantic_ids.json", about)

  @classmethod
  def exists(cls, folder: pathlib.Path) -> bool:
    """Whether `folder` holds a whole artefact."""
    return os.path.exists(folder / "semantic_ids.json")

  @classmethod
  def load(cls, folder: pathlib.Path) -> "SemanticIds":
    """Reads the folder; nothing in it is run.

    Raises:
      InputError: if a file is missing or damaged, the arrays do not fit one another, or they are not those that the
        fingerprint was taken of.
    """
    if not cls.exists(folder):
      raise InputError(
        f"{folder}: expected semantic IDs, the tokenizer/ folder of a run, found no semantic_ids.json; check the path"
      )
    try:
      about = read_json(folder / "semantic_ids.json")
      arrays: dict[str, Any] = {name: read_array(folder / f"{name}.npy") for name in _ARRAYS}
      arrays["item_ids"] = ItemIds.from_json(read_json(folder / "item_ids.json").get("items"))
      arrays["encoder"] = read_archive(folder / "encoder.npz")
      streams, data_hash, settings = about["streams"], about["data_hash"], about["settings"]
      fingerprint = about["fingerprint"]
      if not isinstance(streams, list) or not isinstance(data_hash, str) or not isinstance(settings, dict):
        raise ValueError("semantic_ids.json: expected streams, data_hash and settings, got values of other types")
      loaded = cls(streams=tuple(streams), data_hash=data_hash, settings=settings, **arrays)
      loaded.check()
    except (ValueError, KeyError) as error:
      raise InputError(
        f"{folder} holds no readable semantic IDs ({error}); delete the folder and run the tokenizer again"
      ) from error
    if loaded.fingerprint != fingerprint:
      raise InputError(
        f"{folder}: the arrays have fingerprint {loaded.fingerprint}, semantic_ids.json says {fingerprint}: a"
        " file was changed or damaged; delete the folder and run the tokenizer again"
      )
    return loaded

  def check(self) -> None:
    """Makes sure that the arrays fit one another: whoever writes an artefact can give any of them a fingerprint.

    Raises:
      ValueError: if a name, dtype, shape, code or codeword is none that a tokenizer writes.
    """
    names = self.streams
    if (
      not all(isinstance(name, str) and name for name in names)
      or len({*names}) < len(names)
      or names[-1:] != ("fused",)
    ):
      raise ValueError(f"streams: expected different names, the last of them fused, got {list(names)}")
    for name, (dtype, shape) in _ARRAYS.items():
      array = getattr(self, name)
      if array.dtype != dtype or array.ndim != shape.count(",") + 1 or 0 in array.shape:
        raise ValueError(f"{name}: expected {np.dtype(dtype)} {shape}, got {array.dtype} {list(array.shape)}")
    (items, _), (sets, levels, num_codes, _) = self.codes.shape, self.codebooks.shape
    expected = (len(names), items, levels)
    if self.stream_codes.shape != expected or self.present.shape != expected[:2] or sets not in (1, len(names)):
      shapes = {name: list(getattr(self, name).shape) for name in _ARRAYS}
      raise ValueError(f"expected arrays of {len(names)} streams, {items} items and {levels} levels, got {shapes}")
    if len(self.item_ids) != items:
      raise ValueError(f"item_ids: expected the ids of {items} items, got {len(self.item_ids)}")
    for name in ("codes", "stream_codes"):
      codes = getattr(self, name)
      if codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(f"{name}: expected codes in 0..{num_codes - 1}, got {codes.min()} to {codes.max()}")
    if not np.isfinite(self.codebooks).all():
      raise ValueError("codebooks: expected finite numbers, got others")
