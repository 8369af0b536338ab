"""The server: what it answers, what it refuses and how, and what it does when requests or bundles are bad."""

import asyncio
import concurrent.futures
import contextlib
import json
import pathlib
import random
import socket
import threading
import time
from typing import ClassVar

import httpx
import numpy as np
import pytest
import uvicorn

from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.serving.attributes import Attributes
from bbqrec_jax.serving.batching import Batcher, Overloaded
from bbqrec_jax.serving.bundle import Answer, Query
from bbqrec_jax.serving.connection import listening
from bbqrec_jax.serving.gate import Options
from bbqrec_jax.serving.reasons import Reason
from bbqrec_jax.serving.server import Serving, make_app
from bbqrec_jax.serving.titles import Titles

NAMES = ["red tea", "green tea", "Green  Tea pot", "black coffee", "red tea", ""]

ATTRIBUTES = {
  "brand": ["Leaf", "leaf", "Pot & Co", "Bean", "", "Leaf"],
  "price": [3.0, 5.0, 20.0, None, 4.0, 6.0],
}


class Stub:
  """A bundle whose next items are the rows after the last one of the history, around the catalogue."""

  about: ClassVar = {
    "head": "dense",
    "data": {"name": "teas", "source": "/home/somebody/teas"},
    "test": {"ndcg@10": 0.1},
  }
  streams = ("text", "fused")
  limits: ClassVar = {"max_length": 4, "top": 5, "batch_sizes": [1, 4], "widths": [8]}
  timed = False
  num_items = len(NAMES)

  def __init__(self, version="v1"):
    self.version, self.item_ids, self.titles = version, ItemIds([f"T{row}" for row in range(6)]), tuple(NAMES)
    self.attributes = Attributes(ATTRIBUTES, num_items=6)
    self.sizes, self.gate = [], threading.Event()
    self.gate.set()

  def answer(self, queries):
    self.gate.wait(10)
    self.sizes.append(len(queries))
    found = []
    for query in queries:
      rows = (query.history[-1] + 1 + np.arange(6)) % 6
      rows = rows[~np.isin(rows, query.exclude)]
      rows = rows if query.allow is None else rows[np.isin(rows, query.allow)]
      rows = rows[:5][: query.top]
      why = [[Reason(int(query.history[-1]), "text", 0.5)][: query.reasons] for _ in rows]
      found.append(Answer(rows, -np.arange(5, dtype=np.float32)[: len(rows)], why))
    return found

  def similar(self, item, *, count, stream=None):
    rows = np.array([row for row in range(6) if row != item])[:count]
    return Answer(rows, np.linspace(1, 0, 5)[: len(rows)])


@pytest.fixture
def stub():
  return Stub()


