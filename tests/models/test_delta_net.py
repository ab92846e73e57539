"""Gated DeltaNet in every layout of a row, against a loop over tokens in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.errors import ConfigError
from spt_jax.models.attention import Stream
from spt_jax.models.delta_net import GatedDeltaNet
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.layout import StateGroup
from spt_jax.models.memory import State
from spt_jax.models.recurrence import token_order
from spt_jax.runtime.sharding import MeshConfig, make_mesh, parameter_sharding
from tests.layouts import lay_out
from tests.recurrent_rows import (
    LAYOUTS,
    LENGTH,
    ROOTS,
    ROWS,
    WIDTH,
    hidden,
    of_row,
    rows_of,
    same,
    same_state,
    sigmoid,
    state_of,
    whole_rows,
)

CONFIG = DeltaNetConfig(key_heads=2, value_heads=4, key_size=6, value_size=5)


def random_params(config: DeltaNetConfig, seed: int = 0) -> dict:
    """Every leaf is random; of the decays, some heads forget within a few tokens and others after hundreds."""
    order = token_order(Stream(*(jnp.zeros((1, 1), jnp.int32) for _ in range(3))), config.convolution_width - 1)
    shapes = jax.eval_shape(
        GatedDeltaNet(config).init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)), order, state_of(config)
    )
    generator = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.4 * generator.standard_normal(leaf.shape), shapes["params"])
    params["norm"]["scale"] += 1
    params["a_log"] = np.linspace(-4, 1.5, config.value_heads)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def token_by_token(config: DeltaNetConfig, params: dict, x: np.ndarray, state: State) -> tuple[np.ndarray, State]:
    """The layer for one example [T, D] after a state, in float64, as the recurrence defines it."""
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


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def run(params: dict, x, stream: Stream, state: State, config: DeltaNetConfig = CONFIG, chunk: int = 256):
    order = token_order(stream, config.convolution_width - 1)
    return GatedDeltaNet(config, chunk=chunk).apply({"params": params}, jnp.asarray(x), order, state)


@pytest.fixture(scope="module")
def laid_out():
    return rows_of(LAYOUTS)


def test_the_order_of_tokens():
    """Two examples, a child of each, and padding, with two remembered tokens, whose indices are 0 and 1."""
    positions = [[5, 0, 5, 6, 7, 8, 9, 8, 0]]
    segments, parents = [[1, 0, 2, 2, 2, 3, 3, 4, 0]], [[0, 0, 0, 0, 0, 2, 2, 2, 0]]
    order = token_order(Stream(*(jnp.asarray(a) for a in (positions, segments, parents))), remembered=2)
    before = {0: [0], 2: [2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 3, 4, 5], 6: [2, 3, 4, 5, 6], 7: [2, 3, 4, 7]}
    mask = np.asarray([[[key in before.get(token, []) for key in range(9)] for token in range(9)]])
    np.testing.assert_array_equal(order.mask, mask)
    right_before = [1, 1, 1, 4, 5, 6, 7, 6, 1]
    np.testing.assert_array_equal(order.windows[0, :, 1:], np.stack([right_before, 2 + np.arange(9)], 1))
    np.testing.assert_array_equal(order.windows[0, :, 0], [0, 0, 0, 1, 4, 5, 6, 5, 0])
    np.testing.assert_array_equal(order.roots, [[1, 0, 1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(order.tail, [[5, 6]])
    np.testing.assert_array_equal(order.until_last, mask[:, 4])


@pytest.mark.parametrize("chunk", [256, 7], ids=["one chunk", "several chunks"])
@pytest.mark.parametrize("per_row", [True, False], ids=["own state", "shared state"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, per_row, chunk, laid_out):
    """Every run is what it is alone, after its parent's tokens and the initial state; padding changes nothing."""
    x, stream, example = laid_out
    params = random_params(CONFIG)
    state = state_of(CONFIG, *[ROWS] * per_row, seed=3)
    y, after = run(params, x, stream, state, chunk=chunk)
    assert np.isfinite(y).all()
    for part in LAYOUTS[layout]:
        initial = of_row(state, part.row) if per_row else state
        expected, end = token_by_token(CONFIG, params, example[part.example], initial)
        same(y[part.slice], expected[len(part.context) :])
        if part is ROOTS[layout]:
            same_state(after, end, part.row)


