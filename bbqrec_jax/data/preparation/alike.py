"""Items that are probably one and the same, by their titles: spelled, spaced or ordered a little otherwise."""

import array
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rapidfuzz import fuzz

_WORD = re.compile(r"\d+|[^\W\d_]+")  # 500ml is 500 and ml.
_READ = 300  # Characters of a title.
_LEAST = 92.0  # Of 100, how like one another two titles are.
_LEAST_OTHERS = 85.0  # And the words that they do not share: colour is color, S is not M.
_RARE = 3  # Words of a title that look for others like it: those that the fewest have.
_NEIGHBOURS = 10  # With which each is compared, of those that share such a word and all numbers.


def alike(titles: Sequence[str], brands: np.ndarray) -> list[tuple[int, int]]:
  """Pairs of items whose titles say nearly the same, all of their numbers included, and whose brands are not two.

  Those that share a rare word and all numbers are put in order, and each is compared with the next ten: what it takes
  grows with the number of items, not with its square.

  Args:
    titles: of the N items, "" for none.
    brands: [N] int, equal for one brand; 0 for none, which goes with any.

  Returns:
    (earlier item, later item) by the later one, each later one once.
  """
  words: Counter[str] = Counter()
  for title in titles:
    words.update(set(_words(title)))
  number = {word: place for place, word in enumerate(words)}
  amounts: dict[tuple[str, ...], int] = {}
  texts, keys, owners = [], array.array("q"), array.array("q")
  for item, title in enumerate(titles):
    own = _words(title)
    texts.append((" ".join(own), " ".join(sorted(own))))
    amount = amounts.setdefault(_numbers(own), len(amounts))
    for word in sorted(set(own), key=lambda one: (words[one], one))[:_RARE]:
      keys.append(amount * len(number) + number[word])
      owners.append(item)
  found: dict[int, int] = {}
  for block in _blocks(np.asarray(keys), np.asarray(owners)):
    members = sorted(block, key=lambda item: (texts[item][1], item))
    for place, one in enumerate(members):
      for other in members[place + 1 : place + 1 + _NEIGHBOURS]:
        first, second = min(one, other), max(one, other)
        if found.get(second, second) <= first or (brands[one] != brands[other] and brands[one] and brands[other]):
          continue
        if _same(texts[one], texts[other]):
          found[second] = first
  return [(found[second], second) for second in sorted(found)]


def _words(title: str) -> list[str]:
  return _WORD.findall(title[:_READ].lower())


def _numbers(words: Sequence[str]) -> tuple[str, ...]:
  return tuple(sorted(word for word in words if word.isdigit()))


def _blocks(keys: np.ndarray, owners: np.ndarray) -> list[list[int]]:
  """The owners [n] of equal keys [n], where there are several."""
  order = np.argsort(keys, kind="stable")
  parts = np.split(owners[order], np.flatnonzero(np.diff(keys[order])) + 1)
  return [part.tolist() for part in parts if len(part) > 1]


def _same(one: tuple[str, str], other: tuple[str, str]) -> bool:
  """Whether two titles say the same, each as it is and with its words in order."""
  if one[1] == other[1]:
    return True
  joined, again = one[0].replace(" ", ""), other[0].replace(" ", "")
  if not (fuzz.ratio(joined, again, score_cutoff=_LEAST) or fuzz.ratio(one[1], other[1], score_cutoff=_LEAST)):
    return False
  mine, theirs = Counter(one[0].split()), Counter(other[0].split())
  own, others = ("".join((mine - theirs).elements()), "".join((theirs - mine).elements()))
  return bool(own == others or fuzz.ratio(own, others, score_cutoff=_LEAST_OTHERS))
