"""A run that was made shorter, or of few items, is fitted to that with a warning in place of a refusal."""

import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.presets import preset
from bbqrec_jax.runs import run as runs


def begun(tmp_path, **changes):
  """The config that a run begins with; nothing is trained."""
  config = default_config()
  config.update_from_flattened_dict(
    {"partitioner": "single", "data.source": "synthetic", "data.synthetic.num_users": 40} | changes
  )
  with runs._begun(config, tmp_path / "run") as prepared:
    return prepared.config.tokenizer


def test_a_warmup_ends_within_the_run(tmp_path, capsys):
  tokenizer = begun(tmp_path, **{"tokenizer.steps": 60, "data.synthetic.num_items": 600})
  assert (tokenizer.steps, tokenizer.warmup_steps, tokenizer.num_codes) == (60, 15, 256)
  (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
  assert "tokenizer.warmup_steps = 200" in line


def test_few_items_have_fewer_codes(tmp_path, capsys):
  tokenizer = begun(tmp_path, **{"data.synthetic.num_items": 300})
  assert (tokenizer.num_codes, tokenizer.warmup_steps) == (64, 200)
  assert "warning: tokenizer.num_codes = 256" in capsys.readouterr().out


def test_fewer_codes_are_still_enough_ids(tmp_path):
  changes = {"data.synthetic.num_items": 100, "tokenizer.num_levels": 1}
  assert begun(tmp_path, **changes).num_codes == 256


def test_what_fits_or_was_chosen_is_left(tmp_path, capsys):
  chosen = {"tokenizer.num_codes": 128, "tokenizer.warmup_steps": 59, "tokenizer.steps": 60}
  tokenizer = begun(tmp_path, **chosen | {"data.synthetic.num_items": 100})
  assert (tokenizer.num_codes, tokenizer.warmup_steps) == (128, 59)
  assert "warning" not in capsys.readouterr().out


def test_wrong_steps_are_refused_all_the_same(tmp_path):
  with pytest.raises(InputError, match=r"tokenizer\.steps must be at least 1"):
    begun(tmp_path, **{"tokenizer.steps": 0})


def test_histories_too_short_to_fit_candidate_similarity_do_without(tmp_path, capsys):
  folder = tmp_path / "data"
  folder.mkdir()
  (folder / "items.jsonl").write_text("{}\n" * 4)
  for length, left in ((4, ()), (5, ("behaviour",))):
    (folder / "sequences.txt").write_text("".join(f"{user} {' '.join('01230'[:length])}\n" for user in range(5)))
    config = preset("sasrec")
    config.data.path, config.recommender.candidate_similarity.streams = str(folder), ("behaviour",)
    for _ in range(2):  # A second start finds the workdir to be its own.
      with runs._begun(config, tmp_path / f"run{length}") as prepared:
        assert prepared.config.recommender.candidate_similarity.streams == left
    assert capsys.readouterr().out.count("candidate_similarity is left out") == 2 * (not left)