@pytest.mark.parametrize("per_row", [True, False], ids=["own state", "shared state"])
def test_a_row_of_padding_keeps_its_state(per_row, laid_out):
    x, stream, _ = laid_out
    state = state_of(CONFIG, *[ROWS] * per_row, seed=3)
    _, after = run(random_params(CONFIG), x, stream, state)
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(after.arrays[name][-1], array[-1] if per_row else array)


def test_padding_between_the_tokens_of_an_example():
    """Some templates leave gaps: they are no tokens, and positions continue after them."""
    params, state, x = random_params(CONFIG), state_of(CONFIG, 1, seed=3), hidden(1, 12)
    real = np.asarray([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]])
    stream = Stream(*(jnp.asarray(a, jnp.int32) for a in (real * (real.cumsum(1) + 4), real, 0 * real)))
    y, after = run(params, x, stream, state)
    expected, end = token_by_token(CONFIG, params, x[0, real[0] > 0], of_row(state, 0))
    same(y[0, real[0] > 0], expected)
    same_state(after, end, 0)


@pytest.mark.parametrize("parts", [(11, 1, 1, 7), (1, 2, 17), (1,) * 20], ids=str)
def test_a_row_in_parts(parts):
    """Each part continues from the state of the one before it, some of them shorter than the convolution."""
    params, state, x = random_params(CONFIG), state_of(CONFIG, seed=3), hidden(1, 20)
    expected, end = token_by_token(CONFIG, params, x[0], state)
    start, found = 0, []
    for length in parts:
        y, state = run(params, x[:, start : start + length], whole_rows(1, length, start), state)
        found.append(y[0])
        start += length
    same(np.concatenate(found), expected)
    same_state(state, end, 0)


def test_decoding_steps_of_finished_rows():
    """A step in which some rows have no token changes only the others."""
    params, state, x = random_params(CONFIG), state_of(CONFIG, 3, seed=3), hidden(3, 1)
    segments = jnp.asarray([[1], [0], [1]])
    y, after = run(params, x, Stream(jnp.full((3, 1), 9), segments, jnp.zeros_like(segments)), state)
    for row in (0, 2):
        expected, end = token_by_token(CONFIG, params, x[row], of_row(state, row))
        same(y[row], expected)
        same_state(after, end, row)
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(after.arrays[name][1], array[1])


@pytest.mark.parametrize("chunk", [256, 7], ids=["one chunk", "several chunks"])
def test_gradients_are_finite_differences(chunk, laid_out):
    """Of every output and of the states, in all layouts at once, with a state that the rows share."""
    _, stream, example = laid_out
    ids, _ = lay_out([part for parts in LAYOUTS.values() for part in parts], LENGTH, ROWS)
    params, state = random_params(CONFIG), state_of(CONFIG, seed=3)
    generator = np.random.default_rng(7)
    cotangents = [(p, generator.standard_normal((len(p.ids), WIDTH))) for parts in LAYOUTS.values() for p in parts]
    on_state = {name: generator.standard_normal(shape) for name, shape in CONFIG.state_shapes}

    def ours(x, arrays):
        real = (stream.segments > 0)[..., None]
        y, after = run(params, jnp.where(real, x[ids], 0.0), stream, State(arrays), chunk=chunk)
        rows = np.asarray([root.row for root in ROOTS.values()])
        total = sum(jnp.sum(cotangent * y[part.slice]) for part, cotangent in cotangents)
        return total + sum(jnp.sum(after.arrays[name][rows] * array[None]) for name, array in on_state.items())

    def expected(x, arrays):
        total = 0.0
        for part, cotangent in cotangents:
            y, after = token_by_token(CONFIG, params, x[part.example], State(arrays))
            total += np.sum(cotangent * y[len(part.context) :])
            if any(part is root for root in ROOTS.values()):
                total += sum(np.sum(after.arrays[name] * array) for name, array in on_state.items())
        return total

    arguments = jax.tree.map(lambda a: np.asarray(a, np.float64), (example, state.arrays))
    found, structure = jax.tree.flatten(jax.jit(jax.grad(ours, (0, 1)))(jnp.asarray(example), state.arrays))
    for place, gradient in enumerate(found):
        scale = np.linalg.norm(gradient)
        assert scale > 0.1
        for _ in range(3):
            direction = generator.standard_normal(gradient.shape)
            moved = [1e-5 * direction if i == place else np.zeros(other.shape) for i, other in enumerate(found)]
            steps = jax.tree.unflatten(structure, moved)
            ahead, behind = (expected(*jax.tree.map(sign, arguments, steps)) for sign in (np.add, np.subtract))
            assert abs(np.sum(gradient * direction) - (ahead - behind) / 2e-5) < 2e-5 * scale


