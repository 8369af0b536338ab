"""Small runs of what a config can choose: each trains, is restored and recommends. One device, quickly compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender import fit_similarity as fitting
from bbqrec_jax.recommender import train as recommender_stage
from bbqrec_jax.recommender.step import make_recommender_step
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.semantic_ids.artefact import SemanticIds
from bbqrec_jax.serving.recommend import recommend
from bbqrec_jax.utils.json_files import read_json, write_json

pytestmark = pytest.mark.usefixtures("compile_cache")

NUM_ITEMS = 80


def make_config(**changes):
  config = default_config()
  config.update_from_flattened_dict({
    "log_every": 10, "partitioner": "single",
    "data.source": "synthetic", "data.synthetic.num_users": 200, "data.synthetic.num_items": NUM_ITEMS,
    "tokenizer.num_codes": 16, "tokenizer.num_levels": 2, "tokenizer.kmeans_iterations": 5,
    "recommender.width": 16, "recommender.mlp_width": 16, "recommender.num_layers": 1, "recommender.depth_layers": 1,
    "recommender.dropout": 0.0, "recommender.max_length": 10, "recommender.row_length": 16,
    "recommender.batch_rows": 32, "recommender.steps": 40, "recommender.evaluate_every": 40,
    "recommender.optimizer.learning_rate": 1e-2, "recommender.optimizer.warmup_steps": 5,
    "recommender.num_buckets": 8, "evaluation.batch_size": 100, "evaluation.beam_width": 20,
  })  # fmt: skip
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def artefact(tmp_path_factory, compile_cache):
  """The folder of semantic IDs."""
  folder = tmp_path_factory.mktemp("tokenizer")
  experiment.tokenize(make_config(**{"tokenizer.quantizer": "rq_kmeans"}), folder / "run")
  ids = SemanticIds.load(folder / "run" / "tokenizer")
  ids.save(folder / "ids")
  return str(folder / "ids")


@pytest.mark.parametrize(
  "changes",
  [
    {"recommender.head": "parallel"},
    {
      "recommender.head": "hybrid",
      "recommender.dense_tower.width": 8,
      "recommender.dense_tower.mlp_width": 16,
      "recommender.seen_item_bias": False,
      "recommender.candidate_similarity.streams": ("features", "modalities", "fused", "behaviour"),
    },
    {"recommender.backbone": "encoder_decoder", "recommender.head_width": 8, "recommender.length_buckets": (4,)},
    {
      "recommender.softmax_over": "all",
      "recommender.subtree_logits": False,
      "recommender.seen_item_bias": False,
      "recommender.dtype": "bfloat16",
    },
    {"recommender.item_inputs": ("fused", "features"), "recommender.head": "dense"},
  ],
  ids=str,
)
def test_every_choice_trains_and_recommends(artefact, tmp_path, changes):
  results = experiment.run(make_config(**{"tokenizer.artefact": artefact}, **changes), tmp_path / "run")
  assert results["validation"]["recall@20"] > results["popularity"]["recall@20"]
  _, _, model, params, catalogue, *_ = restore(tmp_path / "run")
  items, scores = recommend(model, params, catalogue, np.array([5, 9, 70, 2], np.int32), top=10, beam_width=20)
  assert len(set(items.tolist()) - {5, 9, 70, 2}) == 10
  assert np.all(np.diff(scores) <= 0)


def test_time_between_interactions_needs_times_and_is_asked_for(artefact, tmp_path):
  changes = {"tokenizer.artefact": artefact, "recommender.head": "dense", "recommender.time_buckets": 32}
  changes["recommender.rows"] = "packed"
  experiment.run(make_config(**changes), tmp_path / "run")
  _, _, model, params, catalogue, *_ = restore(tmp_path / "run")
  assert np.any(params["backbone"]["time"]["table"])
  history = np.array([5, 9, 70], np.int32)
  scores = [
    recommend(model, params, catalogue, history, top=5, beam_width=5, times=np.array(times))[1]
    for times in ([0.0, 1.0, 2.0], [7.0, 8.0, 9.0], [0.0, 1.0, 1e7])
  ]
  np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
  assert np.abs(scores[0] - scores[2]).max() > 1e-5

  note = read_json(tmp_path / "run" / "run.json")
  write_json(tmp_path / "run" / "run.json", note | {"data times_hash": "other"})
  with pytest.raises(InputError, match="has times_hash"):
    restore(tmp_path / "run")

  folder = tmp_path / "data"
  folder.mkdir()
  (folder / "sequences.txt").write_text("".join(f"{user} 0 1 2 3\n" for user in range(5)))
  (folder / "items.jsonl").write_text("{}\n" * 4)
  np.save(folder / "text_features.npy", np.eye(4, dtype=np.float32))
  wrong = changes | {"data.source": "directory", "data.path": str(folder), "tokenizer.artefact": ""}
  with pytest.raises(InputError, match=r"needs timestamps, found none: give timestamps\.txt"):
    experiment.run(make_config(**wrong), tmp_path / "other")


class Cut(Exception):
  """Where a run is cut."""


def test_a_run_with_candidate_similarity_continues_from_wherever_it_is_cut(artefact, tmp_path, monkeypatch):
  changes = {"tokenizer.artefact": artefact, "recommender.head": "dense"}
  changes["recommender.candidate_similarity.streams"] = ("modalities", "behaviour")
  monkeypatch.setattr(fitting, "_FEWEST_USERS", 100)
  config, trained, traced = make_config(**changes), recommender_stage._trained, []

  def noting(*args, **options):
    step = make_recommender_step(*args, **options)

    def noted(*args, **options):
      traced.append(jax.tree.map(jnp.shape, args))
      return step(*args, **options)

    return noted

  with monkeypatch.context() as patch:
    patch.setattr(recommender_stage, "make_recommender_step", noting)
    whole = experiment.run(config, tmp_path / "whole")
  assert len(traced) == 1, "the held-out base and the final model are trained by one program"

  def cut(*args, **options):
    raise Cut

  def cut_at_last(stage, *args, **options):
    return cut() if stage.name == "recommender" else trained(stage, *args, **options)

  tables = tmp_path / "cut" / "candidate_similarity.json"
  for name, replacement, fitted in (("fit_similarity", cut, False), ("_trained", cut_at_last, True)):
    with monkeypatch.context() as patch:
      patch.setattr(recommender_stage, name, replacement)
      with pytest.raises(Cut):
        experiment.run(config, tmp_path / "cut")
    assert tables.exists() == fitted
  monkeypatch.setattr(recommender_stage, "fit_similarity", cut)  # Which is not done again.
  again = experiment.run(config, tmp_path / "cut")
  assert {name: again[name] for name in again if name != "seconds"} == {
    name: whole[name] for name in whole if name != "seconds"
  }
  params = restore(tmp_path / "cut").params["candidate_similarity"]
  written = read_json(tables)["parameters"]
  assert params.keys() == written.keys()
  for name, part in written.items():
    np.testing.assert_allclose(params[name], np.float32(part), rtol=1e-5)
    assert np.any(params[name])
