"""The settings of a run, composed of those of its stages: the default config, and the checks of any config."""

import dataclasses
from typing import Any

import ml_collections

from bbqrec_jax.data.settings import DataSettings
from bbqrec_jax.errors import InputError
from bbqrec_jax.recommender.settings import EvaluationSettings, RecommenderSettings, trains_tokenizer
from bbqrec_jax.tokenizer.parts import check_parts
from bbqrec_jax.tokenizer.settings import TokenizerSettings
from bbqrec_jax.training.settings import Safeguards
from bbqrec_jax.utils.settings import from_config, section, setting, to_config

_FEWEST_ROWS = 64  # Arrays with fewer rows, such as a stack of codebooks, are not spread over devices.

# What may change between two starts of one run: no number depends on it while nothing goes wrong.
CHANGEABLE = {"data.path", "steps_per_call", *(field.name for field in dataclasses.fields(Safeguards))}


@dataclasses.dataclass(frozen=True)
class RunSettings(Safeguards):
  """All settings of a run."""

  seed: int = setting(
    0, "Seed of everything random: initialisation, batch order, dropout, codebook fitting.", least=0, most=2**32 - 1
  )
  partitioner: str = setting("pmap", "pmap or mesh (jit) over all devices of all processes, or a single device.",
                             choices=("pmap", "mesh", "single"))  # fmt: skip
  shard_rows: int = setting(
    0, "Of mesh: arrays of at least so many rows (item embeddings, the catalogue, the trie) are spread over the"
    " devices; 0: each device has all.", least=0,
  )  # fmt: skip
  log_every: int = setting(50, "Steps between two lines of training metrics.")
  steps_per_call: int = setting(
    1, "Training steps that one call of the devices does, where nothing is due between them."
  )
  init_from: str = setting("", "The workdir of a finished run on earlier data, whose semantic IDs and parameters this"
                           " one begins with.")  # fmt: skip
  steps_of: str = setting("", "Of data.split = 'none': the workdir of a validated run of the same recipe, whose best"
                          " step is how long the recommender trains, in place of recommender.steps.")  # fmt: skip
  data: DataSettings = section(DataSettings, "The data.")
  tokenizer: TokenizerSettings = section(TokenizerSettings, "Stage 1.")
  recommender: RecommenderSettings = section(RecommenderSettings, "Stage 2.")
  evaluation: EvaluationSettings = section(EvaluationSettings, "The ranking of held-out items.")

  def check(self, prefix: str) -> None:
    """Refuses fields that do not fit one another.

    Raises:
      InputError: if some do not.
    """
    field = f"config field {prefix}"
    if self.steps_per_call > self.log_every:
      raise InputError(
        f"{field}steps_per_call must be at most {prefix}log_every = {self.log_every}, as a call ends where metrics are"
        f" logged, got {self.steps_per_call}"
      )
    if 0 < self.shard_rows < _FEWEST_ROWS:
      raise InputError(f"{field}shard_rows must be 0 or at least {_FEWEST_ROWS}, got {self.shard_rows}")
    if self.steps_of and self.data.split != "none":
      raise InputError(f"{field}steps_of is of {prefix}data.split = 'none', got {self.data.split!r}")
    if self.shard_rows and self.init_from:
      raise InputError(f"{field}init_from works with {prefix}shard_rows = 0, got {self.shard_rows}")
    if self.init_from and self.tokenizer.artefact:
      raise InputError(f"{field}init_from brings a tokenizer of its own: leave {prefix}tokenizer.artefact empty")
    if self.shard_rows and self.partitioner != "mesh":
      raise InputError(
        f"{field}shard_rows = {self.shard_rows} works with {prefix}partitioner = 'mesh': set it so, or shard_rows to 0"
      )


def default_config() -> ml_collections.ConfigDict:
  """The base that every preset builds on; locked, so that a misspelt field is an error."""
  return to_config(RunSettings())


def read_config(config: Any, *, tokenizer_alone: bool = False) -> RunSettings:
  """The settings of a config, checked.

  Args:
    config: of the run. Fields of a tokenizer that it trains none of may hold anything of their type.
    tokenizer_alone: whether a tokenizer is to be trained whatever the recommender reads.

  Raises:
    InputError: for an unknown or missing field, a value of another type or out of its range or choices, or fields that
      do not fit one another.
  """
  own = trains_tokenizer(config, alone=tokenizer_alone)
  settings = from_config(RunSettings, config, unchecked=None if own else "tokenizer.")
  if own:
    check_parts(settings.tokenizer, field="config field tokenizer.")
  return settings
