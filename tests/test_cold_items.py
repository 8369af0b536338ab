"""Items held out of everything: who is asked about them, and that the whole experiment runs."""

import copy
import json
import shutil

import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.data.interactions import from_lengths
from bbqrec_jax.data.ranking import evaluation_batches
from bbqrec_jax.data.sources import load, load_directory
from bbqrec_jax.errors import InputError
from bbqrec_jax.layers.apply import apply
from bbqrec_jax.runs.restore import restore


@pytest.fixture(scope="module")
def script(load_file):
  return load_file("experiments/cold_items.py")


def test_histories_are_parted_as_by_hand(script):
  # Items 1 and 4 are cold; the warm ones 0, 2, 3, 5 are numbered 0 to 3.
  cold = np.array([False, True, False, False, True, False])
  lists = {"a": [0, 2, 3, 5], "b": [0, 1, 2, 3, 4], "c": [1, 4], "d": [5, 1], "e": [4, 3, 3, 0]}
  items = np.concatenate([np.array(values) for values in lists.values()])
  whole = from_lengths(items, np.array([len(v) for v in lists.values()]), np.array(list(lists)))
  warm, histories, targets = script.part(whole, cold)

  def by_user(interactions):
    return {str(user): interactions.history(row).tolist() for row, user in enumerate(interactions.users)}

  assert by_user(warm) == {"a": [0, 1, 2, 3], "b": [0, 1, 2], "e": [2, 2, 0]}
  assert by_user(histories) == {"b": [0, 1, 2], "d": [3]}, "c has nothing but cold items"
  assert targets.tolist() == [1, 0]


def test_the_share_is_kept_and_drawn_by_the_seed(script):
  drawn = [script.choose_cold(200, 0.05, seed=seed) for seed in (0, 0, 1)]
  assert [mask.sum() for mask in drawn] == [10, 10, 10]
  assert np.array_equal(drawn[0], drawn[1])
  assert not np.array_equal(drawn[0], drawn[2])
  assert script.choose_cold(5, 0.01, seed=0).sum() == 1


