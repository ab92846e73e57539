"""What to say of a step whose numbers are not finite, and what helps."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp


def explain(step: int, metrics: Mapping[str, float], dtype: Any) -> str | None:
    """Names the metrics that are not finite, the likely cause and the remedy.

    The loss and the gradient of step 1 come before any update, so the learning rate has no part in them.

    Args:
      step: of the run, from 1.
      metrics: of the step, as `train_step` returns them.
      dtype: the base's.

    Returns:
      Sentences without a final stop; None if all are finite.
    """
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if not broken:
        return None
    found = ", ".join(f"{name} is {value}" for name, value in broken.items())
    untrained = step == 1 and bool({"loss", "gradient_norm"} & set(broken))
    name = jnp.dtype(dtype).name
    if name == "float16" and untrained:
        return f"{found}. float16 overflowed in the base: use base.dtype bfloat16 or float32"
    if name == "float16":
        return (
            f"{found}. Either float16 overflowed in the base, and base.dtype bfloat16 or float32 helps, or"
            " optimizer.learning_rate is too high"
        )
    if untrained:
        return (
            f"{found} before any update, so the learning rate is not the cause: the base's weights, the start of the"
            f" prompt or the weights of the examples give numbers that are not finite in {name}"
        )
    return f"{found}. A lower optimizer.learning_rate usually helps"