@pytest.fixture
def serve(stub, tmp_path):
  """A function options -> (client, serving): requests go to the application without a socket."""

  def make(load=lambda folder: stub, **options):
    serving = Serving(tmp_path, Options(**({"window": 0.0, "access_log": False} | options)), load=load)
    transport = httpx.ASGITransport(app=make_app(serving), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://here"), serving

  return make


@pytest.fixture
def listen(stub, tmp_path):
  """A function options -> (address, uvicorn's server): one that listens on a port of its own, until the test ends."""
  with contextlib.ExitStack() as stack:

    def make(**options):
      serving = Serving(tmp_path, Options(**({"window": 0.0, "access_log": False} | options)), load=lambda folder: stub)
      listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
      server = uvicorn.Server(listening(make_app(serving), serving.options))
      thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
      thread.start()
      stack.callback(thread.join, 10)
      stack.callback(setattr, server, "should_exit", True)
      while not server.started:
        time.sleep(0.01)
      return listener.getsockname(), server

    yield make


def opened(address, content=b""):
  """A connection that has sent something."""
  connection = socket.create_connection(address, timeout=10)
  connection.sendall(content)
  return connection


def rest(connection):
  """What comes until the other side closes: the status, 0 without one; the headers; the body."""
  content = b""
  with connection, contextlib.suppress(ConnectionError):
    while piece := connection.recv(2**16):
      content += piece
  head, _, body = content.decode().partition("\r\n\r\n")
  lines = head.split("\r\n")
  return int((lines[0].split() or [0, 0])[1]), dict(line.lower().split(": ", 1) for line in lines[1:]), body


def ask(client, method, path, **arguments):
  async def once():
    async with client:
      return await client.request(method, path, **arguments)

  return asyncio.run(once())


def test_ids_go_in_and_items_with_reasons_come_out(serve):
  client, _ = serve()
  found = ask(client, "POST", "/recommend", json={"history": ["T0", "T1"], "k": 2})
  assert found.status_code == 200
  reason = {"id": "T1", "title": "green tea", "stream": "text", "similarity": 0.5}
  assert found.json() == {
    "items": [
      {"id": "T2", "title": NAMES[2], "score": 0.0, "reasons": [reason]},
      {"id": "T3", "title": NAMES[3], "score": -1.0, "reasons": [reason]},
    ],
    "skipped": [],
    "bundle": "v1",
  }
  assert len(found.headers["x-request-id"]) == 12


@pytest.mark.parametrize(
  ("asked", "items"),
  [
    ({"titles": ["GREEN tea"], "k": 2}, ["T2", "T3"]),
    ({"history": ["T1"], "deny": ["T2", "nobody's"], "k": 2}, ["T3", "T4"]),
    ({"history": ["T1"], "allow": ["T5", "T3", "T1"]}, ["T3", "T5"]),
    ({"history": ["T1"], "allow": ["T5", "T1"], "repeat": True}, ["T5", "T1"]),
    ({"history": ["T1"], "filters": {"brand": ["LEAF", "Bean"]}}, ["T3", "T5", "T0"]),
    ({"history": ["T1"], "filters": {"brand": ["leaf"]}, "repeat": True}, ["T5", "T0", "T1"]),
    ({"history": ["T1"], "filters": {"brand": ["Leaf"], "price": {"min": 5}}, "k": 3}, ["T5"]),
    ({"history": ["T1"], "filters": {"price": {"max": 5}}, "allow": ["T4", "T2"]}, ["T4"]),
    ({"history": ["T1"], "filters": {"price": {"min": 4}}, "deny": ["T4"]}, ["T2", "T5"]),
    ({"history": ["T1"], "filters": {"brand": ["Sock"]}}, []),
    ({"history": ["T1"], "filters": {}, "k": 1}, ["T2"]),
    ({"history": ["lost", "T4"], "unknown": "skip", "k": 1}, ["T5"]),
    ({"history": ["T4"], "reasons": 0, "k": 1, "times": [7.0]}, ["T5"]),
  ],
)
def test_what_may_come_back_can_be_chosen(serve, asked, items):
  client, _ = serve()
  found = ask(client, "POST", "/recommend", json=asked)
  assert found.status_code == 200, found.text
  assert [one["id"] for one in found.json()["items"]] == items


@pytest.mark.parametrize(
  ("asked", "status", "said"),
  [
    ({}, 422, "history (ids) or titles"),
    ({"history": ["T1"], "titles": ["red tea"]}, 422, "one of the two"),
    ({"history": []}, 422, "at least one known item"),
    ({"history": ["T1", "T9"]}, 422, "history, place 1: expected the id of an item, got 'T9'"),
    ({"history": ["\ud800"]}, 422, "history"),
    ({"titles": ["red tea"]}, 422, "several items are called 'red tea'"),
    ({"titles": ["milk"]}, 422, "no item is called 'milk'"),
    ({"history": ["T1"], "k": 6}, 422, "k: this bundle gives at most 5"),
    ({"history": ["T1"], "k": 0}, 422, "k: "),
    ({"history": ["T1"], "k": True}, 422, "k: "),
    ({"history": ["T1"], "allow": ["T9"]}, 422, "allow, place 0"),
    ({"history": ["T1"], "allow": []}, 422, "allow: "),
    ({"history": ["T1", "T2"], "times": [2.0, 1.0]}, 422, "times: "),
    ({"history": ["T1"], "filters": {"colour": ["red"]}}, 422, "filters.colour: no such field"),
    ({"history": ["T1"], "filters": {"category": ["Tea"]}}, 422, "filters.category: expected an attribute"),
    ({"history": ["T1"], "filters": {"brand": "Leaf"}}, 422, "filters.brand: "),
    ({"history": ["T1"], "filters": {"price": {"max": "5"}}}, 422, "filters.price.max: "),
    ({"history": ["T1"], "filters": {"price": {"min": 5, "max": 4}}}, 422, "min of at most max"),
    ({"history": "T1"}, 422, "history: "),
    ({"history": ["T1", True]}, 422, "history.1: Input should be a valid string or integer"),
    ({"history": ["T1"], "more": 1}, 422, "more: "),
    ({"user": "U17"}, 422, "user: a server keeps no users; send"),
    ({"history": ["T1"] * 10_001}, 422, "history: "),
  ],
)
def test_a_wrong_request_is_refused_in_one_line(serve, asked, status, said):
  client, _ = serve()
  found = ask(client, "POST", "/recommend", content=json.dumps(asked))
  assert found.status_code == status
  assert said in found.json()["error"]
  assert "\n" not in found.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 5000, b"\xff\xfe", b'{"k": 1e999}', b"9" * 6000, b"null"])
