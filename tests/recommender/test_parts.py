"""Heads and backbones by name: this project's, those of the documentation, and what is none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bbqrec_jax.config import default_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.causal import Causal
from bbqrec_jax.recommender.items import build_catalogue
from bbqrec_jax.recommender.model import Recommender
from bbqrec_jax.recommender.parts import Backbone, Head, Memory, check_parts
from bbqrec_jax.recommender.settings import RecommenderSettings, needs_semantic_ids
from bbqrec_jax.recommender.two_towers import make_recommender

SHAPES = {"num_items": 30, "num_levels": 3, "num_codes": 4, "num_columns": 3, "width": 8, "num_layers": 1}


def settings_of(**fields):
  return RecommenderSettings(**(SHAPES | fields))


class Nearest(Head):
  """A head that reads no codes."""

  def scores(self, items, states):
    return states @ items.vectors().T

  def losses(self, items, states, targets, *, deterministic):
    return {"nll": -jnp.take_along_axis(jax.nn.log_softmax(self.scores(items, states)), targets[:, None], 1)[:, 0]}


class Sums(Backbone):
  """One that takes a row for one history."""

  def __call__(self, x, segments, positions, bias=None, times=None, *, deterministic=True):
    return jnp.cumsum(x * (segments > 0)[..., None], axis=1)


class SumsOfOne(Sums):
  """The same, and says so."""

  rows = "history"


class Last(Backbone):
  """One that gives what it has at the end."""

  def __call__(self, x, segments, positions, bias=None, times=None, *, deterministic=True):
    return jnp.sum(x * (segments > 0)[..., None], axis=1)


class Own(Causal):
  """As good as this project's."""


class Flat(Backbone):
  """One whose states have another shape."""

  def __call__(self, x, segments, positions, bias=None, times=None, *, deterministic=True):
    return x[..., 0]


class Tokens(Backbone):
  """An encoder without layers."""

  rows = "history"
  reads_codes = True
  makes_memory = True

  def __call__(self, x, segments, positions, bias=None, times=None, *, deterministic=True):
    batch, length, levels, width = x.shape
    return Memory(x.reshape(batch, length * levels, width), jnp.repeat(segments > 0, levels, axis=1))


def here(name):
  return f"{__name__}:{name}"


@pytest.mark.parametrize("backbone", ["causal", "encoder_decoder", here("Own"), here("SumsOfOne"), here("Tokens")])
@pytest.mark.parametrize("head", ["generative", "dense", "parallel", here("Nearest")])
def test_parts_that_can_be_made(head, backbone):
  check_parts(settings_of(head=head, backbone=backbone))


def test_the_documented_head_and_backbone_can_be_made(tmp_path, monkeypatch, snippet):
  for name in ("my_heads.py", "my_backbones.py"):
    (tmp_path / name).write_text(snippet("parts.md", name), encoding="utf-8")
  monkeypatch.syspath_prepend(tmp_path)
  check_parts(settings_of(head="my_heads:NearestHead", backbone="my_backbones:MeanBackbone"))


@pytest.mark.parametrize("part", ["head", "backbone"])
@pytest.mark.parametrize("name", ["json:loads", "builtins:int", "bbqrec_jax.recommender.model:Recommender"])
def test_what_is_no_part_of_a_model_is_named_in_one_line(part, name):
  with pytest.raises(InputError) as error:
    make_recommender(settings_of(**{part: name}))
  expected = f"expected a subclass of bbqrec_jax.recommender.parts.{part.capitalize()}, got <"
  assert str(error.value).startswith(f"config field recommender.{part} = {name!r}: {expected}")


@pytest.mark.parametrize(
  ("name", "said"), [("Sums", "the other user of the row"), ("Flat", "expected states [B, T, 8]")]
)
def test_a_backbone_that_breaks_its_contract_is_refused_by_name(name, said):
  with pytest.raises(InputError) as error:
    make_recommender(settings_of(backbone=here(name), head="dense", rows="packed"))
  assert str(error.value).startswith(f"config field recommender.backbone = {here(name)!r}: ")
  assert said in str(error.value)


class Broken(Nearest):
  """One whose loss cannot be computed."""

  def losses(self, items, states, targets, *, deterministic):
    return {"nll": states @ states}


class Mean(Nearest):
  """One that gives the mean of its losses."""

  def losses(self, items, states, targets, *, deterministic):
    return {"nll": jnp.mean(super().losses(items, states, targets, deterministic=deterministic)["nll"])}


