"""The small networks that some methods train a prompt through: linear layers, layer norm, LSTM. Pure functions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Linear = Mapping[str, Any]


def init_linear(key: Key[Array, ""], inputs: int, outputs: int) -> dict[str, Float[Array, "..."]]:
    """A kernel [inputs, outputs] of LeCun-normal entries and a bias of zeros."""
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(layer: Linear, x: Float[Array, "P I"]) -> Float[Array, "P O"]:
    """x @ kernel + bias."""
    return x @ layer["kernel"] + layer["bias"][None]


def init_lstm(key: Key[Array, ""], inputs: int, hidden: int) -> dict[str, Float[Array, "..."]]:
    """One direction of one layer: kernels [inputs, 4 * hidden] and [hidden, 4 * hidden], a bias [4 * hidden]."""
    input_key, recurrent_key = jax.random.split(key)
    return {
        "input": jax.nn.initializers.lecun_normal()(input_key, (inputs, 4 * hidden)),
        "recurrent": jax.nn.initializers.orthogonal()(recurrent_key, (hidden, 4 * hidden)),
        "bias": jnp.zeros(4 * hidden),
    }


def lstm(layer: Mapping[str, Any], x: Float[Array, "P I"], *, reverse: bool = False) -> Float[Array, "P H"]:
    """Hidden states along P of an LSTM (Hochreiter & Schmidhuber 1997), gates ordered input, forget, cell, output."""
    hidden = layer["recurrent"].shape[0]
    zeros = jnp.zeros(hidden)

    def advance(state: tuple[Array, Array], at_input: Array) -> tuple[tuple[Array, Array], Array]:
        before, cell = state
        gates = at_input + before @ layer["recurrent"]
        enter, forget, candidate, leave = jnp.split(gates, 4)
        cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
        after = jax.nn.sigmoid(leave) * jnp.tanh(cell)
        return (after, cell), after

    inputs = x @ layer["input"] + layer["bias"][None]
    return jax.lax.scan(advance, (zeros, zeros), inputs, reverse=reverse)[1]
