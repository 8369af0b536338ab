"""Heads and backbones by name: this project's, those of the documentation, and what is none."""

import pytest

from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.catalogue import RecommenderSettings
from bbqrec_jax.recommender.model import check_parts
from bbqrec_jax.recommender.two_towers import make_recommender

ITEMS = 30


@pytest.mark.parametrize("backbone", ["causal", "encoder_decoder"])
@pytest.mark.parametrize("head", ["generative", "dense", "parallel", "hybrid"])
def test_every_head_and_backbone_of_this_project_can_be_made(head, backbone):
  check_parts(RecommenderSettings(ITEMS, head=head, backbone=backbone))


def test_the_documented_head_and_backbone_can_be_made(tmp_path, monkeypatch, snippet):
  for name in ("my_heads.py", "my_backbones.py"):
    (tmp_path / name).write_text(snippet("parts.md", name), encoding="utf-8")
  monkeypatch.syspath_prepend(tmp_path)
  check_parts(RecommenderSettings(ITEMS, head="my_heads:nearest", backbone="my_backbones:mean"))


@pytest.mark.parametrize("part", ["head", "backbone"])
@pytest.mark.parametrize(
  ("name", "came"),
  [
    ("json:loads", "TypeError: the JSON object must be str"),
    ("builtins:id", "a int without "),
    ("bbqrec_jax.recommender.heads:ParallelHead", "TypeError: "),
  ],
)
def test_a_function_that_makes_no_part_of_a_model_is_named_in_one_line(part, name, came):
  with pytest.raises(InputError) as error:
    make_recommender(RecommenderSettings(ITEMS, **{part: name}))
  expected = f"expected a function that makes a {part} of the settings (see bbqrec_jax/models/{part}s.py), got {came}"
  assert str(error.value).startswith(f"config field recommender.{part} = {name!r}: {expected}")
