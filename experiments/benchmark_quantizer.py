"""Speed of the residual quantizer beside vector-quantize-pytorch's ResidualVQ, in the same autoencoder.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install torch vector-quantize-pytorch
    python experiments/benchmark_quantizer.py --peer_python=/tmp/peer/bin/python

768-512-256-128-32, four levels of 256 codes, batches of 1,024, Adam. Each side is one process that has compiled and
warmed up; they take turns, so that a noisy machine is noisy for all, and medians over the rounds are printed. Without
`--peer_python` this project's side runs alone.

Memory is the process's, libraries and all: when the work is done, and at its peak, which is in XLA's compiler on this
project's side.
"""

import itertools
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

WIDTHS, LEVELS, CODES, BATCH = (768, 512, 256, 128, 32), 4, 256, 1024
ROUNDS, STEPS, BLOCKS = 10, 20, 40


def serve(train, tokenize) -> None:
  """Answers "train" and "tokenize" on standard input with seconds; "resident" and "peak" with bytes of memory."""
  for line in sys.stdin:
    command, start = line.strip(), time.perf_counter()
    if command == "peak":
      print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
      continue
    if command == "resident":
      pages = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
      print(pages * resource.getpagesize(), flush=True)
      continue
    (train if command == "train" else tokenize)()
    print(time.perf_counter() - start, flush=True)


def serve_jax() -> None:
  """This project's side."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from bbqrec_jax.models.encoders import MLP
  from bbqrec_jax.ops.quantize import quantization_error, residual_quantize, straight_through

  encoder, decoder = MLP(WIDTHS[1:]), MLP(tuple(reversed(WIDTHS[:-1])))
  optimizer = optax.adam(1e-3)
  rng = np.random.default_rng(0)
  batches = [jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])), jnp.float32) for _ in range(4)]
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "encoder": jax.jit(encoder.init)(keys[0], batches[0][:1]),
    "decoder": jax.jit(decoder.init)(keys[1], np.zeros((1, WIDTHS[-1]), np.float32)),
    "codebooks": 0.1 * jax.random.normal(keys[2], (LEVELS, CODES, WIDTHS[-1])),
  }

  def loss_function(params, x):
    z = encoder.apply(params["encoder"], x)
    result = residual_quantize(z, params["codebooks"])
    rebuilt = decoder.apply(params["decoder"], straight_through(z, result.quantized))
    return jnp.mean(jnp.square(rebuilt - x)) + jnp.mean(quantization_error(result))

  @jax.jit
  def codes_of(params, x):
    return residual_quantize(encoder.apply(params["encoder"], x), params["codebooks"]).codes

  def step(state, x):
    params, opt_state = state
    loss, gradients = jax.value_and_grad(loss_function)(params, x)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  compiled = jax.jit(step, donate_argnums=0)
  state = (params, optimizer.init(params))

  def train():
    nonlocal state
    for index in range(STEPS):
      state, loss = compiled(state, batches[index % len(batches)])
    loss.block_until_ready()

  def tokenize():
    for index in range(BLOCKS):
      np.asarray(codes_of(state[0], batches[index % len(batches)]))

  serve(train, tokenize)


def serve_torch(learnable: bool) -> None:
  """The peer's side: codewords that follow averages, its default, or that are learned as ours are."""
  import torch
  from torch import nn
  from vector_quantize_pytorch import ResidualVQ

  def mlp(widths):
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
      layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])

  torch.manual_seed(0)
  encoder, decoder = mlp(WIDTHS), mlp(WIDTHS[::-1])
  choices = {"learnable_codebook": True, "ema_update": False} if learnable else {}
  quantizer = ResidualVQ(dim=WIDTHS[-1], num_quantizers=LEVELS, codebook_size=CODES, commitment_weight=0.25, **choices)
  optimizer = torch.optim.Adam([p for m in (encoder, decoder, quantizer) for p in m.parameters()], 1e-3)
  batches = [torch.randn(BATCH, WIDTHS[0]) for _ in range(4)]

  def train():
    for module in (encoder, decoder, quantizer):
      module.train()
    for index in range(STEPS):
      x = batches[index % len(batches)]
      quantized, _, losses = quantizer(encoder(x)[None])
      loss = torch.mean(torch.square(decoder(quantized[0]) - x)) + losses.sum()
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()

  def tokenize():
    for module in (encoder, decoder, quantizer):
      module.eval()
    with torch.inference_mode():
      for index in range(BLOCKS):
        quantizer(encoder(batches[index % len(batches)])[None])[1].numpy()

  serve(train, tokenize)


class Side:
  """One process that waits for its turn."""

  def __init__(self, python: str, name: str):
    """Starts it; `name` is what it is to serve."""
    self._process = subprocess.Popen(
      [python, str(pathlib.Path(__file__)), name],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, command: str) -> float:
    """The answer to one command."""
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    print(command, file=self._process.stdin, flush=True)
    answer = self._process.stdout.readline()
    if not answer:
      raise SystemExit(f"the process stopped with {self._process.wait()}: its error is above")
    return float(answer)


def main(argv: list[str]) -> None:
  """Runs the sides in turns and prints the table."""
  sides = {"bbqrec_jax": Side(sys.executable, "jax")}
  peer = next((argument.partition("=")[2] for argument in argv if argument.startswith("--peer_python=")), None)
  if peer:
    sides["ResidualVQ, averages"] = Side(peer, "torch_averages")
    sides["ResidualVQ, learned"] = Side(peer, "torch_learned")
  seconds: dict[tuple[str, str], list[float]] = {}
  for turn in range(ROUNDS + 1):
    for command in ("train", "tokenize"):
      for name, side in sides.items():
        value = side.ask(command)
        if turn:  # The first turn compiles and warms up.
          seconds.setdefault((name, command), []).append(value)
  report = {}
  for name, side in sides.items():
    report[name] = {
      "milliseconds a step": round(1000 * statistics.median(seconds[name, "train"]) / STEPS, 1),
      "items a second": round(BATCH * BLOCKS / statistics.median(seconds[name, "tokenize"])),
      "resident MiB": round(side.ask("resident") / 2**20),
      "peak MiB": round(side.ask("peak") / 2**20),
    }
  print(json.dumps(report, indent=2))


if __name__ == "__main__":
  if sys.argv[1:] == ["jax"]:
    serve_jax()
  elif sys.argv[1:] and sys.argv[1].startswith("torch_"):
    serve_torch(sys.argv[1] == "torch_learned")
  else:
    main(sys.argv[1:])
