"""What items are filtered by: their brand, the levels of their category, their price."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bbqrec_jax.errors import InputError

_TOLD = 200  # Values of an attribute that `about` names; a catalogue may have a million brands.


def _folded(text: str) -> str:
  return " ".join(text.casefold().split())


class Attributes:
  """Finds the items that have given values; `names` are the attributes that any item has."""

  def __init__(self, columns: Mapping[str, Sequence[Any]], *, num_items: int):
    """Takes what `items.json` says.

    Args:
      columns: of those that there are: `brand` [N], "" where an item has none; `category` [N], the list of its levels;
        `price` [N], None where an item has none.
      num_items: N.
    """
    self.names, self._num_items = tuple(columns), num_items
    self._rows: dict[str, dict[str, np.ndarray]] = {}
    self._texts: dict[str, list[str]] = {}
    for name in {"brand", "category"} & set(columns):
      rows: dict[str, list[int]] = collections.defaultdict(list)
      texts: dict[str, str] = {}
      for row, own in enumerate(columns[name]):
        for text in {_folded(one): one for one in ([own] if isinstance(own, str) else own) if one}.items():
          texts.setdefault(*text)
          rows[text[0]].append(row)
      self._rows[name] = {key: np.array(own, np.int32) for key, own in rows.items()}
      self._texts[name] = [texts[key] for key in sorted(rows, key=lambda key: (-len(rows[key]), key))]
    self._price = np.array([np.nan if one is None else one for one in columns.get("price", [])], np.float64)

  def about(self) -> dict[str, Any]:
    """The most frequent brands and categories, the most frequent first, and the lowest and the highest price."""
    told: dict[str, Any] = {name: self._texts[name][:_TOLD] for name in ("brand", "category") if name in self._texts}
    if "price" in self.names:
      told["price"] = [float(np.nanmin(self._price)), float(np.nanmax(self._price))]
    return told

  def matching(
    self, values: Mapping[str, Sequence[str]], *, lowest: float | None = None, highest: float | None = None
  ) -> np.ndarray:
    """The rows of the items that have one of the values of each attribute, and a price within the limits.

    Args:
      values: by attribute, in any case; one that no item has matches none.
      lowest: price; None for any, and so for the highest. An item without a price is within no limits.
      highest: price.

    Raises:
      InputError: if no item has anything of an attribute.
    """
    priced = lowest is not None or highest is not None
    for name in (*values, *(["price"] if priced else [])):
      if name not in self.names:
        known = ", ".join(self.names) or "none"
        raise InputError(f"filters.{name}: expected an attribute that this bundle's items have ({known}), got {name}")
    kept = np.ones(self._num_items, bool)
    for name, wanted in values.items():
      one = np.zeros(self._num_items, bool)
      for value in wanted:
        one[self._rows[name].get(_folded(value), [])] = True
      kept &= one
    if priced:
      kept &= self._price >= (-np.inf if lowest is None else lowest)
      kept &= self._price <= (np.inf if highest is None else highest)
    return np.flatnonzero(kept)
