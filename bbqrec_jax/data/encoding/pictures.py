"""Pictures to vectors: by their colours and edges, or by a network of timm or open_clip."""

import concurrent.futures
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bbqrec_jax.data.preparation.quarantine import Quarantine
from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.files import check_file, local_path

_SIDE = 64  # Pixels that a picture is looked at with by `ColoursAndEdges`.
_CELLS = 4  # Parts of a side.
_MOST_PIXELS = 2**27  # Of a picture, before it is made smaller; one that says it has more is refused.


class PictureEncoder(Protocol):
  """Makes vectors of pictures.

  Attributes:
    name: the encoder and its settings, for the fingerprint.
    width: of the vectors.
  """

  name: str
  width: int

  def prepare(self, path: Path) -> Any:
    """What is needed of one picture; raises whatever comes of a broken one."""

  def encode(self, prepared: Sequence[Any]) -> np.ndarray:
    """The vectors [n, width] of pictures that `prepare` gave."""


def open_picture(path: Path, side: int) -> Any:
  """A picture, RGB, read no finer than is needed; a transparent one on white.

  Args:
    path: of the file.
    side: pixels that are needed of a side.

  Raises:
    InputError, ValueError, OSError: if it is no regular file, is broken, or is larger than any picture should be.
  """
  from PIL import Image

  check_file(path, what="a picture")
  with Image.open(path) as file:
    if file.width * file.height > _MOST_PIXELS or not file.width * file.height:
      raise ValueError(f"it has {file.width} x {file.height} pixels")
    file.draft("RGB", (2 * side, 2 * side))  # A large JPEG is decoded small.
    picture: Image.Image = file
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
      picture = picture.convert("RGBA")
      picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


