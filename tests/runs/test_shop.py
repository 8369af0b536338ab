"""From a log, a product table and pictures to recommendations by the shop's own ids."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import bbqrec_jax
from bbqrec_jax.commands import recommend
from bbqrec_jax.config import default_config
from bbqrec_jax.data.preparation import card

ITEMS = 24  # After item n comes item n + 1.


def write_shop(folder):
  rng = np.random.default_rng(0)
  with open(folder / "clicks.csv", "w", newline="") as file:
    rows = [
      (f"U {user}", f"SKU-{(start + step) % ITEMS:03d}", 1_700_000_000_000 + 60_000 * step)
      for user, start in enumerate(rng.integers(ITEMS, size=120).tolist())
      for step in range(8)
    ]
    csv.writer(file).writerows([("customer_id", "sku", "ts"), *rng.permutation(np.array(rows, object)).tolist()])
  with open(folder / "products.csv", "w", newline="") as file:
    rows = [(f"SKU-{n:03d}", f"Number {n} mug", f"B{n % 3}", f"Home > {n % 4}", f"${n}.50") for n in range(ITEMS)]
    csv.writer(file).writerows([("sku", "name", "brand", "category", "price"), *rows])
  (folder / "pictures").mkdir()
  for n in range(0, ITEMS, 2):
    Image.new("RGB", (9, 7), (10 * n, 0, 0)).save(folder / "pictures" / f"SKU-{n:03d}.png")
  (folder / "pictures" / "SKU-004.png").write_bytes(b"broken")
  return folder


def call(monkeypatch, capsys, workdir, **options):
  names = ("history", "user", "titles", "histories", "times", "timestamps", "output", "data", "tokenizer", "features")
  given = dict.fromkeys((*names, "allow", "deny")) | {"workdir": workdir, "top": 3, "repeat": False, "trust": []}
  monkeypatch.setattr(recommend, "quiet_flags", lambda: type("Options", (), given | options))
  recommend.main(sys.argv[:1])
  return capsys.readouterr().out


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
  folder = write_shop(tmp_path_factory.mktemp("shop"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(card, "_draw", lambda *given: None)
    bbqrec_jax.prepare(
      folder / "clicks.csv", folder / "data", items=folder / "products.csv", images=folder / "pictures"
    )
  bbqrec_jax.features(folder / "data", text_width=8, attribute_width=4)
  config = default_config()
  config.update_from_flattened_dict({
    "partitioner": "single", "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_levels": 2, "tokenizer.num_codes": 8,
    "recommender.head": "dense", "recommender.similarity": (), "recommender.item_inputs": ("fused", "item"),
    "recommender.width": 32, "recommender.mlp_width": 32, "recommender.num_layers": 1, "recommender.dropout": 0.0,
    "recommender.steps": 120, "recommender.evaluate_every": 120, "recommender.max_length": 8,
    "recommender.optimizer.learning_rate": 1e-2, "evaluation.batch_size": 60,
  })  # fmt: skip
  bbqrec_jax.run(config, folder / "run", data=folder / "data")
  return folder


def test_a_shop_is_asked_by_its_own_ids(shop, monkeypatch, capsys):
  shown = call(monkeypatch, capsys, shop / "run", history="SKU-004,SKU-005,SKU-006")
  assert "SKU-007 " in shown.split("recommended:")[1]
  assert "Number 7 mug" in shown
  assert "history" in call(monkeypatch, capsys, shop / "run", user="U 7")
  with pytest.raises(SystemExit):
    call(monkeypatch, capsys, shop / "run", history="SKU-04")
  assert "got 'SKU-04'; the nearest are 'SKU-0" in capsys.readouterr().err


def test_every_modality_was_made(shop):
  data = bbqrec_jax.load_data(shop / "data")
  assert {name: int(mask.sum()) for name, mask in data.present.items()} == {
    "attributes": ITEMS, "image": ITEMS // 2 - 1, "text": ITEMS
  }  # fmt: skip
  assert json.loads((shop / "data" / "broken_pictures.jsonl").read_text())["file"] == "SKU-004.png"


def test_the_commands_do_the_same(shop, tmp_path):
  program = "import sys; from bbqrec_jax.commands import main; sys.argv = ['bbqrec', *sys.argv[1:]]; main()"

  def bbqrec(*arguments):
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)

  given = [str(shop / "clicks.csv"), f"--items={shop / 'products.csv'}", f"--output={tmp_path / 'data'}"]
  made = bbqrec("prepare", *given, "--min_per_item=2")
  assert made.returncode == 0, made.stderr
  assert "user = customer_id, item = sku, time = ts" in made.stdout
  assert f"next: bbqrec features {tmp_path / 'data'}" in made.stdout
  assert (tmp_path / "data" / "sequences.txt").read_bytes() == (shop / "data" / "sequences.txt").read_bytes()
  again = bbqrec("prepare", *given)
  assert (again.returncode, again.stderr.count("\n")) == (2, 1)
  assert "exists already" in again.stderr
  featured = bbqrec("features", str(tmp_path / "data"), "--text_width=8", "--attributes=none")
  assert featured.returncode == 0, featured.stderr
  ours, theirs = (np.load(folder / "data" / "text_features.npy") for folder in (tmp_path, shop))
  np.testing.assert_array_equal(ours, theirs)
