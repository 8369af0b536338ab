"""Titles with the same rare words, against counting words item by item."""

import re

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bbqrec_jax.data import title_words
from bbqrec_jax.data.title_words import similar_titles


def by_hand(titles, most):
  """[N, N] cosines of the titles' sets of words."""
  words = [set(re.findall(r"\w+", title.lower())) for title in titles]
  named = sum(map(bool, titles))
  has = {word: sum(word in of for of in words) for of in words for word in of}
  weight = {word: np.log(named / number) for word, number in has.items() if number <= most}
  norm = [np.sqrt(sum(weight.get(word, 0) ** 2 for word in of)) for of in words]
  table = np.zeros((len(titles), len(titles)))
  for i, one in enumerate(words):
    for j, other in enumerate(words):
      if i != j and norm[i] and norm[j]:
        table[i, j] = sum(weight.get(word, 0) ** 2 for word in one & other) / norm[i] / norm[j]
  return table


@pytest.mark.parametrize("rows", [3, 1024])
@pytest.mark.parametrize("most", [5, 1000])
def test_neighbours_are_the_titles_most_alike(monkeypatch, rows, most):
  monkeypatch.setattr(title_words, "_ROWS", rows)
  monkeypatch.setattr(title_words, "_MOST_TITLES", most)
  rng = np.random.default_rng(0)
  titles = [" ".join(f"W{word}" for word in rng.integers(12, size=rng.integers(4))) for _ in range(20)]
  assert "" in titles
  neighbours, cosines = similar_titles(titles, count=4)
  table = by_hand(titles, most)
  assert_allclose(cosines, -np.sort(-table, axis=1)[:, :4], atol=1e-6)
  for row in range(20):
    near = neighbours[row][neighbours[row] >= 0]
    assert_allclose(table[row, near], cosines[row, : len(near)], atol=1e-6)
    assert np.count_nonzero(cosines[row]) == len(near)


@pytest.mark.parametrize("titles", [(), ("",) * 3, ("red", "blue", "!"), ("mug", "mug")])
def test_titles_that_say_nothing_have_no_neighbours(titles):
  neighbours, cosines = similar_titles(titles, count=4)
  assert neighbours.shape == cosines.shape == (len(titles), 1)
  assert np.all(neighbours == -1)
  assert not cosines.any()


def test_signs_of_languages_without_blanks_are_words():
  neighbours, _ = similar_titles(("赤い皿", "赤の本", "bowl", "bowl, ünïque"), count=1)
  assert neighbours[:, 0].tolist() == [1, 0, 3, 2]
