"""The tutorial's own commands, on a small log: from a CSV to a server that recommends."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

# What makes the tutorial's training small; everything else is as it stands there.
SMALL = [
  f"--config.{field}"
  for field in (
    "partitioner=single", "recommender.head=dense", "recommender.width=8", "recommender.mlp_width=8",
    "recommender.num_layers=1", "recommender.max_length=8", "recommender.row_length=8", "recommender.batch_rows=16",
    "recommender.steps=60", "recommender.evaluate_every=60", "recommender.optimizer.learning_rate=1e-2",
    "recommender.item_dropout=0.0", "recommender.num_buckets=4", "tokenizer.quantizer=rq_kmeans",
    "tokenizer.num_codes=8", "tokenizer.kmeans_iterations=3", "evaluation.beam_width=10",
    "recommender.candidate_similarity.streams=()",
  )
]  # fmt: skip

SMALLER = {"report": ["--nopictures"], "export": ["--batch_sizes=4", "--platforms=cpu"]}


@pytest.fixture(scope="module")
def tutorial(request):
  return (request.config.rootpath / "docs" / "tutorial.md").read_text(encoding="utf-8")


def commands(text):
  """The lines of the shell blocks, in order, without those that install."""
  blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
  return [line for block in blocks for line in block.splitlines() if line and not line.startswith("pip ")]


def write_log(folder):
  """Everybody walks around a ring of 24 teas."""
  rng = np.random.default_rng(0)
  kinds = [f"{colour} {kind}" for colour in ("red", "green", "white", "black") for kind in ("tea", "mate", "rooibos")]
  items = [f"SKU-{row}" for row in range(24)]
  lines = [f"{item},{kinds[row % 12]} no. {row},Leaf,{3 + row}\n" for row, item in enumerate(items)]
  (folder / "items.csv").write_text("id,title,brand,price\n" + "".join(lines), encoding="utf-8")
  lines = [
    f"user{user},{items[(start + step) % 24]},{1_700_000_000 + 60 * step}\n"
    for user, start in enumerate(rng.integers(24, size=80))
    for step in range(7)
  ]
  rng.shuffle(lines)
  (folder / "interactions.csv").write_text("user,item,time\n" + "".join(lines), encoding="utf-8")


def test_its_commands_lead_from_a_csv_to_a_server(tutorial, tmp_path):
  write_log(tmp_path)
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }  # fmt: skip
  program = [sys.executable, "-c", "from bbqrec_jax.commands import main; main()"]
  steps = commands(tutorial)
  assert [step.split()[0:2] for step in steps] == [
    ["bbqrec", "prepare"], ["bbqrec", "features"], ["bbqrec", "train"], ["bbqrec", "report"], ["bbqrec", "export"],
    ["bbqrec", "serve"], ["curl", "localhost:8765/recommend"],
  ]  # fmt: skip
  server = None
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  try:
    for step in steps:
      words = shlex.split(step)
      if words[:2] == ["bbqrec", "train"]:
        command = [*program, *words[1:], *SMALL]
      elif words[:2] == ["bbqrec", "serve"]:
        command = [*program, *words[1:-1], words[-1].replace("8765", str(port))]
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        continue
      elif words[0] == "curl":
        found = ask(server, f"http://127.0.0.1:{port}/recommend", words[words.index("--json") + 1])
        continue
      else:
        command = [*program, *words[1:], *SMALLER.get(words[1], [])]
      result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
      assert result.returncode == 0, (step, result.stderr)
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0, "what is told to stop stops in order"
  finally:
    if server is not None and server.poll() is None:
      server.kill()
  assert (tmp_path / "runs/mine/report/report.html").stat().st_size > 500_000
  items = found["items"]
  assert len(items) == 3
  assert all(item["title"] for item in items)
  assert [reason["id"] for reason in items[0]["reasons"]] == ["SKU-1"]
  assert all(reason["id"] == "SKU-1" for item in items for reason in item["reasons"])
  assert all(int(item["id"][4:]) <= 7 for item in items), "what costs more than ten was asked to stay away"
  assert items[0]["id"] == "SKU-2", "the ring was learned"


def ask(server, url, body):
  """The answer of a server that may still be starting."""
  for _ in range(600):
    assert server.poll() is None, "the server ended"
    try:
      return httpx.post(url, content=body, timeout=60).raise_for_status().json()
    except httpx.ConnectError:
      time.sleep(0.1)
  raise TimeoutError(url)
