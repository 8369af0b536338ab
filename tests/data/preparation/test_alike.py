"""Titles that say the same in other spelling are found, those of other sizes and brands are not."""

import time

import numpy as np
import pytest

from bbqrec_jax.data.preparation import alike as module
from bbqrec_jax.data.preparation.alike import alike

SAME = [
  ("Acme Shampoo 500ml", "Acme Shampoo 500 ml"),
  ("Batiste Dry Shampoo 5.05 oz. Tropical", "Batiste Tropical Dry Shampoo 5.05oz"),
  ("Smashbox Photo Finish Primer", "Smash Box Photo Finish Primer"),
  ("Colour pencils, set of 12", "Color Pencils - Set of 12"),
  ("Un-Wrinkle Peel Pads, 60 Count", "UN WRINKLE PEEL PADS 60 count"),
  ("USB chrager for laptops", "USB charger for laptops"),
  ("Gift card", "Gift card"),
]
OTHER = [
  ("Acme Shampoo 500 ml", "Acme Shampoo 250 ml"),
  ("Cotton shirt for men, long sleeves, S", "Cotton shirt for men, long sleeves, M"),
  ("Wireless headphones with microphone black", "Wireless headphones with microphone green"),
  ("Wireless headphones with long battery life", "Wireless headphones with long battery life Pro"),
  ("Guitar strings 9-42", "Guitar strings 10-46"),
  ("Red mug", "Oak table"),
  ("", ""),
  ("!!", "??"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_in_other_words_is_found(one, other):
  others = ["Blue lamp", "Oak table 3", "Acme soap"]
  assert alike([one, *others, other], np.array([1, 0, 0, 1, 1])) == [(0, 4)]
  assert alike([one, *others, other], np.array([1, 0, 0, 1, 0])) == [(0, 4)], "a brand that is not known"
  assert alike([one, *others, other], np.array([1, 0, 0, 1, 2])) == [], "two brands"


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_what_is_something_else_is_not(one, other):
  assert alike([one, other], np.zeros(2, int)) == []


def test_each_item_counts_once_and_the_first_like_it_is_named():
  titles = ["Red mug 3 l", "mug red 3l", "Red mug 4l", "RED MUG 3 L"]
  assert alike(titles, np.zeros(4, int)) == [(0, 1), (0, 3)]


def test_what_it_takes_grows_with_the_items_alone(monkeypatch):
  asked = []
  same = module._same
  monkeypatch.setattr(module, "_same", lambda one, other: asked.append(1) or same(one, other))
  for count in (1_000, 2_000):  # All share their words, their number and their brand.
    rng = np.random.default_rng(0)
    words = np.array(["red", "blue", "oak", "tin", "soft", "hard", "new", "old"])
    titles = [f"{' '.join(rng.choice(words, 6))} lamp 7" for _ in range(count)]
    asked.clear()
    begun = time.process_time()
    alike(titles, np.ones(count, int))
    assert len(asked) <= 30 * count
    assert time.process_time() - begun < 20
