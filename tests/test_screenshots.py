"""The shop of the documentation's pictures is one that `bbqrec prepare` takes whole; the pictures need a browser."""

import pytest

from bbqrec_jax.data.directory import load_directory
from bbqrec_jax.data.preparation import card
from bbqrec_jax.data.preparation.prepare import prepare


@pytest.fixture(scope="module")
def screenshots(load_file):
  return load_file("experiments/screenshots.py")


def test_the_shop_is_taken_whole(screenshots, tmp_path, monkeypatch):
  monkeypatch.setattr(card, "_draw", lambda *given: None)
  screenshots.write_shop(tmp_path, users=60, seed=0)
  log = (tmp_path / "interactions.csv").read_text().splitlines()
  report = prepare(tmp_path / "interactions.csv", tmp_path / "data", items=tmp_path / "items.csv", duplicates="keep")
  data = load_directory(tmp_path / "data")
  assert "quarantine" not in report or not report["quarantine"]
  assert data.interactions.num_interactions == len(log) - 1
  assert data.interactions.num_users == 60
  assert set(data.titles) <= {f"{name}, {size}" for own in screenshots.KINDS.values() for name in own
                              for size in screenshots.SIZES}  # fmt: skip


def test_what_is_made_is_not_made_again(screenshots, tmp_path, monkeypatch):
  called = []
  monkeypatch.setattr(screenshots.subprocess, "run", lambda command, **options: called.append(command[3]))
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "results.json").touch()
  screenshots.make(tmp_path)
  assert called == ["prepare", "features", "report", "export"]
  assert (tmp_path / "interactions.csv").exists()
