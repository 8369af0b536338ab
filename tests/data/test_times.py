"""Units of times by their magnitude, in every reader and for every question, and what is said of them."""

import numpy as np
import pytest

from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.packing import elapsed
from bbqrec_jax.data.recbole import load_recbole
from bbqrec_jax.data.times import UNITS, in_seconds, in_seconds_as, long_gaps, time_notes, unit_of
from bbqrec_jax.errors import InputError

WEEK = 604_800.0
SECONDS = 1_433_221_332.0 + WEEK * np.arange(12)


def where(index):
  return f"file entry {index}"


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("start", [1.1e8, 8.7e8, 1.7e9, 9e10, -3e8, -9e10])
def test_times_since_1970_are_brought_to_seconds(unit, start):
  seconds = start + np.arange(10) * 86_400.0
  times, came = in_seconds(seconds * UNITS[unit], where=where)
  assert came == unit
  np.testing.assert_allclose(times, seconds, rtol=1e-15)
  if unit == "seconds":
    np.testing.assert_array_equal(times, seconds)


@pytest.mark.parametrize(
  "times",
  [
    [0.0, 5.0, 9e7],
    [-1e7, -5.0],
    [0.0, 1e9, 3e11],  # Relative milliseconds, of years.
    [0.0, 1e6, 1e9, 1e12, 1e15],
    [1.0, 2.0, 3.0, 4.0, 9e18],  # A slip among relative seconds is no reason to divide all.
    [1e21, 2e21],
    [1e308, -1e308],
    [],
  ],
)
def test_times_that_do_not_tell_their_unit_stay_as_they_are(times):
  times = np.array(times)
  assert unit_of(times, where=where) is None
  kept, unit = in_seconds(times, where=where)
  assert unit == "seconds"
  np.testing.assert_array_equal(kept, times)


def test_times_that_nobody_knows_do_not_hide_the_unit_of_the_others():
  times = np.append(SECONDS * 1e3, [0.0, -1.0])
  kept, unit = in_seconds(times, where=where)
  assert unit == "milliseconds"
  np.testing.assert_allclose(kept, [*SECONDS, 0.0, -0.001])


@pytest.mark.parametrize("order", [1, -1])
def test_times_of_several_units_are_refused_by_the_odd_one(order):
  times = np.append(SECONDS * 1e3, 1_433_221_332.0)[::order]
  with pytest.raises(InputError) as error:
    in_seconds(times, where=where)
  message = str(error.value)
  assert message.startswith(f"file entry {12 if order == 1 else 0}: expected times of one unit, got 1433221332 where")
  assert "like 14" in message
  assert "\n" not in message


@pytest.mark.parametrize(
  ("times", "unit", "expected"),
  [
    ([1.4e12, 1.5e12], "milliseconds", [1.4e9, 1.5e9]),
    ([0.0, 86_400_000.0], "milliseconds", [0.0, 86_400.0]),
    ([0.0, 1.4e9], "milliseconds", [0.0, 1.4e6]),  # Counted from the first; no seconds since 1970.
    ([1.4e9, 1.5e9], "seconds", [1.4e9, 1.5e9]),
    ([0.0, 60.0], "seconds", [0.0, 60.0]),
    ([1.4e18, 1.5e18], "nanoseconds", [1.4e9, 1.5e9]),
  ],
)
def test_times_of_a_question_are_of_the_unit_of_the_data(times, unit, expected):
  np.testing.assert_allclose(in_seconds_as(np.array(times), unit, where=where), expected, rtol=1e-15)


@pytest.mark.parametrize(
  ("times", "unit", "came"),
  [
    ([1.4e12, 1.5e12], "seconds", "milliseconds"),
    ([1.4e9, 1.5e9], "milliseconds", "seconds"),
    ([1.4e15], "nanoseconds", "microseconds"),
  ],
)
def test_a_question_in_another_unit_than_the_data_is_refused(times, unit, came):
  with pytest.raises(InputError) as error:
    in_seconds_as(np.array(times), unit, where=where)
  message = str(error.value)
  assert f"file entry 0: expected {unit}, as the times of the data" in message
  assert f"as of {came}; write them in {unit}" in message


def histories_of(times, lengths):
  return from_lengths(
    np.zeros(len(times), int), np.array(lengths), np.arange(len(lengths)).astype(str), np.array(times)
  )


def test_histories_longer_than_68_years_are_told_of():
  assert long_gaps(histories_of([0.0, 2**31 - 1.0, 5.0], [2, 1, 0])) == []
  (sentence,) = long_gaps(histories_of([0.0, 2.0**31, 5.0, -1e308, 1e308], [2, 1, 2]))
  assert sentence.startswith("by their times 2 of 3 histories last longer than 68 years")
  assert "write the second of each interaction" in sentence
  assert long_gaps(from_lengths(np.zeros(3, int), np.array([3]), np.array(["a"]))) == []
  order, warning = time_notes(histories_of([0.0, 1e12], [2]), "seconds")
  assert order == "histories ordered by timestamp"
  assert warning.startswith("warning: by their times 1 of 1")


@pytest.mark.filterwarnings("error")
def test_a_gap_that_overflows_counts_as_the_longest():
  histories = histories_of([-1e308, 1e308], [2])
  assert elapsed(histories, np.arange(2), np.zeros(2, int)).tolist() == [0, 2**31 - 1]


def write(folder, source, times):
  """A folder of one of the formats, of two users with the same times."""
  if source == "recbole":
    rows = [f"{user}\ti{place}\t{time!r}" for user in "ab" for place, time in enumerate(times)]
    (folder / "shop.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows, ""]))
    return load_recbole(folder)
  (folder / "items.jsonl").write_text("{}\n" * len(times))
  for name, values in (("sequences", range(len(times))), ("timestamps", times)):
    (folder / f"{name}.txt").write_text("".join(f"{user} {' '.join(map(repr, values))}\n" for user in "ab"))
  return load_directory(folder)


@pytest.mark.parametrize("source", ["recbole", "directory"])
@pytest.mark.parametrize("unit", UNITS)
def test_both_readers_give_seconds_and_say_what_they_were(tmp_path, source, unit):
  data = write(tmp_path, source, (SECONDS * UNITS[unit]).tolist())
  assert data.time_unit == unit
  np.testing.assert_array_equal(elapsed(data.interactions, np.arange(12), np.zeros(12, int)), WEEK * np.arange(12))
  told = [note for note in data.notes if "to seconds" in note]
  assert len(told) == (unit != "seconds")
  assert all(f"taken for {unit} since 1970" in note for note in told)


@pytest.mark.parametrize(("source", "place"), [("recbole", "line 14 field 'timestamp'"), ("directory", "line 1")])
def test_both_readers_name_the_line_of_a_time_of_another_unit(tmp_path, source, place):
  times = [*(SECONDS * 1e3).tolist(), 1.7e15]
  with pytest.raises(InputError, match=f"{place}: expected times of one unit, got 1.7e\\+15"):
    write(tmp_path, source, times)
