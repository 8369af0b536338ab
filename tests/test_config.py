"""The fields of a config: what is refused, in which words, and that the shipped files hold what they say."""

import math
import pathlib

import pytest

from bbqrec_jax.config import RunSettings, default_config, read_config
from bbqrec_jax.errors import InputError
from bbqrec_jax.presets import PRESETS, SYSTEMS, preset, system_config
from bbqrec_jax.utils.settings import describe, flatten, to_config

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def refusal(config):
  with pytest.raises(InputError) as error:
    read_config(config)
  message = str(error.value)
  assert "\n" not in message
  return message


def test_the_default_config_is_valid():
  read_config(default_config())


WRONG_TOKENIZER = {
  "tokenizer.quantizer": "nosuch", "tokenizer.steps": 5, "tokenizer.hidden": (), "tokenizer.history_heads": 3,
  "tokenizer.max_length": 1, "tokenizer.row_length": 3, "tokenizer.num_levels": 1000, "tokenizer.temperature": 0.0,
  "tokenizer.dropout": 2.0, "tokenizer.level_dropout": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TOKENIZER)
def test_a_tokenizer_is_looked_at_where_one_is_trained(name):
  sasrec, learned = system_config("sasrec"), system_config("generative")
  for config in (sasrec, learned):
    config.update_from_flattened_dict({name: WRONG_TOKENIZER[name]})
  assert "tokenizer." in refusal(learned)
  learned.tokenizer.artefact = "elsewhere"
  for config in (sasrec, learned):
    read_config(config)
  read_config(learned, tokenizer_alone=True)
  with pytest.raises(InputError, match=r"tokenizer\."):
    read_config(sasrec, tokenizer_alone=True)


def test_histories_of_one_item_have_nothing_to_compare():
  config = default_config()
  config.recommender.max_length = 1
  assert "recommender.similarity to ()" in refusal(config)
  config.recommender.similarity = ()
  read_config(config)


def test_modalities_have_names():
  config = default_config()
  config.data.modalities = (2024,)
  assert "data.modalities: expected names, as ('text', 'image'), got (2024,)" in refusal(config)


def test_configs_do_not_share_state():
  changed = default_config()
  changed.tokenizer.weights.contrast = 0.7
  changed.recommender.optimizer.learning_rate = 0.5
  fresh = default_config()
  assert fresh.tokenizer.weights.contrast != 0.7
  assert fresh.recommender.optimizer.learning_rate != 0.5
  assert fresh.tokenizer.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_say_how_to_run_them(load_file, path):
  module = load_file(path)
  config = module.get_config()
  config = config.get("run", config)  # A benchmark has a run, and sizes of its own.
  read_config(config)
  assert flatten(config).keys() == flatten(default_config()).keys()
  assert f"--config=configs/{path.name}" in module.__doc__