@pytest.mark.parametrize(
    "changes", [{"convolution_width": 2}, {"key_heads": 4}, {"key_heads": 1, "key_size": 1}], ids=str
)
def test_other_shapes(changes):
    config = dataclasses.replace(CONFIG, **changes)
    params, state, x = random_params(config), state_of(config, seed=3), hidden(1, 9)
    y, after = run(params, x, whole_rows(1, 9), state, config)
    expected, end = token_by_token(config, params, x[0], state)
    same(y[0], expected)
    same_state(after, end, 0)


def test_half_precision_keeps_the_state_in_float32():
    params, state, x = random_params(CONFIG), state_of(CONFIG, seed=3), hidden(1, 12)
    y, after = run(params, jnp.asarray(x, jnp.bfloat16), whole_rows(1, 12), state)
    expected, _ = token_by_token(CONFIG, params, x[0], state)
    assert y.dtype == jnp.bfloat16 and {array.dtype for array in after.arrays.values()} == {jnp.dtype("float32")}
    same(y[0].astype(jnp.float32), expected, 0.05 * np.abs(expected).max())


def test_what_a_config_refuses():
    for changes, message in [
        ({"key_heads": 3}, "4 value heads cannot share 3 key heads evenly"),
        ({"convolution_width": 1}, "convolution_width is 1; it must be at least 2"),
        ({"value_size": 0}, "value_size is 0; it must be at least 1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0; it must be a finite number above 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(CONFIG, **changes)


def test_sizes_that_others_rely_on():
    params = random_params(CONFIG)
    counted = sum(leaf["kernel"].size for leaf in params.values() if isinstance(leaf, dict) and "kernel" in leaf)
    assert CONFIG.matmul_parameters(WIDTH) == counted
    group = StateGroup((0, 1, 2), CONFIG.state_shapes)
    assert dict(group.shapes) == {"convolution": (3, 2 * 12 + 20), "recurrent": (4, 6, 5)}


def test_heads_are_split_over_the_tensor_axis():
    """Every leaf has a rule; those with an axis of heads are split along it, and the result is the same."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    params, state, x = random_params(CONFIG), state_of(CONFIG, seed=3), hidden(4, 9)
    split = {
        (*path, leaf): parameter_sharding(mesh, ["layers", "delta_net", *path, leaf], (1, *array.shape))
        for path, leaf, array in (
            ([key.key for key in keys[:-1]], keys[-1].key, array)
            for keys, array in jax.tree_util.tree_leaves_with_path(params)
        )
    }
    whole = {path for path, sharding in split.items() if "tensor" not in str(sharding.spec)}
    assert whole == {("norm", "scale")}

    def place(keys, array):
        sharding = split[tuple(key.key for key in keys)]
        return jax.device_put(array[None], sharding)[0]

    stream = whole_rows(4, 9)
    expected, end = run(params, x, stream, state)
    with jax.set_mesh(mesh):
        y, after = run(jax.tree_util.tree_map_with_path(place, params), x, stream, state)
    same(y, np.asarray(expected))
    jax.tree.map(same, after, end)
