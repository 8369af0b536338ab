"""What the tokenizer leaves behind: one folder that the recommender, and any other program, reads."""

import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from bbqrec_jax.errors import InputError
from bbqrec_jax.json_files import write_json

_ARRAYS = ("codes", "stream_codes", "present", "codebooks")


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
    settings: what the tokenizer was built from, the fields of `models.tokenizer.TokenizerSettings` and `repair`.
    encoder: what quantizes an item that was not there: parameters and feature statistics, arrays by name.
  """

  streams: tuple[str, ...]
  codes: np.ndarray
  stream_codes: np.ndarray
  present: np.ndarray
  codebooks: np.ndarray
  data_hash: str
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

  def check_data(self, data_hash: str, *, where: object) -> None:
    """Refuses IDs that were learned from other data.

    Raises:
      InputError: if `data_hash` is not theirs; names both.
    """
    if data_hash != self.data_hash:
      raise InputError(
        f"{where} holds semantic IDs of other data: they were learned from {self.data_hash}, this run's split and"
        f" features are {data_hash}; train a tokenizer on this data"
      )

  def check_extension(self, known: "SemanticIds", *, where: object) -> None:
    """Refuses IDs that are not another artefact's with new items after the known ones.

    Raises:
      InputError: if a known item has another ID here, or the codebooks differ.
    """
    first = len(known.codes)
    same = np.array_equal(self.codes[:first], known.codes) and np.array_equal(self.codebooks, known.codebooks)
    if not same or self.streams != known.streams:
      raise InputError(
        f"{where} does not extend the semantic IDs that the recommender was trained on (fingerprint"
        f" {known.fingerprint}): make it from them with python -m bbqrec_jax.assign"
      )

  @property
  def fingerprint(self) -> str:
    """16 hexadecimal digits that change with any code, codeword, setting, parameter or statistic, or with the data."""
    about = [self.streams, self.data_hash, dict(self.settings)]
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
    """Writes `codes.npy` and the other arrays, the encoder as `encoder.npz`, and last `semantic_ids.json`.

    Its presence says that all is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _ARRAYS:
      np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
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
    return (folder / "semantic_ids.json").exists()

  @classmethod
  def load(cls, folder: pathlib.Path) -> "SemanticIds":
    """Reads the folder.

    Raises:
      InputError: if a file is missing or damaged, or the arrays are not those that the fingerprint was taken of.
    """
    try:
      about = json.loads((folder / "semantic_ids.json").read_text(encoding="utf-8"))
      arrays = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _ARRAYS}
      with np.load(folder / "encoder.npz", allow_pickle=False) as encoder:
        arrays["encoder"] = {name: encoder[name] for name in encoder.files}
      loaded = cls(streams=tuple(about["streams"]), data_hash=about["data_hash"], settings=about["settings"], **arrays)
      fingerprint = about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
      raise InputError(
        f"{folder} holds no readable semantic IDs ({error}); delete the folder and run the tokenizer again"
      ) from error
    if loaded.fingerprint != fingerprint:
      raise InputError(
        f"{folder}: the arrays have fingerprint {loaded.fingerprint}, semantic_ids.json says {fingerprint}: a"
        " file was changed or damaged; delete the folder and run the tokenizer again"
      )
    return loaded