@pytest.mark.parametrize(
  ("name", "choices"),
  [
    ("directory", SYSTEMS),
    ("scientific", SYSTEMS),
    ("beauty", SYSTEMS),
    ("sasrec", ("item", "features")),
    ("tiger", ("full", "small")),
    ("benchmark", ("small", "paper", "large")),
  ],
)
def test_every_choice_of_a_shipped_config_is_valid_and_no_other(load_file, name, choices):
  module = load_file(f"configs/{name}.py")
  flattened = []
  for choice in choices:
    config = module.get_config(choice)
    read_config(config.get("run", config))
    flattened.append(str(config))
  assert len(set(flattened)) == len(choices)
  with pytest.raises((KeyError, InputError)):
    read_config(module.get_config("nosuch"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_its_own(name):
  config = preset(name)
  read_config(config.get("run", config))
  config.unlock()
  config.seed = 3
  assert "seed" not in preset(name) or preset(name).seed == 0


def test_an_unknown_preset_is_told_which_there_are():
  with pytest.raises(InputError, match=r"quickstart, generative.*got 'nosuch'"):
    preset("nosuch")


def test_directory_offers_two_towers_and_the_baselines(load_file):
  module = load_file("configs/directory.py")
  assert module.get_config() == module.get_config("generative")
  hybrid, sasrec = (module.get_config(name).recommender for name in ("hybrid", "sasrec"))
  assert (hybrid.head, hybrid.dense_tower.width) == ("hybrid", 128)
  assert (sasrec.head, sasrec.item_inputs, sasrec.similarity) == ("dense", ("item",), ())


@pytest.mark.parametrize("name", ["seed", "data.synthetic.seed"])
def test_seeds_have_32_bits(name):
  read_config(with_field(name, 2**32 - 1))
  assert refusal(with_field(name, 2**32)) == f"config field {name} must be at most 4294967295, got 4294967296"


def test_there_are_shipped_configs():
  assert {"quickstart", "directory"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", ["nosuch", "tokenizer.nosuch", "recommender.optimizer.nosuch"])
def test_an_unknown_field_cannot_be_set(name):
  config = default_config()
  with pytest.raises((KeyError, AttributeError)):
    config.update_from_flattened_dict({name: 1})
  *parents, field = name.split(".")
  for parent in parents:
    config = config[parent]
  with pytest.raises((KeyError, AttributeError)):
    setattr(config, field, 1)


@pytest.mark.parametrize("name", ["tokenizer.commitment", "recommender.optimizer.clip_norm", "seed"])
def test_missing_and_unknown_fields_are_refused(name):
  config = default_config()
  *parents, field = name.split(".")
  with config.unlocked():
    holder = config
    for parent in parents:
      holder = holder[parent]
    del holder[field]
  assert refusal(config).startswith(f"config field {name} is missing")
  with config.unlocked():
    holder[field] = default_config()[name]
    holder["misspelt"] = 1
  prefix = "".join(f"{parent}." for parent in parents)
  assert refusal(config).startswith(f"config field {prefix}misspelt is unknown")


def test_a_value_of_another_type_cannot_be_set():
  config = default_config()
  for name, value in (("tokenizer.steps", "many"), ("tokenizer.hidden", 3), ("data.path", 4), ("seed", 0.5)):
    with pytest.raises(TypeError):
      config.update_from_flattened_dict({name: value})


FROM_ZERO = (".warmup_steps", ".network_units", "seed", ".validation_users", ".time_buckets", "shard_rows",
             ".device_features", "recommender.steps", "recommender.evaluate_every", "recommender.batch_rows",
             "recommender.row_length", "candidate_similarity.width")  # fmt: skip
# -1 stands for what follows from the catalogue; tests/recommender/test_model.py has it.
INTEGERS = [
  name
  for name, value in flatten(default_config()).items()
  if isinstance(value, int) and not isinstance(value, bool) and name != "recommender.num_negatives"
]
INTEGERS_FROM_ONE = [name for name in INTEGERS if not name.endswith(FROM_ZERO)]
INTEGERS_FROM_ZERO = [name for name in INTEGERS if name.endswith(FROM_ZERO)]
FLOATS = [name for name, value in flatten(default_config()).items() if isinstance(value, float)]
POSITIVE_FLOATS = [
  "spike_factor", "tokenizer.temperature", "tokenizer.optimizer.clip_norm", "recommender.optimizer.clip_norm",
]  # fmt: skip


def with_field(name, value):
  config = default_config()
  config.update_from_flattened_dict({name: value})
  return config


@pytest.mark.parametrize("name", INTEGERS_FROM_ONE)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(name, value):
  message = refusal(with_field(name, value))
  assert message == f"config field {name} must be at least 1 and finite, got {value}"


@pytest.mark.parametrize("name", INTEGERS_FROM_ZERO)
def test_counts_that_may_be_zero(name):
  read_config(with_field(name, 0))
  assert refusal(with_field(name, -1)) == f"config field {name} must be at least 0 and finite, got -1"


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_negative_and_infinite_numbers_are_refused(name, value):
  assert refusal(with_field(name, value)) == f"config field {name} must be at least 0 and finite, got {value}"


@pytest.mark.parametrize("name", POSITIVE_FLOATS)
def test_divisors_must_not_be_zero(name):
  assert refusal(with_field(name, 0.0)) == f"config field {name} must be greater than 0, got 0.0"


@pytest.mark.parametrize("name", sorted(set(FLOATS) - set(POSITIVE_FLOATS)))
def test_other_numbers_may_be_zero(name):
  read_config(with_field(name, 0.0))


@pytest.mark.parametrize(
  "name", ["tokenizer.dropout", "recommender.dropout", "recommender.item_dropout", "recommender.dense_tower.dropout"]
)
@pytest.mark.parametrize("value", [1.0, 1.5])
def test_dropout_of_everything_is_refused(name, value):
  assert refusal(with_field(name, value)) == f"config field {name} must be less than 1, got {value}"


CHOICES = {
  "partitioner": ("pmap", "single"),
  "tokenizer.codebooks": ("shared", "per_stream"),
  "data.source": ("synthetic", "directory", "recbole"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
  for value in CHOICES[name]:
    read_config(with_field(name, value))
  for value in ("nosuch", "", CHOICES[name][0].upper()):
    message = refusal(with_field(name, value))
    assert message.startswith(f"config field {name} must be one of ")
    assert message.endswith(f", got {value!r}")
    assert all(choice in message for choice in CHOICES[name])


@pytest.mark.parametrize(
  "head", ["generative", "dense", "parallel", "hybrid", "bbqrec_jax.recommender.heads:ParallelHead"]
)
def test_heads(head):
  read_config(with_field("recommender.head", head))


@pytest.mark.parametrize("head", ["nosuch", "", "nosuch:head", "bbqrec_jax.recommender.heads:nosuch", "Dense"])
def test_a_head_that_is_nowhere_is_refused(head):
  message = refusal(with_field("recommender.head", head))
  assert message.startswith("config field recommender.head: expected one of generative, dense, parallel, hybrid, or ")
  assert f"got {head!r}" in message


@pytest.mark.parametrize(
  ("name", "choices"),
  [
    ("recommender.item_inputs", ("fused", "modalities", "features", "item")),
    ("recommender.similarity", ("modalities", "fused")),
  ],
)
def test_subsets(name, choices):
  for value in [(choice,) for choice in choices] + [choices]:
    read_config(with_field(name, value))
  message = refusal(with_field(name, (choices[0], "nosuch")))
  assert message == f"config field {name} may hold each of {', '.join(choices)} once, got {(choices[0], 'nosuch')!r}"
  assert "once" in refusal(with_field(name, (choices[0], choices[0])))


def test_length_buckets_rise():
  for value in ((), (5,), (1, 5, 19)):
    assert read_config(with_field("recommender.length_buckets", value)).recommender.length_buckets == value
  for value in ((0, 5), (5, 5), (10, 5)):
    message = refusal(with_field("recommender.length_buckets", value))
    assert message.startswith("config field recommender.length_buckets must be ascending whole numbers from 1")
    assert message.endswith(f", got {value!r}")
  for value in ((2.5,), ("5",)):
    assert f"expected whole numbers, as 64,32, got {value!r}" in refusal(
      with_field("recommender.length_buckets", value)
    )


def test_empty_subsets():
  read_config(with_field("recommender.similarity", ()))
  assert refusal(with_field("recommender.item_inputs", ())).startswith("config field recommender.item_inputs is empty")


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"recommender.width": 63}, ("recommender.width = 63", "recommender.num_heads = 2")),
    (
      {"recommender.head": "hybrid", "recommender.dense_tower.width": 63},
      ("recommender.dense_tower.width = 63", "recommender.num_heads = 2"),
    ),
    (
      {"recommender.time_buckets": 8, "recommender.rows": "histories"},
      ("recommender.time_buckets = 8", "recommender.rows = 'packed'"),
    ),
    ({"recommender.position_buckets": 1}, ("recommender.position_buckets must be 2 to 255", "got 1")),
    *(
      (
        {"recommender.position_buckets": count, "recommender.backbone": "encoder_decoder"},
        ("recommender.position_buckets", "even number from 4 to 254", f"got {count}"),
      )
      for count in (2, 33, 256)
    ),
    ({"recommender.item_inputs": ("text",), "recommender.item_dropout": 0.2}, ("may hold each of fused, modalities",)),
    (
      {"recommender.head": "hybrid", "recommender.item_inputs": ("fused",)},
      ("recommender.head = 'hybrid'", "put features or item into recommender.item_inputs"),
    ),
    ({"recommender.num_heads": 3}, ("recommender.width = 64", "recommender.num_heads = 3")),
    ({"tokenizer.code_width": 33}, ("tokenizer.code_width = 33", "tokenizer.history_heads = 2")),
    (
      {"recommender.max_length": 33, "recommender.row_length": 32},
      ("recommender.row_length = 32", "recommender.max_length = 33"),
    ),
    ({"tokenizer.row_length": 19}, ("tokenizer.row_length = 19", "tokenizer.max_length = 20")),
    ({"tokenizer.warmup_steps": 2000}, ("tokenizer.warmup_steps = 2000", "tokenizer.steps = 2000")),
    ({"steps_per_call": 8, "log_every": 7}, ("steps_per_call must be at most log_every = 7", "got 8")),
    ({"shard_rows": 1000}, ("shard_rows = 1000", "partitioner = 'mesh'")),
    ({"shard_rows": 63, "partitioner": "mesh"}, ("shard_rows must be 0 or at least 64, got 63",)),
    (
      {"recommender.softmax_over": "all"},
      ("recommender.softmax_over = 'all'", "set recommender.subtree_logits and recommender.seen_item_bias to False"),
    ),
    (
      {"recommender.softmax_over": "all", "recommender.subtree_logits": False},
      ("recommender.softmax_over = 'all'", "set recommender.seen_item_bias to False"),
    ),
    *(
      ({"recommender.item_dropout": 0.1, "recommender.item_inputs": inputs}, ("item_dropout", "something else"))
      for inputs in (("item",), ("fused", "features"))
    ),
    (
      {"tokenizer.own_loss": "my_losses:together", "tokenizer.quantizer": "rq_kmeans"},
      ("tokenizer.own_loss", "tokenizer.quantizer = 'rq_kmeans'"),
    ),
  ],
)
def test_fields_that_do_not_fit_together_are_refused(changes, named):
  config = default_config()
  config.update_from_flattened_dict(changes)
  message = refusal(config)
  assert all(field in message for field in named)


def test_flatten():
  nested = {"a": 1, "b": {"c": [2, 3], "d": {"e": "x"}}, "f": (), "g": []}
  assert flatten(nested) == {"a": 1, "b.c": (2, 3), "b.d.e": "x", "f": (), "g": ()}
  assert flatten({"a": {"b": 1}}, "top.") == {"top.a.b": 1}
  config = default_config()
  flat = flatten(config)
  assert flat["tokenizer.weights.contrast"] == config.tokenizer.weights.contrast
  assert flat == flatten(config.to_dict())
  config.update_from_flattened_dict(flat)
  assert flatten(config) == flat


def test_every_field_has_a_sentence_and_its_default_passes_its_own_rule():
  rows = describe(RunSettings())
  assert sorted(name for name, *_ in rows) == sorted(flatten(default_config()))
  for name, default, _, sentence in rows:
    assert sentence.endswith(".") or sentence.endswith(")"), name
    assert default == repr(flatten(default_config())[name])


def test_settings_come_back_from_their_config():
  config = default_config()
  config.tokenizer.weights.contrast = 3
  config.recommender.similarity = ()
  settings = read_config(config)
  assert (settings.tokenizer.weights.contrast, settings.recommender.similarity) == (3.0, ())
  assert to_config(settings) == config
  assert read_config(default_config()) == RunSettings()
