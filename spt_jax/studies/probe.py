"""A linear probe: logistic regression on the frozen base's features, a baseline that a trained prompt should beat."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from spt_jax.bases.base import FrozenBase
from spt_jax.evaluation.evaluate import EvaluationSet, head_logits
from spt_jax.prompts.virtual import Head, VirtualPrompt

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def features(base: FrozenBase, data: EvaluationSet) -> Float[np.ndarray, "N D"]:
    """Returns the normalized hidden state of each example's last token, for a template with a classification head."""
    width = base.layout.head_width
    identity = VirtualPrompt(head=Head(jnp.eye(width), jnp.zeros(width)))
    return np.concatenate(head_logits(base, data, identity)).astype(np.float64)


def fit_probe(
    states: Float[np.ndarray, "N D"], labels: Int[np.ndarray, " N"], classes: int, penalty: float
) -> VirtualPrompt:
    """Minimizes mean cross-entropy + penalty / 2 |kernel|^2 over standardized features, by L-BFGS.

    Returns:
      A soft prompt that consists only of a head, scaled for features that are not standardized.
    """
    from scipy.optimize import minimize

    mean, scale = states.mean(axis=0), np.maximum(states.std(axis=0), 1e-8)
    x = np.concatenate([(states - mean) / scale, np.ones((len(states), 1))], axis=1)
    right = np.eye(classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        kernel = flat.reshape(x.shape[1], classes)
        logits = x @ kernel
        logits -= logits.max(axis=1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        penalised = penalty * np.concatenate([kernel[:-1], np.zeros((1, classes))])
        gradient = x.T @ (np.exp(log_probabilities) - right) / len(x) + penalised
        value = -(right * log_probabilities).sum() / len(x) + (kernel * penalised).sum() / 2
        return float(value), gradient.ravel()

    start = np.zeros(x.shape[1] * classes)
    found: Any = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    kernel = found.x.reshape(x.shape[1], classes)
    weights = kernel[:-1] / scale[:, None]
    bias = kernel[-1] - mean @ weights
    return VirtualPrompt(head=Head(jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32)))
