"""Recurrent layers with random parameters, each with a loop over tokens in float64 that defines it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.models.attention import Stream
from spt_jax.models.delta_net import GatedDeltaNet
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.mamba import Mamba2
from spt_jax.models.mamba_config import MambaConfig
from spt_jax.models.memory import State
from spt_jax.models.recurrence import token_order
from tests.recurrent_rows import WIDTH, sigmoid, state_of, whole_rows

Config = DeltaNetConfig | MambaConfig
DELTA_NET = DeltaNetConfig(key_heads=2, value_heads=4, key_size=6, value_size=5)
MAMBA = MambaConfig(
    heads=4, groups=2, head_size=5, state_size=6, input_bias=True, output_bias=True, norm_epsilon=1e-2,
    input_scale=0.8, part_scales=(0.9, 1.1, 1.2, 0.7, 1.3), output_scale=0.6,
)  # fmt: skip
CONFIGS: dict[str, Config] = {"delta_net": DELTA_NET, "mamba": MAMBA}
PARTS = ("value", "key", "query")


def layer(config: Config, chunk: int = 256) -> GatedDeltaNet | Mamba2:
    kind = GatedDeltaNet if isinstance(config, DeltaNetConfig) else Mamba2
    return kind(config, chunk=chunk)


def random_params(config: Config, seed: int = 0) -> dict:
    """Every leaf is random; of the decays, some heads forget within a few tokens and others after hundreds."""
    order, x = token_order(whole_rows(1, 1), config.convolution_width - 1), jnp.zeros((1, 1, WIDTH))
    shapes = jax.eval_shape(layer(config).init, jax.random.key(0), x, order, state_of(config))
    generator = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.4 * generator.standard_normal(leaf.shape), shapes["params"])
    if "norm" in params:
        params["norm"]["scale"] += 1
    params["a_log"] = np.linspace(-4, 1.5, *params["a_log"].shape)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def token_by_token(config: Config, params: dict, x: np.ndarray, state: State) -> tuple[np.ndarray, State]:
    """The layer for one example [T, D] after a state, in float64."""
    by_token = delta_net_by_token if isinstance(config, DeltaNetConfig) else mamba_by_token
    return by_token(config, params, x, state)


def delta_net_by_token(config: DeltaNetConfig, params: dict, x: np.ndarray, state: State) -> tuple[np.ndarray, State]:
    """Gated DeltaNet for one example [T, D] after a state, in float64, as the recurrence defines it."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    inputs, memory = (np.asarray(state.arrays[name], np.float64) for name in ("convolution", "recurrent"))
    kernel = np.concatenate([weights[f"{name}_convolution"] for name in ("query", "key", "value")], 1)
    outputs = []
    for token in np.asarray(x, np.float64):
        own = np.concatenate([token @ weights[name]["kernel"] for name in ("query", "key", "value")])
        inputs = np.concatenate([inputs, own[None]])[-config.convolution_width :]
        mixed = (inputs * kernel).sum(0)
        mixed = mixed * sigmoid(mixed)
        queries, keys = mixed[: 2 * config.key_width].reshape(2, config.key_heads, config.key_size)
        values = mixed[2 * config.key_width :].reshape(config.value_heads, config.value_size)
        queries, keys = (a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6) for a in (queries, keys))
        steps = np.log1p(np.exp(token @ weights["decay"]["kernel"] + weights["dt_bias"]))
        decays = np.exp(-np.exp(weights["a_log"]) * steps)
        betas = sigmoid(token @ weights["beta"]["kernel"])
        gates = (token @ weights["gate"]["kernel"]).reshape(values.shape)
        read, memory = np.zeros_like(values), memory.copy()
        for n in range(config.value_heads):
            key, query = (a[n // (config.value_heads // config.key_heads)] for a in (keys, queries))
            memory[n] *= decays[n]
            memory[n] += np.outer(key, betas[n] * (values[n] - memory[n].T @ key))
            read[n] = memory[n].T @ query / np.sqrt(config.key_size)
        read /= np.sqrt((read**2).mean(-1, keepdims=True) + config.norm_epsilon)
        read *= weights["norm"]["scale"] * gates * sigmoid(gates)
        outputs.append(read.ravel() @ weights["output"]["kernel"])
    return np.stack(outputs), State({"convolution": inputs[1 - config.convolution_width :], "recurrent": memory})


def mamba_by_token(config: MambaConfig, params: dict, x: np.ndarray, state: State) -> tuple[np.ndarray, State]:
    """Mamba-2 for one example [T, D] after a state, in float64, as the recurrence defines it."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    inputs, memory = (np.asarray(state.arrays[name], np.float64) for name in ("convolution", "recurrent"))
    kernel = np.concatenate([weights[f"{name}_convolution"] for name in PARTS], 1)
    scales: dict[str, float] = dict(zip(("gate", "value", "key", "query", "step"), config.part_scales, strict=True))
    ends, outputs = np.cumsum([config.value_width, config.key_width]), []

    def part(name: str, token: np.ndarray) -> np.ndarray:
        y = config.input_scale * token @ weights[name]["kernel"]
        return scales[name] * (y + weights[name]["bias"] if config.input_bias else y)

    for token in np.asarray(x, np.float64):
        inputs = np.concatenate([inputs, np.concatenate([part(name, token) for name in PARTS])[None]])
        inputs = inputs[-config.convolution_width :]
        mixed = (inputs * kernel).sum(0)
        if config.convolution_bias:
            mixed += np.concatenate([weights[f"{name}_convolution_bias"] for name in PARTS])
        values, keys, queries = np.split(mixed * sigmoid(mixed), ends)
        values = values.reshape(config.heads, config.head_size)
        keys, queries = (a.reshape(config.groups, config.state_size) for a in (keys, queries))
        steps = np.log1p(np.exp(part("step", token) + weights["dt_bias"]))
        read, memory = np.zeros_like(values), memory.copy()
        for n in range(config.heads):
            group = n // (config.heads // config.groups)
            memory[n] *= np.exp(-np.exp(weights["a_log"][n]) * steps[n])
            memory[n] += np.outer(steps[n] * values[n], keys[group])
            read[n] = memory[n] @ queries[group] + weights["skip"][n] * values[n]
        y, gate = (a.reshape(config.groups, -1) for a in (read, part("gate", token)))
        factor = gate * sigmoid(gate)
        y = y if config.norm == "gate_last" else y * factor
        if config.norm != "none":
            y = y / np.sqrt((y**2).mean(1, keepdims=True) + config.norm_epsilon)
            y = y * weights["norm"]["scale"].reshape(y.shape)
        y = y * factor if config.norm == "gate_last" else y
        y = y.ravel() @ weights["output"]["kernel"]
        outputs.append(config.output_scale * (y + weights["output"]["bias"] if config.output_bias else y))
    return np.stack(outputs), State({"convolution": inputs[1 - config.convolution_width :], "recurrent": memory})


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def run(config: Config, params: dict, x, stream: Stream, state: State, chunk: int = 256):
    order = token_order(stream, config.convolution_width - 1)
    return layer(config, chunk).apply({"params": params}, jnp.asarray(x), order, state)
