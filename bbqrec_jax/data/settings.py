"""The settings of the data."""

import dataclasses

from bbqrec_jax.errors import InputError
from bbqrec_jax.utils.settings import section, setting

SOURCES = ("synthetic", "directory", "recbole", "memory")


@dataclasses.dataclass(frozen=True)
class SyntheticSettings:
  """Data with planted structure; see `data.synthetic`."""

  num_users: int = setting(2000, "Users.", most=10**7)
  num_items: int = setting(600, "Items.", most=10**7)
  seed: int = setting(0, "Of the generated data alone; the run's own seed does not change the data.", least=0,
                      most=2**32 - 1)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """What a run is trained on."""

  source: str = setting(
    "directory", "directory (the project's own format), recbole (its atomic files), synthetic (planted structure),"
    " memory (what a program of yours gives), or tfds:NAME (of TensorFlow Datasets).",
  )  # fmt: skip
  path: str = setting("", "The folder of directory and recbole; of tfds that of its data, if not the usual one.")
  modalities: tuple[str, ...] = setting((), "Names of the modalities to use, in order; empty for all that are found.")
  drop_short_users: bool = setting(False, "Drop users with fewer than 3 interactions instead of refusing them.")
  drop_incomplete_items: bool = setting(False, "Drop items that lack one of the modalities, and their interactions.")
  synthetic: SyntheticSettings = section(SyntheticSettings, "Of the synthetic source.")

  def check(self, prefix: str) -> None:
    """Refuses a source that there is none of, and modalities without a name.

    Raises:
      InputError: if there is one.
    """
    if self.source not in SOURCES and not self.source.removeprefix("tfds:") != self.source:
      raise InputError(
        f"config field {prefix}source must be one of {', '.join(SOURCES)} or tfds:NAME, got {self.source!r}"
      )
    if not all(self.modalities):
      raise InputError(f"config field {prefix}modalities must be names, got {self.modalities!r}")
