"""Load and faults: a server of a bundle on this machine, asked as much as it can take, and treated badly.

    python experiments/serving.py --bundle=runs/bundle --output=serving.json
    python experiments/serving.py --bundle=runs/bundle --output=serving.json --seconds=1800 --mutations=10000   # long

Starts `bbqrec serve` on 127.0.0.1 and sends to nothing else. Every answer is compared with the first one for the same
history: under load, beside broken clients, across restarts and while a bad bundle is offered. Prints a table, and exits
with 1 if anything was answered wrongly, failed with 5xx that is no refusal, or the server died of itself.

What it does: 1, 16 and 64 connections for `--seconds` each; clients that send a byte at a time, half a body, or leave;
`--mutations` requests with bytes changed; a corrupt bundle, and then a good one, taken under load; kill -9 in mid-load
and the time until the server answers again; a disk without room for log and compilation cache; memory before, after and
at each quarter of a load.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import os
import pathlib
import platform
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import httpx
import numpy as np

HOST = "127.0.0.1"
TOKEN = "of-this-harness"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Server:
  """A server process on a free port."""

  def __init__(self, bundle, *, options=("--noaccess_log",), **process):
    """Takes the bundle, the server's options, and what its process is started with."""
    with socket.socket() as free:
      free.bind((HOST, 0))
      self.port = free.getsockname()[1]
    self.url = f"http://{HOST}:{self.port}"
    self._bundle, self._options = bundle, options
    # What it writes to no file fills a pipe that nobody reads.
    self._about = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | process
    self._about["env"] = os.environ | {"BBQREC_TOKEN": TOKEN} | process.get("env", {})
    self.process = None

  def start(self):
    """Starts it, and returns the seconds until it has answered a request."""
    begin = time.perf_counter()
    program = [sys.executable, "-c", "from bbqrec_jax.commands import main; main()", "serve"]
    command = [*program, str(self._bundle), f"--port={self.port}", *self._options]
    self.process = subprocess.Popen(command, **self._about)
    while True:
      if self.process.poll() is not None:
        raise SystemExit(f"the server ended with status {self.process.returncode}: {' '.join(command)}")
      with contextlib.suppress(httpx.HTTPError):
        (item,) = httpx.get(f"{self.url}/items?limit=1", headers=BEARER, timeout=5).json()["items"]
        found = httpx.post(f"{self.url}/recommend", json={"history": [item["id"]]}, headers=BEARER, timeout=30)
        found.raise_for_status()
        return time.perf_counter() - begin
      time.sleep(0.1)

  def memory(self):
    """Resident MiB."""
    for line in pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
      if line.startswith("VmRSS"):
        return int(line.split()[1]) / 1024
    return 0.0

  def cpu_seconds(self):
    """Seconds of processors that it has used: other programs on the machine add nothing to them."""
    fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

  def stop(self, number=signal.SIGTERM):
    """Ends it, and returns its status."""
    if self.process is not None and self.process.poll() is None:
      self.process.send_signal(number)
      return self.process.wait(60)
    return None


class Truth:
  """What each history is answered with: the first answer is remembered, and all others must be like it."""

  def __init__(self, ids, *, count, seed=0):
    """Draws histories."""
    rng = random.Random(seed)
    self.histories = [[rng.choice(ids) for _ in range(rng.randint(1, 20))] for _ in range(count)]
    self.answers, self.wrong = {}, 0

  def check(self, place, answer):
    """Compares an answer; items may change places where their scores are all but the same."""
    own = {item["id"]: item["score"] for item in answer["items"]}
    known = self.answers.setdefault(place, own)
    order = list(own.values())
    good = order == sorted(order, reverse=True) and not set(own) & set(self.histories[place])
    edge = min(known.values(), default=0.0) + 2e-3
    good = good and all(abs(score - own.get(item, -1e9)) < 2e-3 for item, score in known.items() if score > edge)
    self.wrong += not good


