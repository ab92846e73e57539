"""Explains steps whose metrics are not finite, and suggests a remedy."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp


def explain(step: int, metrics: Mapping[str, float], dtype: Any) -> str | None:
    """Names the metrics that are not finite, the likely cause and the remedy.

    The loss and the gradient of step 1 precede any update, so they do not depend on the learning rate.

    Args:
      step: the step, from 1.
      metrics: the metrics that `train_step` returned.
      dtype: the dtype of the base.

    Returns:
      The explanation, without a final period; None if all metrics are finite.
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
            f"{found} before any update, so the learning rate is not the cause: the base's weights, the initial prompt"
            f" or the weights of the examples produce numbers that are not finite in {name}"
        )
    return f"{found}. A lower optimizer.learning_rate usually helps"
