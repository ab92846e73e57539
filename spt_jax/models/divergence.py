"""KL divergence between two next-token distributions over a whole vocabulary, without all logits at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spt_jax.models.model import Model
from spt_jax.models.vocabulary import by_chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def divergences(
    model: Model, student: Float[Array, "B M D"], teacher: Float[Array, "B M D"], temperature: float
) -> Float[Array, "B M"]:
    """Returns KL(p || q), where p and q are softmax(logits / T) of two hidden states, with a gradient for the student.

    The gradient of each divergence is computed in the forward pass, chunk by chunk, and stored, [B, M, D]. So neither
    pass holds more than one chunk of the [B, M, V] logits, and no logits are computed twice.

    Args:
      model: the model whose logits these are.
      student: normalized hidden states that give q.
      teacher: normalized hidden states that give p, with as many rows.
      temperature: T.

    Returns:
      The divergences, float32, in nats.
    """
    return _by_chunks(functools.partial(_of_chunk, model, temperature), model, student, teacher)


def _by_chunks(function: Any, model: Model, student: Array, teacher: Array) -> Any:
    width = student.shape[-1]

    def of_both(both: Float[Array, "B q E"]) -> Any:
        return function(both[..., :width], both[..., width:])

    return by_chunks(of_both, jnp.concatenate([student, teacher], axis=-1), 2 * model.layout.vocab_size)


def _of_chunk(
    model: Model, temperature: float, student: Float[Array, "B q D"], teacher: Float[Array, "B q D"]
) -> Float[Array, "B q"]:
    log_q, log_p = (jax.nn.log_softmax(model.logits(own) / temperature, axis=-1) for own in (student, teacher))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _forward(
    model: Model, student: Array, teacher: Array, temperature: float
) -> tuple[Float[Array, "B M"], Float[Array, "B M D"]]:
    def values_and_slopes(student: Array, teacher: Array) -> tuple[Array, Array]:
        values, pull = jax.vjp(lambda own: _of_chunk(model, temperature, own, teacher), student)
        # A divergence depends only on its own state, so that one pull gives the gradients of all.
        return values, pull(jnp.full_like(values, _scale(student.dtype)))[0]

    return _by_chunks(values_and_slopes, model, student, teacher)


def _backward(
    temperature: float, slopes: Float[Array, "B M D"], cotangent: Float[Array, "B M"]
) -> tuple[None, Float[Array, "B M D"], None]:
    scaled = cotangent[..., None] / _scale(slopes.dtype) * slopes.astype(jnp.float32)
    return None, scaled.astype(slopes.dtype), None


def _scale(dtype: Any) -> float:
    """Returns the factor of stored gradients: small ones underflow in float16."""
    return 1024.0 if dtype == jnp.float16 else 1.0


divergences.defvjp(_forward, _backward)
