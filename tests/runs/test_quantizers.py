"""Finite scalar quantization from a config to recommendations of new items."""

import numpy as np

from bbqrec_jax.config import default_config
from bbqrec_jax.data.sources import load
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.serving.recommend import recommend
from bbqrec_jax.tokenizer.new_items import assign
from bbqrec_jax.utils.json_files import read_json

ITEMS = 60


def test_finite_codes_train_recommend_and_take_new_items(tmp_path, compile_cache):
  config = default_config()
  config.update_from_flattened_dict({
    "log_every": 10, "partitioner": "single",
    "data.source": "synthetic", "data.synthetic.num_users": 150, "data.synthetic.num_items": ITEMS,
    "tokenizer.quantizer": "fsq", "tokenizer.num_codes": 16, "tokenizer.num_levels": 2, "tokenizer.code_width": 8,
    "tokenizer.hidden": (16,), "tokenizer.max_length": 10, "tokenizer.row_length": 16, "tokenizer.steps": 20,
    "tokenizer.warmup_steps": 2, "tokenizer.batch_items": 32, "tokenizer.batch_rows": 8,
    "recommender.head": "dense", "recommender.item_inputs": ("fused", "modalities"), "recommender.width": 16,
    "recommender.mlp_width": 16, "recommender.num_layers": 1, "recommender.dropout": 0.0, "recommender.max_length": 10,
    "recommender.row_length": 16, "recommender.steps": 20, "recommender.evaluate_every": 20,
    "recommender.num_buckets": 8, "evaluation.batch_size": 50, "evaluation.beam_width": 20,
  })  # fmt: skip
  workdir = tmp_path / "run"
  results = experiment.run(config, workdir)
  assert results["test"]["recall@10"] > 0
  health = read_json(workdir / "tokenizer" / "health.json")
  assert health["collision_rate_after"] == 0
  assert min(health["usage"]) > 0.25

  ids = SemanticIds.load(workdir / "tokenizer")
  assert ids.codebooks.shape == (1, 2, 16, 8), "all streams share one grid, and are compared with one another"
  data = load(config.data)
  extended = assign(ids, {name: rows[:5] for name, rows in data.features.items()},
                    {name: mask[:5] for name, mask in data.present.items()})  # fmt: skip
  assert len(np.unique(extended.codes, axis=0)) == ITEMS + 5
  extended.save(tmp_path / "extended")
  restored = restore(workdir, tokenizer=tmp_path / "extended")
  items, scores = recommend(
    restored.model, restored.params, restored.catalogue, np.array([5, 9, 30], np.int32), top=ITEMS, beam_width=ITEMS
  )
  assert max(items) >= ITEMS, "new items are among the recommended"
  assert np.all(np.diff(scores) <= 0)
