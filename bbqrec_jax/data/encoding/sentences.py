"""Texts to vectors by a network of sentence-transformers."""

from collections.abc import Sequence

import numpy as np

from bbqrec_jax.errors import InputError


class Sentences:
  """Encodes texts as [n, width] float32 of length one.

  Attributes:
    name: the encoder, for the fingerprint.
    width: of the vectors.
    limit: tokens of a text that it reads; 0 where it does not say.
  """

  def __init__(self, model: str, *, batch_size: int):
    """Loads the network.

    Args:
      model: its name, or a folder that holds it: then nothing is downloaded.
      batch_size: texts at once.

    Raises:
      InputError: if the library is not installed, or the network cannot be had.
    """
    self._batch_size = batch_size
    try:
      import sentence_transformers

      self._model = sentence_transformers.SentenceTransformer(model)
    except ModuleNotFoundError as error:
      raise InputError(
        f"--text=sentence-transformers:{model}: {error}: pip install 'bbqrec_jax[text]'; --text=tfidf needs nothing"
      ) from None
    except Exception as error:  # Of a download without a network, or a folder of something else.
      raise InputError(
        f"--text=sentence-transformers:{model}: the network could not be loaded: {' '.join(str(error).split())[:300]};"
        " give the folder that holds it, or take --text=tfidf"
      ) from None
    self.name = f"sentence-transformers {sentence_transformers.__version__} {model}"
    self.width = int(self._encode(["width"]).shape[1])
    told = callable(getattr(self._model, "tokenizer", None))
    self.limit = int(getattr(self._model, "max_seq_length", None) or 0) if told else 0

  def encode(self, texts: Sequence[str]) -> np.ndarray:
    """The vectors [n, width] of texts; zero for empty ones."""
    vectors = np.zeros((len(texts), self.width), np.float32)
    here = [place for place, text in enumerate(texts) if text]
    if here:
      vectors[here] = self._encode([texts[place] for place in here])
    return vectors

  def cut(self, texts: Sequence[str]) -> int:
    """How many of the texts are longer than the network reads, which is `limit` tokens."""
    if not self.limit or not texts:
      return 0
    tokens = self._model.tokenizer(list(texts), truncation=True, max_length=self.limit + 1)["input_ids"]
    return sum(len(one) > self.limit for one in tokens)

  def _encode(self, texts: Sequence[str]) -> np.ndarray:
    return self._model.encode(
      list(texts),
      batch_size=self._batch_size,
      convert_to_numpy=True,
      normalize_embeddings=True,
      show_progress_bar=False,
    )
