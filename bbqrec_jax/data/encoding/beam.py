"""Features on more than one machine: of texts and pictures, as transforms of Apache Beam.

    pip install 'bbqrec_jax[beam]'

What comes out is what `bbqrec features` makes on one machine, to the byte.
"""

import concurrent.futures
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam import pvalue

from bbqrec_jax.data.encoding.pictures import encode_pictures, picture_encoder
from bbqrec_jax.data.encoding.words import HashedWords
from bbqrec_jax.data.preparation.beam_transforms import Collected

BROKEN = "broken"  # The tag of what is told of pictures that cannot be used.
_TEXTS, _PICTURES = 1024, 256  # That are encoded at once.


class EncodeTexts(beam.PTransform):
  """(id, text) -> (id, features [width] float16), by what `bbqrec features` learned of words."""

  def __init__(self, arrays: dict[str, np.ndarray], *, tokens: bool = False):
    """Takes the arrays of `HashedWords.arrays`, and whether a text is a list of tokens."""
    super().__init__()
    self._arrays, self._tokens = arrays, tokens

  def expand(self, texts: Any) -> Any:
    """See the class."""
    return (
      texts
      | beam.BatchElements(min_batch_size=1, max_batch_size=_TEXTS)
      | beam.ParDo(_TextsOf(self._arrays, tokens=self._tokens))
    )


class _TextsOf(beam.DoFn):
  def __init__(self, arrays: dict[str, np.ndarray], *, tokens: bool):
    self._arrays, self._tokens = arrays, tokens

  def setup(self) -> None:
    self._words = HashedWords(width=2, seed=0, tokens=self._tokens)
    self._words.restore(self._arrays)

  def process(self, batch: list[tuple[str, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    vectors = self._words.encode([text for _, text in batch]).astype(np.float16)
    yield from zip((name for name, _ in batch), vectors, strict=True)


class EncodePictures(beam.PTransform):
  """(id, name of a picture in the folder, "" for none) -> (id, (features [width] float16, whether there are any)).

  They are `features`; `broken`, tagged so, are `{"id", "file", "reason", "text"}` of pictures that are broken or not
  there, whose items have none: zeros. Every worker has to reach the folder, and the weights, by the same path.
  """

  def __init__(self, folder: str | Path, *, encoder: str = "plain", weights: str = ""):
    """Takes what `bbqrec features` calls `images`, `image` and `weights`."""
    super().__init__()
    self._given = str(folder), encoder, weights

  def expand(self, names: Any) -> Any:
    """See the class."""
    return (
      names
      | beam.BatchElements(min_batch_size=1, max_batch_size=_PICTURES)
      | beam.ParDo(_PicturesOf(*self._given)).with_outputs(BROKEN, main="features")
    )


class _PicturesOf(beam.DoFn):
  def __init__(self, folder: str, encoder: str, weights: str):
    self._folder, self._chosen, self._weights = folder, encoder, weights

  def setup(self) -> None:
    self._encoder = picture_encoder(self._chosen, self._weights)
    self._pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

  def teardown(self) -> None:
    self._pool.shutdown()

  def process(self, batch: list[tuple[str, str]]) -> Iterator[Any]:
    aside = Collected()
    names = [name for _, name in batch]
    features, present = encode_pictures(self._encoder, Path(self._folder), names, 0, aside, self._pool)
    for row, (item, _) in enumerate(batch):
      yield item, (features[row].astype(np.float16), bool(present[row]))
    for one in aside.rows:
      told = {"id": batch[one["row"]][0], "file": one["file"], "reason": one["reason"], "text": one["text"]}
      yield pvalue.TaggedOutput(BROKEN, told)
