"""The notebook's code runs as it stands, from a folder of its own."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("compile_cache")


def test_data_frames_become_recommendations(request, tmp_path, monkeypatch):
  pytest.importorskip("pandas")
  notebook = json.loads((request.config.rootpath / "examples" / "dataframes.ipynb").read_text(encoding="utf-8"))
  monkeypatch.chdir(tmp_path)
  names = {}
  for cell in notebook["cells"]:
    assert not cell.get("outputs"), "the notebook is kept without what it printed"
    if cell["cell_type"] == "code":
      exec("".join(cell["source"]), names)
  run, found = names["run"], names["found"]
  assert run.results["test"]["recall@10"] > 3 * run.results["popularity"]["recall@10"]
  assert found[0].item == "SKU-6"
  assert len(run.semantic_ids["SKU-3"]) == 2
  assert {item for item, _ in names["alike"]} <= {f"SKU-{number}" for number in range(20)}
  assert names["again"].evaluate()["test"] == pytest.approx(run.results["test"], rel=1e-5)
