"""The script for a machine with an accelerator: its steps, and that what is done is kept and not done again."""

import json
import sys
import types

import pytest


@pytest.fixture
def script(load_file):
  return load_file("experiments/accelerator.py")


def test_every_step_has_a_name_and_a_cache_is_filled_before_it_is_read(script, tmp_path):
  steps = [
    step for part in script.PARTS for step in script.steps(part, tmp_path, size="paper", data=tmp_path, nvidia=True)
  ]
  names = [step.name for step in steps]
  assert len(set(names)) == len(names)
  assert {name.split("/")[0] for name in names} == set(script.PARTS)
  place = {name: number for number, name in enumerate(names)}
  for name in names:
    if "warm cache" in name:
      (empty,) = (other for other in names if other == name.replace("warm", "empty"))
      assert place[empty] < place[name]
      caches = [steps[place[one]].environment["JAX_COMPILATION_CACHE_DIR"] for one in (empty, name)]
      assert caches[0] == caches[1]
  off = [step for step in steps if step.name.endswith("fusion autotuner off")]
  assert off
  assert all(script.NO_FUSION_AUTOTUNER in step.environment["XLA_FLAGS"] for step in off)
  few = [
    step.name for part in script.PARTS for step in script.steps(part, tmp_path, size="small", data=None, nvidia=False)
  ]
  assert not [name for name in few if "fusion" in name or name.startswith("recipe")]


def test_what_is_done_is_kept_and_not_done_again(script, tmp_path, monkeypatch, capsys):
  log = tmp_path / "log"
  code = f"open({str(log)!r}, 'a').write('x'); print('words'); print('{{\"found\": 3}}')"

  def steps(part, folder, **options):
    yield script.Step(f"{part}/good", (sys.executable, "-c", code), {})
    yield script.Step(f"{part}/bad", (sys.executable, "-c", "raise SystemExit('broken')"), {})
    yield script.Step(f"{part}/slow", (sys.executable, "-c", "import time; time.sleep(60)"), {})

  options = types.SimpleNamespace(
    work=None, output=tmp_path / "out", only=["compile"], size="small", data=None, limit=2.0
  )
  monkeypatch.setattr(script, "steps", steps)
  monkeypatch.setattr(script, "quiet_flags", lambda: options)
  script.main([])
  records = {record["name"]: record for record in json.loads((tmp_path / "out" / "steps.json").read_text())}
  assert records["compile/good"]["result"] == {"found": 3}
  assert (records["compile/good"]["status"], records["compile/bad"]["status"]) == (0, 1)
  assert "broken" in records["compile/bad"]["error"]
  assert records["compile/slow"]["status"] == "stopped after 2 s"
  script.main([])
  assert log.read_text() == "x"
  assert capsys.readouterr().out.count("compile/good") == 1