@pytest.mark.usefixtures("compile_cache")
def test_a_small_run_ranks_the_cold_items_among_all(script, tmp_path, capsys):
  config = default_config()
  config.update_from_flattened_dict({
    "data.source": "synthetic", "data.synthetic.num_users": 150, "data.synthetic.num_items": 60,
    "tokenizer.num_levels": 2, "tokenizer.num_codes": 16, "tokenizer.quantizer": "rq_kmeans",
    "recommender.head": "dense", "recommender.width": 8, "recommender.mlp_width": 8, "recommender.num_layers": 1,
    "recommender.similarity": (), "recommender.item_inputs": ("fused", "features", "item"),
    "recommender.steps": 20, "recommender.evaluate_every": 10, "evaluation.batch_size": 52,
  })  # fmt: skip
  whole = load(config.data)
  text = script.report(copy.deepcopy(config), tmp_path, share=0.2)
  figures = json.loads((tmp_path / "dense.json").read_text())
  assert figures["items"] == 60
  assert figures["cold_items"] == 12
  left = load_directory(tmp_path / "data")
  assert left.num_items == 48
  cold = script.choose_cold(60, 0.2, seed=0)
  np.testing.assert_array_equal(left.features["text"], whole.features["text"][~cold])
  assert [title for title, hidden in zip(whole.titles, cold, strict=True) if not hidden] == list(left.titles)
  assert 0 < figures["cold_users"] < 150
  assert f"{figures['cold']['recall@10']:.4f}" in text

  # Judged once more, from the scores of all items.
  _, _, model, params, catalogue, *_ = restore(
    tmp_path / "dense", tokenizer=tmp_path / "ids" / "extended", features=tmp_path / "new_items"
  )
  assert left.modalities == ("image", "text")
  mean, deviation = left.features["text"].mean(axis=0), left.features["text"].std(axis=0)
  expected = (whole.features["text"][cold] - mean) / deviation
  np.testing.assert_allclose(catalogue.features[48:, -len(mean) :], expected, atol=1e-3)
  _, histories, targets = script.part(whole.interactions, cold)
  targets = targets + 48
  batch = next(evaluation_batches(histories, targets, batch_size=len(targets), max_length=model.settings.max_length))
  batch.pop("valid")
  states = apply(model, params, "last_states", catalogue, batch)
  scores = np.asarray(apply(model, params, "scores", catalogue, states, model.seen(batch)))
  hits = np.sum(scores >= scores[np.arange(len(targets)), targets][:, None], axis=1) <= 10
  # Rounding may swap near neighbours at the cut, for one user at the very most.
  assert figures["cold"]["recall@10"] == pytest.approx(hits.mean(), abs=1 / len(hits) + 1e-6)
  assert 0 < hits.mean() < 1

  # Another of the same head, on the same IDs.
  other = copy.deepcopy(config)
  other.recommender.update({"item_inputs": ("fused", "item"), "item_dropout": 0.5})
  assert "| mixed | 0." in script.report(other, tmp_path, share=0.2, name="mixed")
  assert json.loads((tmp_path / "mixed.json").read_text())["cold_users"] == figures["cold_users"]
  assert json.loads((tmp_path / "dense.json").read_text()) == figures

  # One that reads no IDs is asked for the same items by their features alone.
  plain = copy.deepcopy(config)
  plain.recommender.item_inputs = ("features", "item")
  script.report(plain, tmp_path, share=0.2, name="plain")
  assert json.loads((tmp_path / "plain.json").read_text())["cold_users"] == figures["cold_users"]
  more = restore(tmp_path / "plain", features=tmp_path / "new_items")
  assert more.ids is None
  np.testing.assert_array_equal(more.catalogue.features, catalogue.features)
  assert "warning" not in capsys.readouterr().out
  shifted = tmp_path / "shifted"
  shifted.mkdir()
  shutil.copy(tmp_path / "new_items" / "items.jsonl", shifted)
  for name in left.modalities:
    np.save(shifted / f"{name}_features.npy", whole.features[name][cold] + (1e3 if name == "text" else 0.0))
  restore(tmp_path / "plain", features=shifted)
  assert "warning: text features of 12 of 12 new items are like no known item's" in capsys.readouterr().out
  lacking = tmp_path / "lacking"
  lacking.mkdir()
  shutil.copy(tmp_path / "new_items" / "items.jsonl", lacking)
  np.save(lacking / "text_features.npy", whole.features["text"][cold])
  with pytest.raises(InputError, match=r"image_features\.npy: .*found nothing; .* write zeros of shape \[items, 96\]"):
    restore(tmp_path / "plain", features=lacking)
  np.save(lacking / "image_features.npy", np.zeros((12, 96), np.float32))
  found = restore(tmp_path / "plain", features=lacking).catalogue.features
  np.testing.assert_array_equal(found[48:, :96], 0.0)
  np.testing.assert_array_equal(found[48:, 96:], catalogue.features[48:, 96:])
  assert "warning" not in capsys.readouterr().out
  with pytest.raises(InputError, match="reads no semantic IDs: give the new items' features alone"):
    restore(tmp_path / "plain", tokenizer=tmp_path / "ids" / "extended", features=tmp_path / "new_items")

  # What is given of new items must be what the recommender reads, and of one number.
  with pytest.raises(InputError, match=r"reads semantic IDs: give those of the new items too \(--tokenizer\)"):
    restore(tmp_path / "dense", features=tmp_path / "new_items")
  with pytest.raises(InputError, match=r"reads features: give those of the new items too \(--features\)"):
    restore(tmp_path / "dense", tokenizer=tmp_path / "ids" / "extended")
  fewer, wider = tmp_path / "fewer", tmp_path / "wider"
  for folder in (fewer, wider):
    folder.mkdir()
  for name, array in left.features.items():
    np.save(fewer / f"{name}_features.npy", array[:3])
    np.save(wider / f"{name}_features.npy", np.tile(array, 2))
  with pytest.raises(InputError, match=r"expected features of the 12 new items of .*extended, got 3 rows"):
    restore(tmp_path / "dense", tokenizer=tmp_path / "ids" / "extended", features=fewer)
  with pytest.raises(InputError, match=r"wider/image_features\.npy: expected rows of"):
    restore(tmp_path / "plain", features=wider)

  with pytest.raises(InputError, match="holds out other items"):
    script.report(config, tmp_path, share=0.3)


@pytest.mark.parametrize("name", ["ids", "data", "a/b", "..", ""])
def test_a_name_that_is_taken_or_no_name_is_refused(script, tmp_path, name):
  with pytest.raises(InputError, match="--name: expected"):
    script.report(default_config(), tmp_path, share=0.1, name=name)


def test_a_share_that_leaves_nothing_is_refused(script, tmp_path):
  for share in (0.0, 1.0, -1.0):
    with pytest.raises(InputError, match="--share: expected a number between 0 and 1"):
      script.report(default_config(), tmp_path, share=share)
