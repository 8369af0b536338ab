"""Times of interactions, in whatever unit a source has them: recognised, said and brought to seconds."""

from collections.abc import Callable

import numpy as np

from bbqrec_jax.data.interactions import Interactions, order_note
from bbqrec_jax.errors import InputError

# How many make a second.
UNITS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}

# From March 1973 to the year 5138, seconds since 1970 are 1e8 to 1e11, milliseconds 1e11 to 1e14, and so on: no two
# units share a magnitude.
_BOUNDS = (1e8, 1e11, 1e14, 1e17, 1e20)

# Seconds between two interactions that can be told from longer ones: they are 32 bits, 68 years.
LONGEST_GAP = int(np.iinfo(np.int32).max)


def magnitude_counts(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which magnitude times have [n]: 0 is near zero, k that of the k-th unit; and how many have each, [6]."""
  magnitudes = np.searchsorted(_BOUNDS, np.abs(times), side="right")
  return magnitudes, np.bincount(magnitudes, minlength=len(_BOUNDS) + 1)


def unit_of(times: np.ndarray, *, where: Callable[[int], str]) -> str | None:
  """The unit of times since 1970, by their magnitude.

  Args:
    times: [n] float64, of one source.
    where: index -> which file and line it is, for the message.

  Returns:
    One of `UNITS` where most times are of its magnitude, before 1970 as after it, and the others, as of a time that
    nobody knows, nearer to zero than those of any. None where the times do not tell: few, or none, are that far from
    zero, as when they count from a user's first interaction.

  Raises:
    InputError: if the times are of several units' magnitudes, and none is near zero.
  """
  magnitudes, found = magnitude_counts(times)
  near_zero, *counts = found.tolist()
  most = int(np.argmax(counts))
  if counts[most] + near_zero < len(times):
    if near_zero:
      return None
    usual, odd = np.argmax(magnitudes == most + 1), np.argmax(magnitudes != most + 1)
    raise InputError(
      f"{where(int(odd))}: expected times of one unit, got {times[odd]:.15g} where most are like {times[usual]:.15g};"
      " write the second of each interaction"
    )
  names = list(UNITS)
  return names[most] if most < len(names) and 2 * counts[most] >= max(len(times), 1) else None


def in_seconds(times: np.ndarray, *, where: Callable[[int], str]) -> tuple[np.ndarray, str]:
  """Times [n] of a source in seconds, and the unit that they came in: "seconds" too where they do not tell.

  Raises:
    InputError: as `unit_of`.
  """
  unit = unit_of(times, where=where) or "seconds"
  return (times if unit == "seconds" else times / UNITS[unit]), unit


def in_seconds_as(times: np.ndarray, unit: str, *, where: Callable[[int], str]) -> np.ndarray:
  """Times [n] for a model in seconds, which must come in the unit that the data had that it was trained on.

  They may count from any moment, and then do not tell their unit.

  Raises:
    InputError: if they are of the magnitude of another unit.
  """
  came = unit_of(times, where=where)
  if came not in (None, unit) and np.min(np.abs(times)) >= _BOUNDS[0]:
    raise InputError(
      f"{where(0)}: expected {unit}, as the times of the data that the recommender was trained on, got {times[0]:.15g},"
      f" as of {came}; write them in {unit}"
    )
  return times / UNITS[unit]


def long_gaps(interactions: Interactions) -> list[str]:
  """A sentence about histories that last longer than can be told; none where there are none, or no times."""
  if interactions.times is None:
    return []
  held = interactions.lengths > 0
  first, last = interactions.offsets[:-1][held], interactions.offsets[1:][held] - 1
  with np.errstate(over="ignore"):
    long = int(np.sum(interactions.times[last] - interactions.times[first] > LONGEST_GAP))
  if not long:
    return []
  return [
    f"by their times {long} of {interactions.num_users} histories last longer than 68 years, and what comes later"
    " counts as that; if the times are not seconds, write the second of each interaction"
  ]


def time_notes(interactions: Interactions, unit: str) -> tuple[str, ...]:
  """How the histories came into their order, what unit their times came in, and which of them cannot be told.

  Args:
    interactions: with times in seconds, or without.
    unit: that the times came in.
  """
  notes = [order_note(interactions)]
  if unit != "seconds":
    notes.append(f"times taken for {unit} since 1970, by their magnitude: divided by {UNITS[unit]:,.0f} to seconds")
  return (*notes, *(f"warning: {sentence}" for sentence in long_gaps(interactions)))
