"""Small networks that some methods reparameterize a prompt with: linear layers and LSTM. Pure functions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Linear = Mapping[str, Any]


def init_linear(key: Key[Array, ""], inputs: int, outputs: int) -> dict[str, Float[Array, "..."]]:
    """Returns a LeCun-normal kernel [inputs, outputs] and a zero bias [outputs]."""
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(layer: Linear, x: Float[Array, "P I"]) -> Float[Array, "P O"]:
    """Returns x @ kernel + bias."""
    return x @ layer["kernel"] + layer["bias"][None]


def init_lstm(key: Key[Array, ""], inputs: int, hidden: int) -> dict[str, Float[Array, "..."]]:
    """Returns one direction of one layer: kernels [inputs, 4 * hidden] and [hidden, 4 * hidden], bias [4 * hidden]."""
    input_key, recurrent_key = jax.random.split(key)
    return {
        "input": jax.nn.initializers.lecun_normal()(input_key, (inputs, 4 * hidden)),
        "recurrent": jax.nn.initializers.orthogonal()(recurrent_key, (hidden, 4 * hidden)),
        "bias": jnp.zeros(4 * hidden),
    }


def lstm(layer: Mapping[str, Any], x: Float[Array, "P I"], *, reverse: bool = False) -> Float[Array, "P H"]:
    """Returns the hidden states of an LSTM (Hochreiter & Schmidhuber 1997). Gate order: input, forget, cell, output."""
    hidden = layer["recurrent"].shape[0]
    zeros = jnp.zeros(hidden)

    def step(state: tuple[Array, Array], projected: Array) -> tuple[tuple[Array, Array], Array]:
        previous, cell = state
        gates = projected + previous @ layer["recurrent"]
        input_gate, forget_gate, candidate, output_gate = jnp.split(gates, 4)
        cell = jax.nn.sigmoid(forget_gate) * cell + jax.nn.sigmoid(input_gate) * jnp.tanh(candidate)
        output = jax.nn.sigmoid(output_gate) * jnp.tanh(cell)
        return (output, cell), output

    inputs = x @ layer["input"] + layer["bias"][None]
    return jax.lax.scan(step, (zeros, zeros), inputs, reverse=reverse)[1]