class Connection:
  """A connection that asks /recommend and is kept open: HTTP by hand, so that the client is not what is measured.

  httpx spends 2 ms of a processor per request, which the server would miss on a machine with two.
  """

  def __init__(self, port):
    """Takes the port of the server; `ask` opens the connection."""
    self._port, self._streams = port, None

  async def ask(self, history, *, patience=30.0):
    """The status of the answer, what it says, and the seconds after which it wants to be asked again.

    Raises:
      OSError: if the connection breaks, or nothing comes for that long.
    """
    try:
      async with asyncio.timeout(patience):
        if self._streams is None:
          self._streams = await asyncio.open_connection(HOST, self._port)
        reader, writer = self._streams
        writer.write(b"".join(request_bytes({"history": history}, close=False)))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        body = await reader.readexactly(int(fields[b"content-length"]))
    except (OSError, EOFError) as error:
      self.close()
      raise error if isinstance(error, OSError) else ConnectionResetError(str(error)) from error
    if fields.get(b"connection") == b"close":
      self.close()
    return int(head[9:12]), json.loads(body), float(fields.get(b"retry-after", 0.1))

  def close(self):
    """Closes it; the next request opens another."""
    if self._streams is not None:
      self._streams[1].close()
    self._streams = None


async def load(server, truth, *, connections, seconds, extra=None):
  """Asks on so many connections for so long: the milliseconds of each answer, and how many of each status came."""
  spent, statuses, stop = [], {}, time.perf_counter() + seconds

  async def one(number):
    rng, connection = random.Random(number), Connection(server.port)
    while time.perf_counter() < stop:
      place = rng.randrange(len(truth.histories))
      begin = time.perf_counter()
      try:
        status, answer, later = await connection.ask(truth.histories[place])
      except OSError as error:
        statuses[type(error).__name__] = statuses.get(type(error).__name__, 0) + 1
        await asyncio.sleep(0.2)
        continue
      statuses[status] = statuses.get(status, 0) + 1
      if status == 200:
        spent.append(1000 * (time.perf_counter() - begin))
        truth.check(place, answer)
      else:
        await asyncio.sleep(later)
    connection.close()

  tasks = [asyncio.create_task(one(number)) for number in range(connections)]
  if extra is not None:
    async with httpx.AsyncClient(base_url=server.url, headers=BEARER, timeout=600) as client:
      await extra(client)
  await asyncio.gather(*tasks)
  return spent, statuses


def sampled(server, seconds, samples):
  """What `load` is given as `extra` to note the server's memory at each quarter of it."""

  async def sample(_):
    for _quarter in range(4):
      await asyncio.sleep(0.99 * seconds / 4)
      samples.append(round(server.memory()))

  return sample


def summary(spent, statuses, seconds):
  """Percentiles and rate."""
  if not spent:
    return {"statuses": statuses}
  p50, p99 = np.percentile(spent, [50, 99])
  return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1), "worst_ms": round(max(spent), 1),
          "per_second": round(len(spent) / seconds, 1), "statuses": statuses}  # fmt: skip


def raw(port, content, *, pieces=1, seconds=0.0, patience=20.0):
  """Sends bytes as they are; the status of the answer, "closed" without one, or "waits" for more than there is.

  Args:
    port: of the server.
    content: what is sent.
    pieces: in how many pieces.
    seconds: that these take.
    patience: seconds until the answer is given up.
  """
  with socket.create_connection((HOST, port), timeout=patience) as stream, contextlib.suppress(OSError):
    size = -(-len(content) // pieces)
    for first in range(0, len(content), size):
      stream.sendall(content[first : first + size])
      time.sleep(seconds / pieces)
    try:
      answer = stream.recv(4096)
    except TimeoutError:
      return "waits"
    if answer.startswith(b"HTTP/1.1 "):
      return int(answer[9:12])
  return "closed"


def request_bytes(asked, *, close=True):
  """A request as it goes over the line: its head and its body."""
  body = json.dumps(asked).encode()
  lines = [
    "POST /recommend HTTP/1.1",
    f"Host: {HOST}",
    f"Authorization: Bearer {TOKEN}",
    f"Content-Length: {len(body)}",
  ]
  lines += ["Content-Type: application/json", *(["Connection: close"] * close)]
  return "\r\n".join([*lines, "", ""]).encode(), body


def mutated(content, rng):
  """Bytes with a few of them changed, taken out, doubled or moved."""
  content = bytearray(content)
  for _ in range(rng.randint(1, 4)):
    place = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
      content[place] = rng.randrange(256)
    elif kind == 1:
      del content[place : place + rng.randint(1, 20)]
    elif kind == 2:
      content[place:place] = content[place : place + rng.randint(1, 200)]
    else:
      content[place:place] = rng.choice([b'"', b"[" * 50, b"1e999", b"\xff\xfe", b"\\ud800", b"-1", b"null", b"\x00"])
    if not content:
      break
  return bytes(content)


async def mutations(server, truth, *, count):
  """Sends requests with changed bytes, in the body or anywhere, a few at a time; how many of each status came."""
  rng, statuses, turn = random.Random(0), {}, asyncio.Semaphore(32)
  # Most of those without an answer wait for three seconds; asyncio's own threads are few.
  asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(32))

  async def one(content):
    async with turn:
      status = await asyncio.to_thread(raw, server.port, content, patience=3.0)
    statuses[status] = statuses.get(status, 0) + 1

  for first in range(0, count, 200):
    contents = []
    for _ in range(first, min(first + 200, count)):
      head, body = request_bytes({"history": rng.choice(truth.histories), "k": 5})
      if rng.random() < 0.7:
        body = mutated(body, rng)
        head = head.replace(head[head.index(b"Content-Length") :].split(b"\r\n")[0], b"Content-Length: %d" % len(body))
        contents.append(head + body)
      else:
        contents.append(mutated(head + body, rng))
    await asyncio.gather(*map(one, contents))
  return statuses


