"""Which items have titles with the same rare words, as lists of neighbours in bounded memory."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from bbqrec_jax.data.co_occurrence import keep_strongest
from bbqrec_jax.data.encoding.words import WORD

# Words of more titles tell little, and would take time with the square of that.
_MOST_TITLES = 1000
_ROWS = 1024


def similar_titles(titles: Sequence[str], *, count: int) -> tuple[np.ndarray, np.ndarray]:
  """The items whose titles are most like each item's.

  Likeness is the cosine of the sets of words, in any case, each word weighed by the log of how few titles have it
  (inverse document frequency, Spärck Jones, 1972).

  Args:
    titles: [N]; "" where an item has none.
    count: K, neighbours that are kept of each item, the most alike first.

  Returns:
    neighbours [N, K] int32, -1 where there are fewer, and cosines [N, K] float32, 0 there; K is 1 if no two titles
    share a word.
  """
  from sklearn.feature_extraction.text import CountVectorizer

  nothing = np.full((len(titles), 1), -1, np.int32), np.zeros((len(titles), 1), np.float32)
  try:
    vectorizer = CountVectorizer(binary=True, token_pattern=WORD, max_df=_MOST_TITLES, dtype=np.float32)
    words = vectorizer.fit_transform(titles).tocsr()
  except ValueError:  # There is no word.
    return nothing
  named = max(sum(map(bool, titles)), 1)
  rarity = np.log(named / np.asarray(words.sum(axis=0)).ravel())
  words = words.multiply(rarity.astype(np.float32)).tocsr()
  norm = np.sqrt(np.asarray(words.multiply(words).sum(axis=1)).ravel())
  scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
  words = (scipy.sparse.diags(scale) @ words).tocsr()
  neighbours = np.full((len(titles), count), -1, np.int32)
  cosines = np.zeros((len(titles), count), np.float32)
  for start in range(0, len(titles), _ROWS):
    table = (words[start : start + _ROWS] @ words.T).tocsr()
    table.setdiag(0, k=start)
    table.eliminate_zeros()
    keep_strongest(table, neighbours[start : start + _ROWS], cosines[start : start + _ROWS])
  return (neighbours, cosines) if np.any(neighbours >= 0) else nothing
