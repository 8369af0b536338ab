"""Texts to vectors without any network: hashed words, weighed by how rare they are, projected to their main directions.

TF-IDF and a truncated singular value decomposition (latent semantic analysis, Deerwester et al. 1990), by scikit-learn.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

_HASHED = 2**16  # Columns before the projection: words that share one are rare.
_FITTED = 50_000  # Texts that the projection is fitted on, spread over the catalogue.
WORD = r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"  # Signs of Chinese and Japanese are words.


class HashedWords:
  """Encodes texts, or lists of tokens, as [n, width] float32 of length one; zero where there is no word."""

  def __init__(self, *, width: int, seed: int, tokens: bool = False):
    """Knows no words yet.

    Args:
      width: of the vectors; fewer where the texts do not have as many directions.
      seed: of the projection.
      tokens: whether a text comes as a list of tokens; else words and pairs of words are taken.
    """
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

    self.width, self._seed = width, seed
    how: dict[str, Any] = {"analyzer": _as_it_is} if tokens else {"token_pattern": WORD, "ngram_range": (1, 2)}
    self._hash = HashingVectorizer(n_features=_HASHED, norm=None, dtype=np.float32, alternate_sign=False, **how)
    self._weigh = TfidfTransformer(sublinear_tf=not tokens)
    self._columns, self._directions = np.zeros(0, np.int64), np.zeros((0, 0), np.float32)

  def fit(self, texts: Callable[[], Iterable[Any]], count: int) -> None:
    """Learns how rare words are, and the main directions.

    Args:
      texts: gives all texts, as often as it is called.
      count: of texts.
    """
    from sklearn.utils.extmath import randomized_svd

    step = max(1, -(-count // _FITTED))
    hashed = self._hash.transform(itertools.islice(texts(), 0, None, step))
    weighed = self._weigh.fit_transform(hashed)
    self._columns = np.flatnonzero(weighed.getnnz(axis=0))
    weighed = weighed[:, self._columns]
    width = max(1, min(self.width, *weighed.shape))
    _, strengths, directions = randomized_svd(
      weighed, n_components=width, n_iter=4, random_state=self._seed, flip_sign=True
    )
    kept = strengths > 1e-5 * max(float(strengths[0]), 1e-30)
    self._directions = directions[kept].astype(np.float32)
    self.width = len(self._directions)

  def arrays(self) -> dict[str, np.ndarray]:
    """What was learned, by name, for `restore`."""
    return {"columns": self._columns, "directions": self._directions, "rarity": np.asarray(self._weigh.idf_)}

  def restore(self, arrays: dict[str, np.ndarray]) -> None:
    """Knows what another, made in the same way, had learned.

    Raises:
      ValueError: if that is not what `arrays` hold.
    """
    columns, directions, rarity = (arrays[name] for name in ("columns", "directions", "rarity"))
    fits = directions.ndim == 2 and columns.shape == directions.shape[1:] and rarity.shape == (_HASHED,)
    if not fits or columns.dtype.kind != "i" or np.any((columns < 0) | (columns >= _HASHED)):
      raise ValueError(f"expected directions of {_HASHED} columns, got {list(directions.shape)}")
    self._columns, self._directions = columns, directions.astype(np.float32)
    self._weigh.idf_ = rarity.astype(np.float64)
    self.width = len(directions)

  def encode(self, texts: Sequence[Any]) -> np.ndarray:
    """The vectors [n, width] of texts."""
    return self.encode_known(texts)[0]

  def encode_known(self, texts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """The vectors [n, width] of texts, and which texts have words that were learned [n] bool.

    Of those, too, a vector may be zero, where none of the main directions is that of its words.
    """
    weighed = self._weigh.transform(self._hash.transform(texts), copy=False)[:, self._columns]
    vectors = np.asarray(weighed @ self._directions.T, np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 1e-12, lengths, 1), weighed.getnnz(axis=1) > 0


def _as_it_is(tokens: list[str]) -> list[str]:
  return tokens