async def bad_clients(server, truth):
  """Slow and broken clients beside ordinary ones; what became of each kind."""
  head, body = request_bytes({"history": truth.histories[0], "k": 5})
  kinds = {
    "byte by byte": lambda: raw(server.port, head + body, pieces=len(head + body), seconds=3.0),
    "half a body": lambda: raw(server.port, head + body[: len(body) // 2], patience=1.0),
    "half a head": lambda: raw(server.port, head[: len(head) // 2], patience=1.0),
    "a body that never comes": lambda: raw(server.port, head),
    "too large": lambda: raw(server.port, head.replace(b"Content-Length: ", b"Content-Length: 99999")),
    "no HTTP": lambda: raw(server.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20),
  }
  found = {}

  async def several(client):
    names = [name for name in kinds for _ in range(8)]
    statuses = await asyncio.gather(*(asyncio.to_thread(kinds[name]) for name in names))
    for name, status in zip(names, statuses, strict=True):
      found.setdefault(name, {}).setdefault(str(status), 0)
      found[name][str(status)] += 1

  spent, statuses = await load(server, truth, connections=4, seconds=15, extra=several)
  return found, summary(spent, statuses, 15)


def corrupted(bundle, folder, rng):
  """A copy of a bundle with a few bytes of one file changed."""
  shutil.copytree(bundle, folder)
  name = rng.choice(["weights.safetensors", "recommend.bin", "items.json", "bundle.json", "check.json"])
  content = bytearray((folder / name).read_bytes())
  for _ in range(5):
    content[rng.randrange(len(content))] ^= 0x55
  (folder / name).write_bytes(content)
  return name


async def reloads(server, truth, link, bundle, scratch):
  """Offers corrupt bundles and then a good one under load: the statuses of both kinds, and those of the load."""
  rng, told = random.Random(1), {}

  async def offer(client):
    for turn in range(3):
      name = corrupted(bundle, scratch / f"bad{turn}", rng)
      point(link, scratch / f"bad{turn}")
      told[f"corrupt {name}"] = (await client.post("/reload")).status_code
    point(link, bundle)
    told["good"] = (await client.post("/reload")).status_code

  spent, statuses = await load(server, truth, connections=8, seconds=20, extra=offer)
  return told, summary(spent, statuses, 20)


def point(link, target):
  """Moves a link, in one step."""
  fresh = link.with_name("fresh")
  fresh.symlink_to(target.resolve())
  os.replace(fresh, link)


async def killed(server, truth):
  """Kills it in mid-load, and a start after it: seconds until it answers again, and what the clients saw."""
  took = {}

  async def kill(client):
    await asyncio.sleep(2)
    server.stop(signal.SIGKILL)
    took["seconds"] = await asyncio.to_thread(server.start)

  spent, statuses = await load(server, truth, connections=8, seconds=20, extra=kill)
  return took["seconds"], summary(spent, statuses, 20)


async def full_disk(link, truth, scratch):
  """A server that can write neither its log nor its compilation cache: seconds until it answers, and what it does."""

  def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

  with open("/dev/full", "w") as full:
    cache = {"XDG_CACHE_HOME": str(scratch / "cache"), "JAX_COMPILATION_CACHE_DIR": ""}
    server = Server(link, options=(), preexec_fn=no_room, stderr=full, env=cache)
    try:
      seconds = await asyncio.to_thread(server.start)
      spent, statuses = await load(server, truth, connections=4, seconds=5)
      stopped = await asyncio.to_thread(server.stop)
    finally:
      server.stop(signal.SIGKILL)
  kept = [path for path in (scratch / "cache").rglob("*") if path.is_file() and path.stat().st_size]
  return {"start_s": round(seconds, 1), "stopped": stopped, "kept": len(kept)}, summary(spent, statuses, 5)


def main():
  """Runs everything and writes the record."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--bundle", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path)
  parser.add_argument("--seconds", type=float, default=10.0)
  parser.add_argument("--connections", default="1,16,64")
  parser.add_argument("--mutations", type=int, default=1000)
  parser.add_argument("--load-only", action="store_true")
  options = parser.parse_args()
  limits = json.loads((options.bundle / "bundle.json").read_text())["limits"]
  record = {"limits": limits, "machine": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()}
  scratch = pathlib.Path(tempfile.mkdtemp(prefix="bbqrec_serving_"))
  link = scratch / "current"
  point(link, options.bundle)
  server = Server(link)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # The server is ended then, too.
  bad = []
  try:
    record["cold_start_s"] = round(server.start(), 1)
    ids = json.loads((options.bundle / "items.json").read_text())["ids"]
    record["items"] = len(ids)
    truth = Truth(ids, count=500)
    record["memory_mib"] = [round(server.memory())]
    for connections in map(int, options.connections.split(",")):
      asyncio.run(load(server, truth, connections=connections, seconds=1))  # Warm.
      before, own = server.cpu_seconds(), time.process_time()
      held = []
      extra = sampled(server, options.seconds, held)
      spent, statuses = asyncio.run(load(server, truth, connections=connections, seconds=options.seconds, extra=extra))
      count = max(1, len(spent))
      each = {"cpu_ms_each": round(1000 * (server.cpu_seconds() - before) / count, 1)}
      each["client_cpu_ms_each"] = round(1000 * (time.process_time() - own) / count, 2)
      record[f"{connections} connections"] = summary(spent, statuses, options.seconds) | each | {"memory_mib": held}
      print(connections, record[f"{connections} connections"], flush=True)
    record["memory_mib"].append(round(server.memory()))
    if not options.load_only:
      record["bad clients"], record["beside them"] = asyncio.run(bad_clients(server, truth))
      print("bad clients", record["bad clients"], record["beside them"], flush=True)
      record["mutations"] = asyncio.run(mutations(server, truth, count=options.mutations))
      print("mutations", record["mutations"], flush=True)
      record["reloads"], record["during reloads"] = asyncio.run(reloads(server, truth, link, options.bundle, scratch))
      print("reloads", record["reloads"], record["during reloads"], flush=True)
      record["memory_mib"].append(round(server.memory()))
      record["start_after_kill_s"], record["around the kill"] = asyncio.run(killed(server, truth))
      record["start_after_kill_s"] = round(record["start_after_kill_s"], 1)
      print("kill -9", record["start_after_kill_s"], record["around the kill"], flush=True)
      record["full disk"], record["on it"] = asyncio.run(full_disk(link, truth, scratch))
      print("full disk", record["full disk"], record["on it"], flush=True)
      bad += ["SIGTERM on a full disk"] * (record["full disk"]["stopped"] != 0)
      for name, status in record["reloads"].items():
        if status != (200 if name == "good" else 409):
          bad.append(f"reload of {name}: {status}")
      bad += [f"mutation: {status}" for status in record["mutations"] if status == 500]
    status = server.stop()
    if status != 0:
      bad.append(f"SIGTERM: status {status}")
  finally:
    server.stop(signal.SIGKILL)
    shutil.rmtree(scratch, ignore_errors=True)
  for name, told in record.items():
    if isinstance(told, dict) and "statuses" in told and name != "around the kill":
      bad += [f"{name}: {status}" for status in told["statuses"] if status not in (200, 429, 503)]
  if truth.wrong:
    bad.append(f"{truth.wrong} wrong answers")
  record["bad"] = bad
  print(json.dumps(record, indent=2, default=str))
  if options.output:
    options.output.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
  sys.exit(1 if bad else 0)


if __name__ == "__main__":
  main()
