"""Runs whose data is split by time, or not at all: each is trained, ranked and asked in its own way."""

import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.reporting.report import gather
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.runs.run import read_data, run
from bbqrec_jax.serving.run import load_run


def write_data(folder, *, shortest=3):
  folder.mkdir()
  rng = np.random.default_rng(0)
  lines, times = [], []
  for user in range(40):
    length, first = rng.integers(shortest, 8), rng.integers(60)
    lines.append(f"{user} {' '.join(map(str, (user + np.arange(length)) % 12))}")
    times.append(f"{user} {' '.join(map(str, first + 6 * np.arange(length)))}")
  (folder / "sequences.txt").write_text("\n".join(lines))
  (folder / "timestamps.txt").write_text("\n".join(times))
  (folder / "items.jsonl").write_text("{}\n" * 12)
  return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return write_data(tmp_path_factory.mktemp("splits") / "data")


def make_config(data, split):
  config = default_config()
  config.update_from_flattened_dict({
    "data.path": str(data), "data.split": split, "recommender.head": "dense", "recommender.similarity": (),
    "recommender.item_inputs": ("item",), "recommender.width": 8, "recommender.mlp_width": 8, "partitioner": "single",
    "recommender.num_layers": 1, "recommender.num_heads": 1, "recommender.steps": 4, "recommender.evaluate_every": 2,
    "recommender.max_length": 8, "evaluation.batch_size": 16,
  })  # fmt: skip
  return config


@pytest.mark.parametrize("split", ["temporal", "none"])
def test_a_run_of_another_split_is_whole(data, tmp_path, split, capsys):
  config = make_config(data, split)
  results = run(config, tmp_path / "run")
  out = capsys.readouterr().out
  assert results["data"]["split"] == split
  assert results["best_step"] == 4 or split == "temporal"
  assert ("figures are of what was learned from" in out) == (split == "none")
  ranks = np.load(tmp_path / "run" / "ranks.npz")
  assert len(ranks["test"]) == 40 if split == "none" else 0 < len(ranks["test"]) < 40
  finished = load_run(tmp_path / "run")
  assert finished.evaluate()["test"]["ndcg@10"] == pytest.approx(results["test"]["ndcg@10"], abs=1e-6)
  told = gather(tmp_path / "run", restore(tmp_path / "run"))
  shown = [row for best_or_worst in told["extremes"].values() for row in best_or_worst]
  assert shown
  assert told["results"]["data"]["split"] == split
  assert len(finished.recommend([[3]], k=2)[0]) == 2, "a new user with one interaction"
  config.data.split = "leave_one_out"
  with pytest.raises(InputError, match=r"data\.split"):
    run(config, tmp_path / "run")


def test_a_run_on_everything_trains_as_long_as_the_validated_one(data, tmp_path, capsys):
  results = run(make_config(data, "leave_one_out"), tmp_path / "validated")

  def ask(**fields):
    config = make_config(data, "none")
    config.recommender.steps = 0
    config.update_from_flattened_dict({"steps_of": str(tmp_path / "validated"), **fields})
    return config

  found = run(ask(seed=3), tmp_path / "all")
  assert found["steps"] == found["best_step"] == results["best_step"]
  assert f"{results['best_step']}, where it was best of 4" in capsys.readouterr().out
  assert run(ask(seed=3), tmp_path / "all") == found, "the same command again"
  load_run(tmp_path / "all")
  for fields, says in (
    ({"recommender.width": 16}, r"same recipe, which differs in recommender\.width \(there 8, now 16\)"),
    ({"recommender.steps": 7}, r"recommender\.steps = 7 both say how long"),
    ({"steps_of": str(tmp_path / "all")}, "one of data.split = 'none'"),
    ({"steps_of": str(tmp_path)}, "found no results.json"),
    ({"data.split": "temporal"}, "steps_of is of data.split = 'none', got 'temporal'"),
    ({"steps_of": ""}, "set steps_of to the workdir"),
  ):
    with pytest.raises(InputError, match=says):
      run(ask(**fields), tmp_path / "other")
  assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("split", ["leave_one_out", "none"])
def test_users_with_one_interaction_are_learned_from_and_asked_for(tmp_path, split, capsys):
  data = write_data(tmp_path / "data", shortest=1)
  lines = (data / "sequences.txt").read_text().splitlines()
  lengths = {line.split()[0]: len(line.split()) - 1 for line in lines}
  results = run(make_config(data, split), tmp_path / "run")
  ranked = [user for user, length in lengths.items() if length >= (3 if split == "leave_one_out" else 2)]
  short = sum(length < 3 for length in lengths.values())
  assert (f"  {short} users have fewer than 3 interactions" in capsys.readouterr().out) == (split == "leave_one_out")
  assert results["data"]["users"] == 40
  assert len(np.load(tmp_path / "run" / "ranks.npz")["test"]) == len(ranked) < 40
  finished = load_run(tmp_path / "run")
  assert finished.evaluate()["test"]["ndcg@10"] == pytest.approx(results["test"]["ndcg@10"], abs=1e-6)
  alone = min(lengths, key=lengths.get)
  assert lengths[alone] == 1
  assert len(finished.recommend(users=[alone], k=2)[0]) == 2
  extremes = gather(tmp_path / "run", restore(tmp_path / "run"))["extremes"]
  assert {row["user"] for rows in extremes.values() for row in rows} <= set(ranked)
  assert all(extremes.values())


@pytest.mark.parametrize("reads", [True, False])
def test_titles_that_a_model_reads_tell_its_data_from_others(tmp_path, reads):
  data = write_data(tmp_path / "data")
  config = make_config(data, "leave_one_out")
  config.recommender.candidate_similarity.update({"streams": ("behaviour",), "titles": reads})
  hashes = []
  for title in ("red mug", "blue mug"):
    (data / "items.jsonl").write_text(f'{{"title": "{title}"}}\n' * 12)
    hashes.append(read_data(config)[2]["titles_hash"])
  assert (hashes[0] != hashes[1]) == reads
  assert (None in hashes) != reads
