"""From what a request says to what a bundle is asked, and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bbqrec_jax.errors import InputError, shown
from bbqrec_jax.serving.batching import Batcher
from bbqrec_jax.serving.bundle import Answer, Bundle, Query
from bbqrec_jax.serving.messages import Asked, Filters, Id
from bbqrec_jax.serving.reasons import Reason
from bbqrec_jax.serving.titles import Titles


class Unknown(InputError):
  """An item that is not there."""


class Engine:
  """A bundle that answers requests, with its own queue: those that came for it are answered by it."""

  def __init__(self, bundle: Bundle, batcher: Batcher):
    """Takes both."""
    self.bundle, self.batcher, self.titles = bundle, batcher, Titles(bundle.titles)

  def item(self, row: int) -> dict[str, Any]:
    """What a response says of an item."""
    return {"id": self.bundle.item_ids[row], "title": self.bundle.titles[row]}

  def rows(self, ids: Sequence[Id], what: str, *, skip: bool) -> tuple[np.ndarray, list[Id]]:
    """The rows of ids, without those of unknown ones; and the unknown ones.

    Raises:
      Unknown: if there are some, and they are not to be skipped.
    """
    texts = list(map(str, ids))
    rows = self.bundle.item_ids.rows(texts)
    unknown = [one for one, row in zip(ids, rows, strict=True) if row < 0]
    if unknown and not skip:
      place = int(np.argmax(rows < 0))
      raise Unknown(f"{what}, place {place}: expected the id of an item, got {shown(texts[place])}; /items finds items")
    return rows[rows >= 0], unknown

  def of_titles(self, titles: Sequence[str], *, skip: bool) -> tuple[np.ndarray, list[Id]]:
    """The rows of items by their titles; and the unknown titles.

    Raises:
      Unknown: if one is unknown and not to be skipped.
      InputError: if several items have one.
    """
    rows: list[int] = []
    unknown: list[Id] = []
    for place, title in enumerate(titles):
      row = self.titles.row(title)
      if row == -1:
        raise InputError(f"titles, place {place}: several items are called {shown(title)}; give ids")
      if row is None and not skip:
        raise Unknown(f"titles, place {place}: no item is called {shown(title)}; /items finds titles by their words")
      if row is None:
        unknown.append(title)
      else:
        rows.append(row)
    return np.array(rows, np.int64), unknown

  def filtered(self, filters: Filters) -> np.ndarray:
    """The rows of the items that pass.

    Raises:
      InputError: if the bundle's items have no such attribute, or the limits of the price leave none.
    """
    price, values = filters.price, filters.model_dump(exclude={"price"}, exclude_none=True)
    lowest, highest = (None, None) if price is None else (price.min, price.max)
    if lowest is not None and highest is not None and lowest > highest:
      raise InputError(f"filters.price: expected min of at most max, got {lowest:g} and {highest:g}")
    return self.bundle.attributes.matching(values, lowest=lowest, highest=highest)

  def query(self, asked: Asked) -> tuple[Query, list[Id]]:
    """What a request asks; and what is unknown of it.

    Raises:
      Unknown: if an item is.
      InputError: if it is not whole, or asks for more than the bundle gives.
    """
    skip = asked.unknown == "skip"
    if (asked.history is None) == (asked.titles is None):
      raise InputError("expected history (ids) or titles, one of the two")
    if asked.k > self.bundle.limits["top"] and "k" in asked.model_fields_set:
      raise InputError(f"k: this bundle gives at most {self.bundle.limits['top']} items, got {asked.k}")
    if asked.titles is not None:
      history, skipped = self.of_titles(asked.titles, skip=skip)
      given = len(asked.titles)
    else:
      history, skipped = self.rows(asked.history or [], "history", skip=skip)
      given = len(asked.history or [])
    if not len(history):
      raise InputError("history: expected at least one known item, and nothing tells what comes next without one")
    times = None if asked.times is None else np.array(asked.times, np.float64)
    if times is not None and (len(times) != given or skipped or np.any(np.diff(times) < 0)):
      raise InputError("times: expected one for each known item of the history, in time order")
    if self.bundle.timed and times is None:
      raise InputError("times: this model looks at the time between interactions, give the second of each")
    deny, unknown = self.rows(asked.deny, "deny", skip=True)
    skipped = skipped + unknown
    allow = None
    if asked.allow is not None:
      allow, unknown = self.rows(asked.allow, "allow", skip=skip)
      skipped = skipped + unknown
    if asked.filters is not None:
      kept = self.filtered(asked.filters)
      allow = kept if allow is None else allow[np.isin(allow, kept)]
    exclude = deny if asked.repeat else np.concatenate([deny, history])
    return Query(history, exclude, allow, times, top=asked.k, reasons=asked.reasons), skipped

  def recommendations(self, answer: Answer, skipped: list[Id]) -> dict[str, Any]:
    """The response to a request, as `Recommendations` describes it."""
    reasons = answer.reasons or [[]] * len(answer.items)
    return {
      "items": [
        self.item(row) | {"score": round(score, 5), "reasons": list(map(self._why, why))}
        for row, score, why in zip(answer.items.tolist(), answer.scores.tolist(), reasons, strict=True)
      ],
      "skipped": skipped,
      "bundle": self.bundle.version,
    }

  def _why(self, reason: Reason) -> dict[str, Any]:
    similarity = None if reason.similarity is None else round(reason.similarity, 4)
    told = self.item(reason.item) | {"stream": reason.stream, "similarity": similarity}
    return told if reason.added is None else told | {"bucket": reason.bucket, "added": round(reason.added, 4)}
