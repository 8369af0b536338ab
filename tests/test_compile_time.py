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
