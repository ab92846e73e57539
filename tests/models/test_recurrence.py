"""Recurrent layers in every layout of a row, against a loop over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.models.attention import Stream
from spt_jax.models.memory import State
from spt_jax.models.recurrence import token_order
from spt_jax.runtime.sharding import MeshConfig, make_mesh, parameter_sharding
from tests.layouts import lay_out
from tests.recurrent_layers import CONFIGS, random_params, run, token_by_token
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
    state_of,
    whole_rows,
)

STATES = pytest.mark.parametrize("per_row", [True, False], ids=["own state", "shared state"])
EVERY_CHUNK = [("delta_net", 256), ("delta_net", 7), *(("mamba", chunk) for chunk in (256, 7, 4, 1))]


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest):
    return CONFIGS[request.param]


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


@pytest.mark.parametrize(("config", "chunk"), EVERY_CHUNK, indirect=["config"], ids=str)
@STATES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, per_row, config, chunk, laid_out):
    """Every run is what it is alone, after its parent's tokens and the initial state; padding changes nothing."""
    x, stream, example = laid_out
    params = random_params(config)
    state = state_of(config, *[ROWS] * per_row, seed=3)
    y, after = run(config, params, x, stream, state, chunk=chunk)
    assert np.isfinite(y).all()
    for part in LAYOUTS[layout]:
        initial = of_row(state, part.row) if per_row else state
        expected, end = token_by_token(config, params, example[part.example], initial)
        same(y[part.slice], expected[len(part.context) :])
        if part is ROOTS[layout]:
            same_state(after, end, part.row)


@pytest.mark.parametrize("chunk", [256, 7])
@STATES
def test_a_row_of_padding_keeps_its_state(config, per_row, chunk, laid_out):
    x, stream, _ = laid_out
    state = state_of(config, *[ROWS] * per_row, seed=3)
    _, after = run(config, random_params(config), x, stream, state, chunk=chunk)
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(after.arrays[name][-1], array[-1] if per_row else array)


@pytest.mark.parametrize("chunk", [256, 3])
def test_padding_between_the_tokens_of_an_example(config, chunk):
    """Some templates leave gaps: they are no tokens, and positions continue after them."""
    params, state, x = random_params(config), state_of(config, 1, seed=3), hidden(1, 12)
    real = np.asarray([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]])
    stream = Stream(*(jnp.asarray(a, jnp.int32) for a in (real * (real.cumsum(1) + 4), real, 0 * real)))
    y, after = run(config, params, x, stream, state, chunk=chunk)
    expected, end = token_by_token(config, params, x[0, real[0] > 0], of_row(state, 0))
    same(y[0, real[0] > 0], expected)
    same_state(after, end, 0)


@pytest.mark.parametrize("parts", [(11, 1, 1, 7), (1, 2, 17), (1,) * 20], ids=str)
def test_a_row_in_parts(config, parts):
    """Each part continues from the state of the one before it, some of them shorter than the convolution."""
    params, state, x = random_params(config), state_of(config, seed=3), hidden(1, 20)
    expected, end = token_by_token(config, params, x[0], state)
    start, found = 0, []
    for length in parts:
        y, state = run(config, params, x[:, start : start + length], whole_rows(1, length, start), state, chunk=6)
        found.append(y[0])
        start += length
    same(np.concatenate(found), expected)
    same_state(state, end, 0)


def test_decoding_steps_of_finished_rows(config):
    """A step in which some rows have no token changes only the others."""
    params, state, x = random_params(config), state_of(config, 3, seed=3), hidden(3, 1)
    segments = jnp.asarray([[1], [0], [1]])
    y, after = run(config, params, x, Stream(jnp.full((3, 1), 9), segments, jnp.zeros_like(segments)), state)
    for row in (0, 2):
        expected, end = token_by_token(config, params, x[row], of_row(state, row))
        same(y[row], expected)
        same_state(after, end, row)
    for name, array in state.arrays.items():
        np.testing.assert_array_equal(after.arrays[name][1], array[1])


