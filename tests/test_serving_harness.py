"""The harness that loads a server finds wrong answers, and what it sends is what it says."""

import json
import random

import pytest


@pytest.fixture(scope="module")
def harness(load_file):
  return load_file("experiments/serving.py")


def answer(**scores):
  return {"items": [{"id": item, "score": score} for item, score in scores.items()]}


def test_an_answer_that_differs_is_wrong(harness):
  truth = harness.Truth(["x"], count=1)
  truth.check(0, answer(a=-1.0, b=-2.0, c=-3.0))
  truth.check(0, answer(a=-1.0005, b=-2.0, d=-3.0))  # The end of the list may change places with what is behind it.
  assert truth.wrong == 0
  for wrong in (answer(b=-2.0, a=-1.0), answer(a=-1.0, c=-2.9), answer(a=-1.5, b=-2.0, c=-3.0), answer(x=-1.0)):
    before = truth.wrong
    truth.check(0, wrong)
    assert truth.wrong == before + 1


def test_requests_are_whole_and_mutations_are_not(harness):
  head, body = harness.request_bytes({"history": ["a", "b"], "k": 5})
  assert json.loads(body) == {"history": ["a", "b"], "k": 5}
  assert f"Content-Length: {len(body)}\r\n".encode() in head
  rng = random.Random(0)
  changed = [harness.mutated(head + body, rng) for _ in range(50)]
  assert sum(one != head + body for one in changed) > 45


def test_a_corrupted_bundle_is_a_copy_with_one_file_changed(harness, tmp_path):
  names = ["weights.safetensors", "recommend.bin", "items.json", "bundle.json", "check.json"]
  (tmp_path / "good").mkdir()
  for name in names:
    (tmp_path / "good" / name).write_bytes(bytes(100))
  name = harness.corrupted(tmp_path / "good", tmp_path / "bad", random.Random(0))
  differing = [one for one in names if (tmp_path / "bad" / one).read_bytes() != bytes(100)]
  assert differing == [name]
  harness.point(tmp_path / "link", tmp_path / "good")
  harness.point(tmp_path / "link", tmp_path / "bad")
  assert (tmp_path / "link").resolve() == (tmp_path / "bad").resolve()
