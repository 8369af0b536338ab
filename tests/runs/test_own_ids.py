"""A run on items that have ids of their own, some of which are left out: they come back as they went in."""

import dataclasses
import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bbqrec_jax.commands import recommend
from bbqrec_jax.config import default_config
from bbqrec_jax.data.item_ids import ItemIds
from bbqrec_jax.errors import InputError
from bbqrec_jax.runs import run as experiment
from bbqrec_jax.runs.restore import restore
from bbqrec_jax.serving.run import load_run
from bbqrec_jax.tokenizer.new_items import assign

ITEMS = 24  # After item n comes item n + 1, which the tokens say; those whose number ends in 3 have no features.


def write_data(folder, *, name="sku"):
  rng = np.random.default_rng(0)
  order = rng.permutation(ITEMS)
  rows = [
    f"{name}-{n}\t{'' if n % 10 == 3 else ' '.join(map(str, rng.normal(size=4).round(2)))}\tTitle {n}" for n in order
  ]
  folder.mkdir(exist_ok=True)
  (folder / "shop.item").write_text("\n".join(["item_id:token\ttext_emb:float_seq\ttitle:token", *rows]) + "\n")
  lines = ["user_id:token\titem_id:token\ttimestamp:float"]
  for user in range(120):
    start = rng.integers(ITEMS)
    lines += [f"U{user}\t{name}-{(start + step) % ITEMS}\t{step}" for step in range(8)]
  (folder / "shop.inter").write_text("\n".join([lines[0], *rng.permutation(lines[1:])]) + "\n")
  return folder


def make_config(data):
  config = default_config()
  config.update_from_flattened_dict({
    "data.source": "recbole", "data.path": str(data), "data.drop_incomplete_items": True,
    "tokenizer.quantizer": "rq_kmeans", "tokenizer.num_levels": 2, "tokenizer.num_codes": 8,
    "recommender.head": "dense", "recommender.similarity": (), "recommender.item_inputs": ("fused", "item"),
    "recommender.width": 32, "recommender.mlp_width": 32, "recommender.num_layers": 1, "recommender.dropout": 0.0,
    "recommender.steps": 120, "recommender.evaluate_every": 60, "recommender.max_length": 8,
    "recommender.optimizer.learning_rate": 1e-2, "evaluation.batch_size": 60,
  })  # fmt: skip
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("own ids")
  data = write_data(folder / "data")
  experiment.run(make_config(data), folder / "run")
  return data, folder / "run"


def call(monkeypatch, capsys, workdir, **options):
  names = ("history", "user", "titles", "histories", "times", "timestamps", "output", "data", "tokenizer", "features")
  names += ("allow", "deny")
  given = dict.fromkeys(names) | {"workdir": workdir, "top": 1, "repeat": False, "trust": []} | options
  monkeypatch.setattr(recommend, "quiet_flags", lambda: type("Options", (), given))
  recommend.main(sys.argv[:1])
  return capsys.readouterr().out


def test_ids_go_in_and_come_out(finished, monkeypatch, capsys, tmp_path):
  _, workdir = finished
  shown = call(monkeypatch, capsys, workdir, history="sku-4,sku-5, sku-6")
  history, best = shown.split("recommended:")
  assert [f"sku-{n}" in history for n in (4, 5, 6)] == [True] * 3
  assert "sku-7 " in best
  assert "Title 7" in best
  lines = tmp_path / "histories"
  lines.write_text("ann sku-14 sku-15\nbob sku-11 sku-12\n")
  call(monkeypatch, capsys, workdir, histories=lines, output=tmp_path / "found")
  records = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
  assert [(one["user"], one["items"]) for one in records] == [("ann", ["sku-16"]), ("bob", ["sku-14"])]


def test_items_are_asked_for_by_what_they_are_called(finished, monkeypatch, capsys):
  _, workdir = finished
  shown = call(monkeypatch, capsys, workdir, titles="titel 4,TITLE 5,6 title")
  history, best = shown.split("recommended:")
  assert [f"sku-{n} " in history for n in (4, 5, 6)] == [True] * 3
  assert "sku-7 " in best
  with pytest.raises(SystemExit):
    call(monkeypatch, capsys, workdir, titles="Title 4,garden hose")
  assert "got 'garden hose'" in capsys.readouterr().err


