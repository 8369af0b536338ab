"""Finished runs beside one another: what belongs together, and what one has over another, user by user."""

import numpy as np
import pytest

from bbqrec_jax.commands import compare as command
from bbqrec_jax.errors import InputError
from bbqrec_jax.runs.compare import compare, figure, gains, systems_of, to_latex, to_markdown
from bbqrec_jax.runs.workdir import PARTS, SHOWN
from bbqrec_jax.utils.json_files import write_json

RANKS = {"a": [[0, 3, 50, 9], [1, 10, 0, 2]], "b": [[4, 0, 0, 2147483647]]}


def finish(folder, ranks, *, split="s", **fields):
  folder.mkdir(parents=True)
  data = {"name": "shop", "users": 4, "items": 60, "interactions": 30, "split_hash": split}
  part = dict.fromkeys(SHOWN, float(np.mean(np.array(ranks) < 10)))
  seconds = {"recommender": 30.0, "evaluation": 90.0}
  write_json(folder / "results.json", {"model": "m", "data": data, **dict.fromkeys(PARTS, part), "best_step": 2,
                                       "steps": 3, "seconds": seconds})  # fmt: skip
  np.savez(folder / "ranks.npz", test=np.array(ranks, np.int32))
  if fields:
    write_json(folder / "run.json", fields)
  return folder


def test_runs_that_differ_in_the_seed_alone_are_one_system(tmp_path):
  config = {"recommender.head": "dense", "data split_hash": "s"}
  first = finish(tmp_path / "dense_0", RANKS["a"][0], seed=0, **config)
  other = finish(tmp_path / "wide", RANKS["b"][0], seed=0, **config | {"recommender.width": 9})
  second = finish(tmp_path / "dense_1", RANKS["a"][1], seed=1, **config | {"tokenizer.artefact": "x"})
  assert systems_of([first, other, second]) == {"dense": [first, second], "wide": [other]}


def test_without_a_config_folders_of_seeds_tell_systems_apart(tmp_path):
  folders = [finish(tmp_path / name / seed, RANKS["a"][0]) for name in ("one", "two") for seed in "01"]
  assert systems_of(folders) == {"one": folders[:2], "two": folders[2:]}


def test_differences_are_of_the_same_users(tmp_path):
  systems = {name: [finish(tmp_path / name / str(seed), one) for seed, one in enumerate(every)]
             for name, every in RANKS.items()}  # fmt: skip
  gain = {name: np.mean([[1 / np.log2(r + 2) if r < 10 else 0 for r in one] for one in every], axis=0)
          for name, every in RANKS.items()}  # fmt: skip
  np.testing.assert_allclose(gains(systems["a"]), gain["a"])
  data, rows = compare(systems, reference="b")
  paired = gain["a"] - gain["b"]
  assert rows[0].over == pytest.approx(paired.mean())
  assert rows[0].interval == pytest.approx(1.96 * paired.std(ddof=1) / 2)
  assert (rows[1].over, rows[0].seeds, rows[0].minutes) == (None, 2, [2.0, 2.0])
  text = to_markdown(data, rows, reference="b")
  shown = f"{rows[0].over:+.4f} ± {rows[0].interval:.4f}"
  assert not rows[0].clear  # Four users are few.
  assert f"| {shown} n.s. |" in text
  assert text.endswith("(Bonferroni).")
  latex = to_latex(rows, reference="b_1")
  assert shown.replace("±", r"$\pm$") in latex
  assert r"over b\_1" in latex
  assert latex.count(r" \\") == 3
  odd = [row._replace(name="a^b~c" + "\\d{") for row in rows]
  assert r"a\textasciicircum{}b\textasciitilde{}c\textbackslash{}d\{ &" in to_latex(odd, reference="b_1")
  (panel,) = figure(rows, reference="b").axes
  assert [label.get_text() for label in panel.get_yticklabels()] == ["a"]


def test_a_difference_is_clear_where_all_comparisons_hold_together(tmp_path):
  rng = np.random.default_rng(0)
  base = rng.integers(2, 12, 400)
  better = np.where(rng.random(400) < 0.03, 0, base)  # About two standard errors above.
  systems = {"base": [finish(tmp_path / "base", base)]} | {
    f"s{n}": [finish(tmp_path / f"s{n}", better if n == 0 else base + (n % 2))] for n in range(40)
  }
  few = {name: systems[name] for name in ("base", "s0")}
  gain = gains(systems["s0"]) - gains(systems["base"])
  z = gain.mean() / (gain.std(ddof=1) / 20)
  assert 1.97 < z < 3.2, z  # Beyond the bound of one comparison, and not beyond that of forty.
  (row,) = [row for row in compare(few, reference="base")[1] if row.name == "s0"]
  assert row.clear
  (row,) = [row for row in compare(systems, reference="base")[1] if row.name == "s0"]
  assert not row.clear


def test_what_cannot_be_compared_is_said(tmp_path):
  one, other = finish(tmp_path / "one", RANKS["b"][0]), finish(tmp_path / "other", RANKS["b"][0], split="t")
  with pytest.raises(InputError, match="different data sets"):
    compare({"one": [one], "other": [other]}, reference="one")
  with pytest.raises(InputError, match=r"no finished run \(no results\.json\)"):
    systems_of([one, tmp_path])
  with pytest.raises(InputError, match="each workdir once"):
    systems_of([one, tmp_path / "one" / ".." / "one"])
  with pytest.raises(InputError, match="got none"):
    systems_of([])


def test_the_program_prints_and_writes_the_table(tmp_path, monkeypatch, capsys):
  folders = [finish(tmp_path / name, every[0]) for name, every in RANKS.items()]
  options = type("Options", (), {"output": tmp_path / "out", "reference": None})
  monkeypatch.setattr(command, "quiet_flags", lambda: options)
  command.main(["compare", *map(str, folders)])
  shown = capsys.readouterr().out
  assert "NDCG@10 over a" in shown
  assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8") == shown
  assert {path.name for path in (tmp_path / "out").iterdir()} == {f"comparison.{end}" for end in ("md", "tex", "png")}
  options.reference, options.output = "nosuch", None
  with pytest.raises(SystemExit):
    command.main(["compare", *map(str, folders)])
  assert "--reference: expected one of a, b, got 'nosuch'" in capsys.readouterr().err