def test_what_is_no_json_is_a_bad_request(serve, content):
  client, _ = serve()
  found = ask(client, "POST", "/recommend", content=content)
  assert found.status_code in (400, 422)
  assert set(found.json()) == {"error"}


@pytest.mark.parametrize(("content", "position"), [(b"{bad", 1), (b'{"k": 1,, }', 8)])
def test_where_json_ends_is_said(serve, content, position):
  client, _ = serve()
  found = ask(client, "POST", "/recommend", content=content)
  assert (found.status_code, found.json()["error"]) == (400, f"body: not JSON (position {position})")


def test_head_is_answered_as_get_without_a_body(listen):
  address, _ = listen()
  for path, status in (("/", 200), ("/health", 200), ("/items?id=T9", 404), ("/recommend", 405)):
    heads = [
      rest(opened(address, f"{method} {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode()))
      for method in ("HEAD", "GET")
    ]
    assert [head[0] for head in heads] == [status, status]
    assert heads[0][1]["content-length"] == heads[1][1]["content-length"] == str(len(heads[1][2]))
    assert not heads[0][2]


def test_connections_that_send_no_request_are_closed_and_keep_nobody_from_the_probes(listen):
  address, _ = listen(connections=3, head_seconds=1.0)
  silent = [opened(address) for _ in range(3)]
  half = opened(address, b"GET /about HTTP/1.1\r\nHost: ")
  url = "http://{}:{}".format(*address)
  time.sleep(0.1)
  assert [httpx.get(f"{url}{path}").status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
  found = httpx.get(f"{url}/about")
  assert (found.status_code, found.headers["retry-after"], found.headers["connection"]) == (503, "1", "close")
  assert "too many connections" in found.json()["error"]
  assert [rest(one)[0] for one in silent] == [0] * 3
  status, headers, body = rest(half)
  assert (status, headers["connection"], set(json.loads(body))) == (408, "close", {"error"})
  with httpx.Client() as client:
    assert client.get(f"{url}/about").status_code == 200
    time.sleep(1.3)  # One that was answered may wait longer.
    assert client.get(f"{url}/about").status_code == 200


def test_a_head_has_a_size(listen):
  address, _ = listen()
  start = b"GET /health HTTP/1.1\r\nConnection: close\r\nX: "
  assert rest(opened(address, start + b"x" * 60_000 + b"\r\n\r\n"))[0] == 200
  for content in (start + b"x" * 70_000, start + b"x" * 70_000 + b"\r\n\r\n", b"GET /?" + b"x" * 70_000,
                  start + b"x\r\nX: " * 12_000):  # fmt: skip
    status, headers, body = rest(opened(address, content))
    assert (status, headers["connection"], set(json.loads(body))) == (431, "close", {"error"})
  chunks = b"POST /recommend HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nX: "
  trailer = opened(address, chunks)
  time.sleep(0.1)
  trailer.sendall(b"x" * 70_000)
  assert rest(trailer)[0] == 0, "cut off before the 408 of a body that does not end"
  assert rest(opened(address, b"\x16\x03\x01"))[0] == 400


def test_a_server_that_stops_answers_what_is_under_way(listen, capsys):
  address, server = listen(body_seconds=1.5, timeout=0.5)
  head = b"POST /recommend HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
  body = b'{"history": ["T1"]}'
  slow, whole = opened(address, head % 999 + body), opened(address, head % len(body) + body[:5])
  kept = opened(address, b"GET /health HTTP/1.1\r\n\r\n")
  time.sleep(0.3)
  server.should_exit = True
  assert rest(kept)[0] == 200, "and closed at once"
  whole.sendall(body[5:])
  for connection, expected in ((whole, 200), (slow, 408)):
    status, headers, text = rest(connection)
    assert (status, headers["connection"]) == (expected, "close")
    assert json.loads(text)
  with pytest.raises(ConnectionError):
    opened(address)
  assert "Traceback" not in capsys.readouterr().err


def test_who_is_not_answered_before_a_server_stops_is_told(serve, stub):
  client, _ = serve()

  async def stopped():
    stub.gate.clear()
    async with client:
      task = asyncio.ensure_future(client.post("/recommend", json={"history": ["T1"]}))
      await asyncio.sleep(0.1)
      task.cancel()  # As uvicorn does after the time of grace.
      stub.gate.set()
      return await task

  found = asyncio.run(stopped())
  assert (found.status_code, found.json(), found.headers["retry-after"]) == (503, {"error": "stopping"}, "5")


def test_items_are_found_and_compared(serve):
  client, _ = serve()

  async def several():
    async with client:
      return [
        await client.get(path)
        for path in ("/items?query=TEA+green", "/items?query=T3", "/items?id=T1", "/items?limit=1", "/items?id=T9",
                     "/similar?id=T2&k=2", "/similar?id=T2&stream=taste", "/nowhere", "/recommend", "/about")
      ]  # fmt: skip

  words, own_id, one, first, lost, similar, stream, nowhere, method, about = asyncio.run(several())
  assert [item["id"] for item in words.json()["items"]] == ["T1", "T2"]
  assert own_id.json()["items"] == [{"id": "T3", "title": "black coffee"}]
  assert one.json()["items"] == [{"id": "T1", "title": "green tea"}]
  assert [item["id"] for item in first.json()["items"]] == ["T0"]
  assert lost.status_code == 404
  assert [(item["id"], item["similarity"]) for item in similar.json()["items"]] == [("T0", 1.0), ("T1", 0.75)]
  assert (stream.status_code, nowhere.status_code, method.status_code) == (422, 404, 405)
  assert about.json()["data"] == {"name": "teas"}, "where the data lies is nobody's business"


def test_a_token_is_asked_for(serve):
  client, _ = serve(token="s3cret")

  async def several():
    async with client:
      right = {"Authorization": "Bearer s3cret"}
      return [
        (await client.get(path, headers=headers)).status_code
        for path, headers in (("/items", {}), ("/items", {"Authorization": "Bearer s3cre"}),
                              ("/items", {"Authorization": "Basic s3cret"}), ("/items", right),
                              ("/items", {"Authorization": "bEARER s3cret"}),
                              ("/health", {}), ("/ready", {}), ("/", {}))
      ]  # fmt: skip

  assert asyncio.run(several()) == [401, 401, 401, 200, 200, 200, 200, 200]


def test_too_much_and_too_slow_a_body_are_refused(serve):
  client, _ = serve(body_bytes=1000, body_seconds=0.05)

  async def slowly():
    yield b'{"history": '
    await asyncio.sleep(0.5)
    yield b'["T1"]}'

  async def without_length():
    for _ in range(20):
      yield b"x" * 100

  async def several():
    async with client:
      return [
        (await client.post("/recommend", content=content)).status_code
        for content in (b"x" * 1001, without_length(), slowly(), b'{"history": ["T1"]}')
      ]

  assert asyncio.run(several()) == [413, 413, 408, 200]


def test_requests_that_come_together_are_answered_together(serve, stub):
  client, _ = serve()

  async def together():
    stub.gate.clear()
    async with client:
      asked = [client.post("/recommend", json={"history": [f"T{place % 6}"], "k": 1}) for place in range(9)]
      tasks = list(map(asyncio.ensure_future, asked))
      await asyncio.sleep(0.2)
      stub.gate.set()
      return [(await task).json()["items"][0]["id"] for task in tasks]

  assert asyncio.run(together()) == [f"T{(place + 1) % 6}" for place in range(9)]
  assert sum(stub.sizes) == 9
  assert max(stub.sizes) == 4, "no more than the bundle has programs for"
  assert len(stub.sizes) <= 4


def test_more_than_may_wait_is_sent_away_and_so_is_what_takes_too_long(serve, stub):
  client, serving = serve(waiting=2, timeout=0.3)

  async def overload():
    stub.gate.clear()
    async with client:
      tasks = []
      for _ in range(8):
        tasks.append(asyncio.ensure_future(client.post("/recommend", json={"history": ["T1"]})))
        await asyncio.sleep(0.01)
      done = [await task for task in tasks]
      stub.gate.set()
      await serving.engine.batcher.drain()
      after = await client.post("/recommend", json={"history": ["T1"]})
      return done, after

  done, after = asyncio.run(overload())
  assert {one.status_code for one in done} == {429, 503}
  assert [one.status_code for one in done][-1] == 429
  assert all(one.headers["retry-after"] == "1" for one in done)
  assert after.status_code == 200


def test_one_bad_query_fails_no_other():
  def answer(queries):
    if any(query.history[0] == 13 for query in queries):
      raise InputError("thirteen")
    return [Answer(query.history, query.history) for query in queries]

  async def several():
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      batcher = Batcher(answer, largest=4, waiting=9, window=0.0, timeout=5, thread=thread)
      asked = [batcher.ask(Query(np.array([row]), np.array([]))) for row in (12, 13, 14)]
      return await asyncio.gather(*asked, return_exceptions=True)

  first, second, third = asyncio.run(several())
  assert (first.items[0], third.items[0]) == (12, 14)
  assert isinstance(second, InputError)


def test_nobody_is_answered_who_does_not_wait_any_more():
  sizes, gate = [], threading.Event()

  def answer(queries):
    gate.wait(5)
    sizes.append(len(queries))
    return [Answer(query.history, query.history) for query in queries]

  async def several():
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      batcher = Batcher(answer, largest=1, waiting=9, window=0.0, timeout=0.1, thread=thread)
      asked = [batcher.ask(Query(np.array([row]), np.array([]))) for row in range(3)]
      found = await asyncio.gather(*asked, return_exceptions=True)
      gate.set()
      await batcher.drain()
      return found

  assert all(isinstance(one, Overloaded) for one in asyncio.run(several()))
  assert sizes == [1]


def test_a_good_bundle_takes_over_and_a_bad_one_does_not(serve, capsys):
  bundles = iter([Stub("v1"), Stub("v2"), InputError("changed"), OSError("disk"), Stub("v3")])

  def load(folder):
    found = next(bundles)
    time.sleep(0.05)
    if isinstance(found, Exception):
      raise found
    return found

  client, serving = serve(load, token="t")
  client.headers["Authorization"] = "Bearer t"

  async def several():
    statuses, versions, stop = [], [], False

    async def traffic():
      while not stop:
        found = await client.post("/recommend", json={"history": ["T1"]})
        statuses.append(found.status_code)
        versions.append(found.json()["bundle"])
        await asyncio.sleep(0.002)

    async with client:
      task = asyncio.ensure_future(traffic())
      reloads = [await client.post("/reload") for _ in range(4)]
      stop = True
      await task
      metrics = (await client.get("/metrics")).text
    return statuses, versions, reloads, metrics

  statuses, versions, reloads, metrics = asyncio.run(several())
  assert set(statuses) == {200}, "no request fails"
  assert [one.status_code for one in reloads] == [200, 409, 409, 200]
  assert "changed; the bundle in use stays" in reloads[1].json()["error"]
  assert versions == sorted(versions)
  assert {"v1", "v2"} <= set(versions)
  assert serving.engine.bundle.version == "v3"
  assert 'bbqrec_reloads_total{outcome="refused"} 2.0' in metrics
  assert 'bbqrec_reloads_total{outcome="taken"} 2.0' in metrics
  lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
  assert [line["outcome"] for line in lines] == ["taken", "refused", "refused", "taken"]


def test_without_a_token_nobody_reloads_over_http(serve):
  client, _ = serve()
  assert ask(client, "POST", "/reload").status_code == 403


def test_the_log_tells_nothing_of_what_was_asked(serve, capsys):
  client, _ = serve(access_log=True)

  async def several():
    async with client:
      await client.post("/recommend", json={"history": ["T1"]})
      await client.get("/similar?id=T5")
      await client.get("/T4/secret")
      return (await client.get("/metrics")).text

  metrics = asyncio.run(several())
  lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
  assert [(line["method"], line["route"], line["status"]) for line in lines] == [
    ("POST", "/recommend", 200), ("GET", "/similar", 200), ("GET", "other", 404),
  ]  # fmt: skip
  told = json.dumps([{name: value for name, value in line.items() if name != "time"} for line in lines]) + metrics
  assert not any(f"T{row}" in told for row in (1, 4, 5))
  assert 'bbqrec_requests_total{route="/recommend",status="200"} 1.0' in metrics
  assert 'bbqrec_bundle_info{head="dense",items="6",version="v1"} 1.0' in metrics
  assert "bbqrec_batch_queries_count 1.0" in metrics


def test_a_full_disk_under_the_log_fails_no_request(serve, monkeypatch):
  class Full:
    def write(self, text):
      raise OSError(28, "No space left on device")

  client, _ = serve(access_log=True)
  monkeypatch.setattr("sys.stderr", Full())
  assert ask(client, "POST", "/recommend", json={"history": ["T1"]}).status_code == 200


def test_a_fault_of_ours_is_500_and_quotes_nothing(listen, stub, capsys):
  def answer(queries):
    raise KeyError(f"T{queries[0].history[0]}")

  stub.answer = answer
  address, _ = listen(access_log=True)
  url = "http://{}:{}".format(*address)
  found = httpx.post(f"{url}/recommend", json={"history": ["T1"]})
  assert (found.status_code, found.json()) == (500, {"error": "something went wrong here"})
  fault, line = map(json.loads, capsys.readouterr().err.splitlines())
  assert fault["kind"] == "KeyError"
  assert fault["where"].startswith("bbqrec_jax/serving/batching.py:")
  assert line["status"] == 500
  assert fault["request"] == line["request"] == found.headers["x-request-id"]
  assert "T1" not in json.dumps([fault | {"time": ""}, line | {"time": ""}])
  assert 'bbqrec_requests_total{route="/recommend",status="500"} 1.0' in httpx.get(f"{url}/metrics").text


def test_the_page_stands_alone_and_names_what_it_runs(serve):
  client, _ = serve()
  found = ask(client, "GET", "/")
  assert found.status_code == 200
  assert "default-src 'none'" in found.headers["content-security-policy"]
  assert "unsafe" not in found.headers["content-security-policy"]
  text = found.text
  assert "http" not in text.replace("http-equiv", ""), "nothing is fetched from elsewhere"
  assert "innerHTML" not in text, "titles are text"


def test_everything_is_in_the_api_description(serve):
  client, _ = serve()
  found = ask(client, "GET", "/openapi.json").json()
  paths = found["paths"]
  assert {"/recommend", "/similar", "/items", "/about", "/health", "/ready", "/metrics", "/reload"} <= set(paths)
  assert {"200", "422", "429", "503"} <= set(paths["/recommend"]["post"]["responses"])
  assert {"403", "409"} <= set(paths["/reload"]["post"]["responses"])
  assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
  (name,) = [name for name, one in found["components"]["securitySchemes"].items() if one["scheme"] == "bearer"]
  asked = {path for path, methods in paths.items() for one in methods.values() if {name: []} in one.get("security", [])}
  assert asked == {"/recommend", "/similar", "/items", "/about", "/reload"}


def test_titles_are_found_by_words_in_any_order():
  titles = Titles(tuple(NAMES))
  assert titles.search("tea", count=9) == [0, 1, 2, 4]
  assert titles.search("  POT green", count=9) == [2]
  assert titles.search("green tea", count=1) == [1]
  assert titles.search("coffee tea", count=9) == []
  assert titles.search("", count=9) == titles.search("\n", count=9) == []
  assert [titles.row(name) for name in ("BLACK coffee", "red tea", "milk", "", "green tea  pot")] == [
    3,
    -1,
    None,
    None,
    2,
  ]


def test_titles_that_begin_with_the_words_come_first_and_each_kind_in_its_order():
  rng = random.Random(0)
  names = [" ".join(rng.choices(["a", "ab", "b", "abc", ""], k=rng.randrange(5))) for _ in range(300)]
  titles = Titles(tuple(names))
  folded = [" ".join(name.split()) for name in names]
  for _ in range(200):
    parts, count = rng.choices(["a", "b", "ab", "bc", "abc"], k=rng.randint(1, 3)), rng.randint(1, 40)
    rows = [row for row, title in enumerate(folded) if all(part in title for part in parts)]
    rows.sort(key=lambda row: not folded[row].startswith(" ".join(parts)))
    assert titles.search(" ".join(parts), count=count) == rows[:count]


def test_a_letter_that_all_titles_have_is_found_at_once():
  titles = Titles(("apple tree", "every tree", "red tea") * 100_000)
  begin = time.process_time()
  assert titles.search("t", count=3) == [0, 1, 2]
  assert titles.search("tree red", count=3) == [], "and those of two words that never meet are given up"
  assert time.process_time() - begin < 0.5


def test_the_manifest_asks_for_what_the_server_has(request):
  import yaml

  folder = request.config.rootpath / "bbqrec_jax" / "serving"
  deployment, service = yaml.safe_load_all((folder / "kubernetes.yaml").read_text(encoding="utf-8"))
  (container,) = deployment["spec"]["template"]["spec"]["containers"]
  assert container["livenessProbe"]["httpGet"]["path"] == "/health"
  assert {container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")} == {"/ready"}
  mounts = {one["name"] for one in container["volumeMounts"]}
  assert mounts == {one["name"] for one in deployment["spec"]["template"]["spec"]["volumes"]}
  assert container["resources"]["limits"]["memory"] == "3Gi", "a cold compilation holds 2.3 GiB"
  (cache,) = [one for one in deployment["spec"]["template"]["spec"]["volumes"] if one["name"] == "cache"]
  assert "persistentVolumeClaim" in cache, "it outlives the pod"
  grace = listening(None, Options(timeout=5.0, body_seconds=10.0)).timeout_graceful_shutdown
  assert grace > 15, "a body and its answer may take as long"
  assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 5 + grace, "preStop sleeps for 5 s"
  assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
  given = {argument.split("=")[0] for argument in container["args"][1:]}
  command = pathlib.Path(folder.parent / "commands" / "serve.py").read_text(encoding="utf-8")
  assert all(f'"{flag.removeprefix("--")}"' in command for flag in given)