@pytest.mark.parametrize("chunk", [256, 7])
def test_gradients_are_finite_differences(config, chunk, laid_out):
    """Of every output and of the states, in all layouts at once, with a state that the rows share."""
    _, stream, example = laid_out
    ids, _ = lay_out([part for parts in LAYOUTS.values() for part in parts], LENGTH, ROWS)
    params, state = random_params(config), state_of(config, seed=3)
    generator = np.random.default_rng(7)
    cotangents = [(p, generator.standard_normal((len(p.ids), WIDTH))) for parts in LAYOUTS.values() for p in parts]
    on_state = {name: generator.standard_normal(shape) for name, shape in config.state_shapes}

    def ours(x, arrays):
        real = (stream.segments > 0)[..., None]
        y, after = run(config, params, jnp.where(real, x[ids], 0.0), stream, State(arrays), chunk=chunk)
        rows = np.asarray([root.row for root in ROOTS.values()])
        total = sum(jnp.sum(cotangent * y[part.slice]) for part, cotangent in cotangents)
        return total + sum(jnp.sum(after.arrays[name][rows] * array[None]) for name, array in on_state.items())

    def expected(x, arrays):
        total = 0.0
        for part, cotangent in cotangents:
            y, after = token_by_token(config, params, x[part.example], State(arrays))
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


def test_a_long_row_is_as_precise_as_a_short_one(config):
    """Sums of decays grow with the row, and their differences do not."""
    params, state, x = random_params(config), state_of(config, seed=3), hidden(1, 600)
    y, after = run(config, params, x, whole_rows(1, 600), state)
    expected, end = token_by_token(config, params, x[0], state)
    same(y[0], expected)
    same_state(after, end, 0)


def test_half_precision_keeps_the_state_in_float32(config):
    params, state, x = random_params(config), state_of(config, seed=3), hidden(1, 12)
    y, after = run(config, params, jnp.asarray(x, jnp.bfloat16), whole_rows(1, 12), state)
    expected, _ = token_by_token(config, params, x[0], state)
    assert y.dtype == jnp.bfloat16 and {array.dtype for array in after.arrays.values()} == {jnp.dtype("float32")}
    same(y[0].astype(jnp.float32), expected, 0.05 * np.abs(expected).max())


def test_the_parameters_that_a_token_is_multiplied_with(config):
    params = random_params(config)
    counted = sum(leaf["kernel"].size for leaf in params.values() if isinstance(leaf, dict) and "kernel" in leaf)
    assert config.matmul_parameters(WIDTH) == counted


@pytest.mark.parametrize(
    ("name", "whole"), [("delta_net", {("norm", "scale")}), ("mamba", {("norm", "scale"), ("output", "bias")})]
)
def test_heads_are_split_over_the_tensor_axis(name, whole):
    """Every leaf has a rule; those with an axis of heads are split along it, and the result is the same."""
    config, mesh = CONFIGS[name], make_mesh(MeshConfig(fsdp=2, tensor=2))
    params, state, x = random_params(config), state_of(config, seed=3), hidden(4, 9)
    split = {
        (*path, leaf): parameter_sharding(mesh, ["layers", name, *path, leaf], (1, *array.shape))
        for path, leaf, array in (
            ([key.key for key in keys[:-1]], keys[-1].key, array)
            for keys, array in jax.tree_util.tree_leaves_with_path(params)
        )
    }
    assert {path for path, sharding in split.items() if "tensor" not in str(sharding.spec)} == whole

    def place(keys, array):
        sharding = split[tuple(key.key for key in keys)]
        return jax.device_put(array[None], sharding)[0]

    stream = whole_rows(4, 9)
    expected, end = run(config, params, x, stream, state)
    with jax.set_mesh(mesh):
        y, after = run(config, jax.tree_util.tree_map_with_path(place, params), x, stream, state)
    same(y, np.asarray(expected))
    jax.tree.map(same, after, end)
