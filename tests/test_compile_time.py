"""What is compiled is counted, with the seconds of each part, at the place in the package that asked for it."""

import jax
import jax.numpy as jnp

from bbqrec_jax.ops.ranking import target_ranks


def test_programs_are_counted_at_the_place_that_compiles_them(load_file, monkeypatch):
  script, given = load_file("experiments/compile_time.py"), []

  def run(config, workdir):
    given.append(config)
    for width in (3, 5):
      target_ranks(jnp.zeros((2, width)), jnp.zeros(2, jnp.int32))

  monkeypatch.setattr(script, "run", run)
  jax.clear_caches()
  measured = script.measure("quickstart", "", ["recommender.batch_rows=4"])
  jax.monitoring.clear_event_listeners()
  assert (given[0].recommender.steps, given[0].tokenizer.steps, given[0].recommender.batch_rows) == (3, 3, 4)
  (place,) = [name for name in measured["places"] if name.startswith("ranking.target_ranks")]
  programs, traced, lowered, compiled = measured["places"][place]
  assert programs >= 2, "one for each width"
  assert min(traced, lowered, compiled) > 0
  assert traced + lowered + compiled < measured["seconds"]


def test_large_programs_are_sized_with_what_their_loops_hold(load_file, monkeypatch):
  script = load_file("experiments/compile_time.py")

  def body(carry, row):
    return carry + jnp.sin(row), carry * row

  def step(state, shared, batch, *, axis_name):
    assert axis_name is None
    return jax.lax.scan(body, state + shared, batch)

  # Of the function one addition and the scan, of its body sine, sum and product.
  assert (
    script.equations(
      jax.make_jaxpr(lambda *given: step(*given, axis_name=None))(jnp.float32(1), jnp.float32(2), jnp.ones(3)).jaxpr
    )
    == 5
  )
  device = script.Sized()
  monkeypatch.setattr(script, "place", lambda: "here")
  compiled = device.compile_step(step)
  total, _ = compiled(jnp.float32(1), jnp.float32(2), jnp.zeros(3))
  assert float(total) == 3.0
  (equations, operations, instructions) = device.sizes["here"]
  assert equations >= 5
  assert min(operations, instructions) > 0
  compiled(jnp.float32(1), jnp.float32(2), jnp.zeros((3, 2))[:, 0])
  assert list(device.sizes) == ["here"]
