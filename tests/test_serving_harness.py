"""The harness that loads a server finds wrong answers, and what it sends is what it says."""

import asyncio
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


def test_a_connection_is_kept_until_the_server_closes_it(harness):
  opened, bodies = [], []

  async def serve(reader, writer):
    opened.append(1)
    while True:
      try:
        head = await reader.readuntil(b"\r\n\r\n")
      except EOFError:
        return writer.close()
      length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
      bodies.append(json.loads(await reader.readexactly(length)))
      last = len(bodies) == 2
      status, more = ("503 Busy", "Retry-After: 3\r\nConnection: close\r\n") if last else ("200 OK", "")
      writer.write(f'HTTP/1.1 {status}\r\nContent-Length: 8\r\n{more}\r\n{{"n": {len(bodies)}}}'.encode())
      if last:
        return writer.close()

  async def several():
    async with await asyncio.start_server(serve, harness.HOST, 0) as server:
      connection = harness.Connection(server.sockets[0].getsockname()[1])
      found = [await connection.ask([place]) for place in range(3)]
      server.close()
      connection.close()
      with pytest.raises(OSError, match=r"Connect call failed"):
        await connection.ask([3])
      return found

  assert asyncio.run(several()) == [(200, {"n": 1}, 0.1), (503, {"n": 2}, 3.0), (200, {"n": 3}, 0.1)]
  assert (bodies, len(opened)) == ([{"history": [0]}, {"history": [1]}, {"history": [2]}], 2)
