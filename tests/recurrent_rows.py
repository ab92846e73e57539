"""Rows in every layout, with states, for tests of recurrent layers."""

import jax.numpy as jnp
import numpy as np

from spt_jax.models.attention import Stream
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.mamba_config import MambaConfig
from spt_jax.models.memory import State
from tests.layouts import Run, lay_out

WIDTH = 16
LENGTH = 24
# Each run's ids are the places of its tokens in the example, and serve only to be laid out.
EXAMPLE = np.arange(LENGTH, dtype=np.int32)
LAYOUTS = {
    "full": [Run(0, 0, EXAMPLE)],
    "right padding": [Run(1, 0, EXAMPLE[:17])],
    "left padding": [Run(2, 9, EXAMPLE[:15])],
    "packed": [
        Run(3, 0, EXAMPLE[:2], segment=1),
        Run(3, 2, EXAMPLE[2:13], segment=2),
        Run(3, 15, EXAMPLE[:6], segment=3),
    ],
    "branches": [
        Run(4, 1, EXAMPLE[:5], segment=1),
        Run(4, 7, EXAMPLE[5:9], EXAMPLE[:5], segment=2, parent=1),
        Run(4, 11, EXAMPLE[9:10], EXAMPLE[:5], segment=3, parent=1),
        Run(4, 12, EXAMPLE[19:21], EXAMPLE[:5], segment=6, parent=1),
        Run(4, 14, EXAMPLE[10:16], segment=4),
        Run(4, 20, EXAMPLE[16:19], EXAMPLE[10:16], segment=5, parent=4),
    ],
}
ROOTS = {name: [run for run in runs if not run.parent][-1] for name, runs in LAYOUTS.items()}
ROWS = len(LAYOUTS) + 1  # The last row is padding.


def rows_of(layouts: dict[str, list[Run]]) -> tuple[np.ndarray, Stream, np.ndarray]:
    """Hidden states of the rows, their stream, and the hidden states of each place of the example."""
    ids, stream = lay_out([run for runs in layouts.values() for run in runs], LENGTH, ROWS)
    example = hidden(LENGTH)
    return (
        np.where((np.asarray(stream.segments) > 0)[..., None], example[ids], 100 * hidden(1, 1, seed=5)),
        stream,
        example,
    )


def state_of(config: DeltaNetConfig | MambaConfig, *rows: int, seed: int | None = None) -> State:
    """A random state, or zeros without a seed."""
    generator = np.random.default_rng(seed)
    scale = 0.0 if seed is None else 0.5
    arrays = {name: scale * generator.standard_normal((*rows, *shape)) for name, shape in config.state_shapes}
    return State({name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()})


def of_row(state: State, row: int) -> State:
    return State({name: array[row] for name, array in state.arrays.items()})


def hidden(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, WIDTH)).astype(np.float32)


def whole_rows(rows: int, length: int, start: int = 0) -> Stream:
    """One example in each row, without padding."""
    positions = jnp.broadcast_to(jnp.arange(start, start + length)[None], (rows, length))
    return Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))


def same(ours, expected, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, atol=tolerance, rtol=tolerance)


def same_state(ours: State, expected: State, row: int) -> None:
    for name, array in expected.arrays.items():
        same(ours.arrays[name][row], array)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