class OfTen(Nearest):
  """One that scores some items alone."""

  def scores(self, items, states):
    return (states @ items.vectors().T)[:, :10]

  def losses(self, items, states, targets, *, deterministic):
    return {"nll": jnp.sum(states, axis=1)}


class Lost(Nearest):
  """One that searches, and gives what it found as it likes."""

  exact = False

  def search(self, items, states, *, width, exclude=None):
    return jnp.zeros((states.shape[0], width), jnp.int32)


class Unscored(Head):
  """One that has a loss alone."""

  def losses(self, items, states, targets, *, deterministic):
    return {"nll": jnp.sum(states, axis=1)}


class PackedTokens(Tokens):
  """A memory of rows of several histories."""

  rows = "packed"


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("Broken", "TypeError: dot_general"), ("Mean", "losses: expected a dict of float arrays"),
    ("OfTen", "scores: expected an array [B, N], a score of every item, got [3, 10]"),
    ("Lost", "search: expected a BeamResult of [B, width] items, got [3, 2]"),
    ("Unscored", "expected losses, and scores"),
  ],
)  # fmt: skip
def test_a_head_that_breaks_its_contract_is_refused_by_name(name, said):
  with pytest.raises(InputError) as error:
    make_recommender(settings_of(head=here(name)))
  assert str(error.value).startswith(f"config field recommender.head = {here(name)!r}: {said}")


def test_a_memory_is_of_one_history():
  with pytest.raises(InputError, match=r"recommender\.backbone = .*PackedTokens': a memory is of one history"):
    make_recommender(settings_of(backbone=here("PackedTokens"), head="generative"))


def test_a_backbone_of_whole_rows_may_give_the_last_states_alone():
  check_parts(settings_of(backbone=here("Sums"), head="dense", rows="histories"))
  check_parts(settings_of(backbone=here("Last"), head="dense", rows="histories"))
  with pytest.raises(InputError, match=r"expected states \[B, T, 8\] or \[B, 8\]"):
    check_parts(settings_of(backbone=here("Flat"), head="dense", rows="histories"))


def test_a_head_that_reads_a_memory_needs_a_backbone_that_makes_one():
  name = "bbqrec_jax.recommender.encoder_decoder:DecoderHead"
  with pytest.raises(InputError, match=r"reads a memory, which recommender\.backbone = 'causal' does not make"):
    make_recommender(settings_of(head=name))
  check_parts(settings_of(head=name, backbone="encoder_decoder"))


@pytest.mark.parametrize(
  ("head", "backbone", "needed"),
  [
    ("dense", "causal", False), (here("Nearest"), "causal", False), (here("Nearest"), here("SumsOfOne"), False),
    ("generative", "causal", True), ("parallel", "causal", True), ("hybrid", "causal", True),
    ("dense", "encoder_decoder", True), (here("Nearest"), here("Tokens"), True),
  ],
)  # fmt: skip
def test_semantic_ids_are_needed_where_a_part_reads_codes(head, backbone, needed):
  config = default_config()
  config.recommender.update({"head": head, "backbone": backbone, "item_inputs": ("item",), "similarity": ()})
  assert needs_semantic_ids(config) == needed
  if not needed:
    catalogue, settings = build_catalogue(config, None, None, num_items=30)
    assert catalogue.trie is None
    assert (settings.num_levels, settings.num_codes, settings.num_columns) == (0, 0, 0)


def test_a_backbone_of_one_history_a_row_learns_from_the_whole():
  settings = settings_of(head=here("Nearest"), backbone=here("SumsOfOne"), item_inputs=("item",), num_columns=0)
  config = default_config()
  config.recommender.update({"head": settings.head, "backbone": settings.backbone, "item_inputs": ("item",)})
  config.recommender.similarity = ()
  catalogue, _ = build_catalogue(config, None, None, num_items=30)
  items = np.array([[3, 1, 4], [1, 5, 0]])
  batch = {"items": items, "segments": np.array([[1, 1, 1], [1, 1, 0]]), "positions": np.tile(np.arange(3), (2, 1)),
           "targets": np.array([9, 2])}  # fmt: skip
  vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
  loss, _ = Recommender(settings).apply(
    {"params": {"item_embedding": vectors}}, catalogue, batch, method="loss", deterministic=True
  )
  states = np.stack([vectors[[3, 1, 4]].sum(0), vectors[[1, 5]].sum(0)])
  scores = states.astype(np.float64) @ vectors.T
  expected = np.log(np.exp(scores).sum(axis=1)) - scores[[0, 1], [9, 2]]
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