class ColoursAndEdges:
  """Which colours there are and where, and which way edges run where: 248 numbers, each part of length one.

  A histogram of hue, saturation and value (6 x 3 x 4), the mean colour of each of 4 x 4 cells, and the directions of
  edges in them (8 each, as histograms of oriented gradients, Dalal and Triggs 2005). It tells a red mug from a blue one
  and a lamp from a plate, and knows nothing of what things are.
  """

  name = "plain colours and edges, version 1"
  width = 6 * 3 * 4 + _CELLS * _CELLS * 3 + _CELLS * _CELLS * 8

  def prepare(self, path: Path) -> np.ndarray:
    """The pixels [64, 64, 3] uint8 in RGB, and in hue, saturation and value beside them: [2, 64, 64, 3]."""
    small = open_picture(path, _SIDE).resize((_SIDE, _SIDE))
    return np.stack([np.asarray(small), np.asarray(small.convert("HSV"))])

  def encode(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
    """See `PictureEncoder`."""
    pixels = np.stack(prepared)
    count, step = len(pixels), _SIDE // _CELLS
    hue, saturation, value = np.moveaxis(pixels[:, 1].astype(np.int64), -1, 0)
    bins = (hue * 6 // 256 * 3 + saturation * 3 // 256) * 4 + value * 4 // 256
    rows = np.repeat(np.arange(count), _SIDE * _SIDE)
    histogram = np.bincount(rows * 72 + bins.ravel(), minlength=count * 72).reshape(count, 72)
    colours = pixels[:, 0].reshape(count, _CELLS, step, _CELLS, step, 3).mean(axis=(2, 4)) / 255
    grey = pixels[:, 0].astype(np.float32).mean(axis=-1)
    down, right = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(down, right)
    direction = np.floor(np.mod(np.arctan2(down, right), np.pi) / np.pi * 8).astype(np.int64) % 8
    cell = (np.arange(_SIDE) // step)[:, None] * _CELLS + np.arange(_SIDE) // step
    places = (np.arange(count)[:, None, None] * _CELLS**2 + cell) * 8 + direction
    edges = np.bincount(places.ravel(), weights=strength.ravel(), minlength=count * _CELLS**2 * 8)
    parts = (np.sqrt(histogram), colours.reshape(count, -1), np.sqrt(edges.reshape(count, -1)))
    return np.concatenate([_unit(part) for part in parts], axis=1).astype(np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
  lengths = np.linalg.norm(rows, axis=1, keepdims=True)
  return rows / np.where(lengths > 0, lengths, 1)


class _Network:
  """A network of PyTorch that makes vectors of pictures."""

  def __init__(self, model: Any, transform: Any, call: Any, name: str):
    import torch

    self._torch, self._transform, self._call = torch, transform, call
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    self._model = model.eval().to(self._device)
    self.name = name
    self.width = int(self.encode([self._transform(_grey())]).shape[1])

  def prepare(self, path: Path) -> Any:
    """See `PictureEncoder`."""
    return self._transform(open_picture(path, 512))

  def encode(self, prepared: Sequence[Any]) -> np.ndarray:
    """See `PictureEncoder`."""
    with self._torch.inference_mode():
      batch = self._torch.stack(list(prepared)).to(self._device)
      return self._call(self._model, batch).float().cpu().numpy()


def _grey() -> Any:
  from PIL import Image

  return Image.new("RGB", (64, 64), "grey")


def encode_pictures(
  encoder: PictureEncoder,
  folder: Path,
  names: Sequence[str],
  first: int,
  quarantine: Quarantine,
  pool: concurrent.futures.Executor,
) -> tuple[np.ndarray, np.ndarray]:
  """The features of some pictures.

  Args:
    encoder: that makes them.
    folder: of the pictures.
    names: of the files [n], "" for none.
    first: the number of the first among all.
    quarantine: gets those that are broken or not there.
    pool: that reads them.

  Returns:
    (features [n, D] float32, zeros where there is none; whether there are any, [n] bool).
  """

  def one(name: str) -> Any:
    try:
      return encoder.prepare(folder / name) if name else None
    except Exception as error:  # Broken pictures fail in as many ways as there are formats.
      return error

  features, present = np.zeros((len(names), encoder.width), np.float32), np.zeros(len(names), bool)
  with warnings.catch_warnings(action="ignore"):  # Of Pillow: of sizes below our own limit, of damage that it mends.
    prepared = list(pool.map(one, names))
  for place, value in enumerate(prepared):
    if isinstance(value, Exception):
      reason = "broken" if os.path.exists(folder / names[place]) else "not there"
      quarantine.add(names[place], first + place, reason, value)
    elif value is not None:
      present[place] = True
  if present.any():
    features[present] = encoder.encode([prepared[place] for place in np.flatnonzero(present)])
  return features, present


def picture_encoder(chosen: str, weights: str) -> PictureEncoder:
  """The encoder that is called `plain`, `timm:NAME` or `open_clip:NAME`.

  Args:
    chosen: its name.
    weights: the file of a network's weights, or the tag of published ones; "" is the network's usual ones.

  Raises:
    InputError: if there is none of that name, its library is not installed, or its weights cannot be had.
  """
  kind, _, name = chosen.partition(":")
  if chosen == "plain":
    return ColoursAndEdges()
  if kind not in ("timm", "open_clip") or not name:
    raise InputError(f"--image={chosen}: expected plain, timm:NAME, open_clip:NAME or none; correct it")
  try:
    return _timm(name, weights) if kind == "timm" else _open_clip(name, weights)
  except InputError:
    raise
  except ModuleNotFoundError as error:
    raise InputError(
      f"--image={chosen}: {error}: networks for pictures need pip install 'bbqrec_jax[image]'; --image=plain needs"
      " nothing"
    ) from None
  except Exception as error:  # Of a download without a network, a damaged file, an unknown name.
    raise InputError(
      f"--image={chosen}: the network could not be made: {' '.join(str(error).split())[:300]}; give its weights as a"
      " file with --weights=FILE, or take --image=plain"
    ) from None


def _timm(name: str, weights: str) -> PictureEncoder:
  import timm

  overlay = None
  if weights:
    file = local_path(weights, flag="weights")
    check_file(file, what="the file of the network's weights")
    overlay = {"file": str(file)}

  def make() -> Any:
    return timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)

  model = make()
  if weights:
    # timm passes over what a file lacks and leaves it random, which another random draw tells.
    pairs = zip(model.named_parameters(), make().parameters(), strict=True)
    random = [key for (key, one), other in pairs if not one.equal(other)]
    if random:
      raise InputError(
        f"--weights={weights}: expected the weights of timm's {name}, but it lacks {len(random)} of the network's"
        f" parameters, such as {random[0]}; give the network's own file, or the name of the network that this is of"
      )
  transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
  return _Network(model, transform, lambda model, batch: model(batch), f"timm {timm.__version__} {name}")


def _open_clip(name: str, weights: str) -> PictureEncoder:
  import open_clip

  tag = weights or next(iter(open_clip.list_pretrained_tags_by_model(name)), "")
  if not tag:
    raise ValueError(f"open_clip knows no published weights of {name}")
  model, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag)
  return _Network(
    model, transform, lambda model, batch: model.encode_image(batch), f"open_clip {open_clip.__version__} {name}"
  )