def test_allowed_items_alone_are_recommended_and_denied_ones_never(finished, monkeypatch, capsys, tmp_path):
  _, workdir = finished
  given = {"history": "sku-4,sku-5,sku-6", "top": 30}
  best = call(monkeypatch, capsys, workdir, **given | {"top": 1}, deny="sku-7").split("recommended:")[1]
  assert "sku-7 " not in best
  (tmp_path / "allowed.txt").write_text("sku-9\n\nsku-7\nsku-8\n")
  best = call(monkeypatch, capsys, workdir, **given, allow=f"@{tmp_path}/allowed.txt", deny="sku-9")
  assert [line.split()[2] for line in best.split("recommended:")[1].splitlines()[1:]] == ["sku-7", "sku-8"]
  with pytest.raises(SystemExit):
    call(monkeypatch, capsys, workdir, **given, deny="sku-7,suk-8")
  assert "--deny entry 2: expected the id of an item, got 'suk-8'; the nearest are 'sku-8'" in capsys.readouterr().err
  run = load_run(workdir, data=finished[0])
  assert [one.item for one in run.recommend([["sku-4", "sku-5"]], allow=["sku-6", "sku-8"])[0]] == ["sku-6", "sku-8"]
  assert run.find("titel 11")[0].item == "sku-11"


def test_parquet_goes_in_and_out(finished, monkeypatch, capsys, tmp_path):
  _, workdir = finished
  asked = {"user": ["a nn", "bob"], "items": [["sku-14", "sku-15"], ["sku-11", "sku-12"]]}
  pyarrow.parquet.write_table(pyarrow.table(asked), tmp_path / "asked.parquet")
  call(monkeypatch, capsys, workdir, histories=tmp_path / "asked.parquet", output=tmp_path / "found.parquet")
  found = pyarrow.parquet.read_table(tmp_path / "found.parquet").to_pylist()
  assert [(row["user"], row["items"], len(row["scores"])) for row in found] == [
    ("a nn", ["sku-16"], 1), ("bob", ["sku-14"], 1)
  ]  # fmt: skip


def test_a_user_of_the_data_is_asked_for_by_id(finished, monkeypatch, capsys):
  data, workdir = finished
  lines = [line.split("\t") for line in (data / "shop.inter").read_text().splitlines()[1:]]
  own = [item for _, item, _ in sorted((line for line in lines if line[0] == "U17"), key=lambda line: int(line[2]))]
  history, _ = call(monkeypatch, capsys, workdir, user="U17").split("recommended:")
  kept = [name for name in own if int(name.removeprefix("sku-")) % 10 != 3]
  assert [line.split()[0] for line in history.splitlines()[1:]] == kept
  with pytest.raises(SystemExit):
    call(monkeypatch, capsys, workdir, user="U1700")
  assert "got 'U1700'; the nearest are 'U1" in capsys.readouterr().err


def test_an_item_that_was_left_out_is_refused_by_its_id(finished, monkeypatch, capsys):
  with pytest.raises(SystemExit):
    call(monkeypatch, capsys, finished[1], history="sku-4,sku-13")
  assert "--history entry 2: expected the id of an item, got 'sku-13'" in capsys.readouterr().err


def test_the_workdir_says_whose_its_rows_are(finished):
  _, workdir = finished
  restored = restore(workdir)
  ids = json.loads((workdir / "ids.json").read_text())
  assert ids["items"] == restored.dataset.item_ids.to_json()
  assert len(ids["items"]) == len(restored.ids.codes) == ITEMS - 3
  assert ids["users"] == [str(user) for user in restored.dataset.interactions.users]
  assert json.loads((workdir / "tokenizer" / "item_ids.json").read_text())["items"] == ids["items"]
  titles = dict(zip(ids["items"], restored.dataset.titles, strict=True))
  assert all(title == f"Title {name.removeprefix('sku-')}" for name, title in titles.items())


def test_the_same_rows_under_other_ids_are_other_data(finished, tmp_path):
  _, workdir = finished
  data = write_data(tmp_path / "data", name="art")
  with pytest.raises(InputError, match="ids_hash"):
    restore(workdir, data=data)
  with pytest.raises(InputError, match="differs in data ids_hash"):
    experiment.run(make_config(data), workdir)


def test_new_items_have_ids_too(finished, tmp_path):
  _, workdir = finished
  known = restore(workdir)
  features, present = {"text": np.ones((2, 4), np.float32)}, {"text": np.ones(2, bool)}
  with pytest.raises(InputError, match=r"expected items\.jsonl with the ids of the 2 new items"):
    assign(known.ids, features, present)
  item_ids = known.dataset.item_ids.extended(ItemIds(["new-1", "new-2"]), 2, where="here")
  extended = assign(known.ids, features, present, item_ids=item_ids)
  extended.save(tmp_path / "ids")
  more = restore(workdir, tokenizer=tmp_path / "ids").dataset
  assert more.item_ids.to_json()[-3:] == [known.dataset.item_ids[ITEMS - 4], "new-1", "new-2"]
  renamed = dataclasses.replace(extended, item_ids=ItemIds([f"x{n}" for n in range(len(item_ids))]))
  with pytest.raises(InputError, match="there: row 0 is item 'x0', expected 'sku-"):
    renamed.check_extension(known.ids, where="there")
