"""The settings that both stages share."""

import dataclasses
from typing import Any

from bbqrec_jax.utils.settings import setting


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW behind a clip of the gradient's global norm."""

  learning_rate: float = setting(1e-3, "Learning rate of AdamW after the warm-up; decays to a hundredth, as a cosine.")
  warmup_steps: int = setting(100, "Steps in which the learning rate rises linearly.", least=0)
  b2: float = setting(0.999, "Decay of AdamW's mean of squared gradients.", below=1)
  weight_decay: float = setting(
    1e-2, "Weight decay of the layers' weight matrices alone, not of the recommender's feature map."
  )
  clip_norm: float = setting(1.0, "Global norm at which gradients are clipped, of both towers together.", above=0)


@dataclasses.dataclass(frozen=True)
class Safeguards:
  """How a run is kept from losing what it has; none of this changes a number of a run in which nothing goes wrong."""

  keep_checkpoints: int = setting(2, "Newest checkpoints kept of each stage, beside the best.")
  on_nonfinite: str = setting("stop", "At a step whose loss or gradient is not finite: stop, or leave it out.",
                              choices=("stop", "skip"))  # fmt: skip
  max_skipped: int = setting(10, "Steps skipped in a row after which training stops all the same.")
  spike_factor: float = setting(3.0, "Losses of more than so many times their running median are logged.", above=0)

  @classmethod
  def of(cls, config: Any) -> "Safeguards":
    """Those of a run's config."""
    return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})
