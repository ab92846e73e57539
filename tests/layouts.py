"""Rows of tokens in the layouts that a batch can have, and the decoder run over them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.models.attention import Stream


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive tokens of one segment in a row, and the ids that come before them in their own example."""

    row: int
    start: int
    ids: np.ndarray
    context: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    segment: int = 1
    parent: int = 0

    @property
    def example(self) -> np.ndarray:
        """Everything that the run's last token may see."""
        return np.concatenate([self.context, self.ids])

    @property
    def slice(self) -> tuple[int, slice]:
        return self.row, slice(self.start, self.start + len(self.ids))


def lay_out(runs: list[Run], length: int, rows: int | None = None) -> tuple[np.ndarray, Stream]:
    """Ids [B, T] and their stream; padding has id 0."""
    shape = ((max(run.row for run in runs) + 1) if rows is None else rows, length)
    ids, positions, segments, parents = (np.zeros(shape, np.int32) for _ in range(4))
    for run in runs:
        ids[run.slice] = run.ids
        positions[run.slice] = len(run.context) + np.arange(len(run.ids))
        segments[run.slice] = run.segment
        parents[run.slice] = run.parent
    return ids, Stream(jnp.asarray(positions), jnp.asarray(segments), jnp.asarray(parents))


def every_layout(ids: np.ndarray) -> dict[str, list[Run]]:
    """A row for each layout, filled with pieces of `ids` [T]."""
    length = len(ids)
    context, children = ids[: length // 3], [ids[40:52], ids[60:80], ids[81:88]]
    return {
        "full": [Run(0, 0, ids)],
        "right padding": [Run(1, 0, ids[3:-20])],
        "left padding": [Run(2, 37, ids[5 : 5 + length - 37])],
        "packed": [Run(3, 0, ids[: length // 3]), Run(3, length // 3, ids[7 : 7 + length // 2], segment=2)],
        "children": [
            Run(4, 0, context, segment=1),
            Run(4, 45, children[0], context, segment=2, parent=1),
            Run(4, 57, children[1], context, segment=3, parent=1),
            Run(4, 80, children[2], context, segment=5, parent=1),
        ],
    }


@jax.jit
def _forward(model, ids, stream, prefix, cache):
    stream = dataclasses.replace(stream, ids=ids)
    hidden, memory = model.run(model.embed(ids), stream, prefix, cache, return_memory=True)
    return model.logits(hidden), memory


def forward(base: FrozenBase, ids, stream: Stream, prefix=None, cache=None):
    """Logits [B, T, V] of every position, and the rows' memory."""
    return _forward(base.model, jnp.asarray(ids), stream, prefix, cache)


def row_logits(base: FrozenBase, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one unpadded example."""
    return np.asarray(forward(base, *lay_out([Run(0, 0, ids)], len(ids)))[0][0])
