"""The settings that both stages share."""

import dataclasses

from bbqrec_jax.utils.settings import setting


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW behind a clip of the gradient's global norm."""

  learning_rate: float = setting(1e-3, "Of AdamW, after the warm-up.")
  schedule: str = setting("cosine", "After the warm-up: a cosine to a hundredth, or constant.",
                          choices=("constant", "cosine"))  # fmt: skip
  warmup_steps: int = setting(100, "Steps in which the learning rate rises linearly.", least=0)
  b2: float = setting(0.999, "Of AdamW, how long squared gradients are remembered.", below=1)
  weight_decay: float = setting(1e-2, "Of the layers' weight matrices alone, not of the recommender's feature map.")
  clip_norm: float = setting(1.0, "Global norm at which gradients are clipped, of both towers together.", above=0)
