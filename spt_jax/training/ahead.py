"""A training step whose program is compiled in a thread, while records are read and encoded."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jaxtyping import PyTree

from spt_jax.data.batches import Batch
from spt_jax.models.model import Model
from spt_jax.training.step import Metrics, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts with.

    Attributes:
      state: the state before the first step.
      step: the training step.
    """

    state: TrainState
    step: Step


def compile_ahead(step: Any, model: Model, state: TrainState, batch: Batch) -> Step:
    """Begins to compile a training step in a thread.

    Args:
      step: a function of a model, a state and a batch, from `jax.jit`.
      model: that of the base.
      state: a state.
      batch: a batch on the devices.

    Returns:
      The step as a function of a state and a batch. For batches of these shapes it waits for the thread, and raises
      what was raised there; for others it compiles as usual.
    """
    shapes, key = jax.tree.map(_shape, (state, batch)), _key(batch)
    executor = ThreadPoolExecutor(1, "compiling the training step")
    program = executor.submit(lambda: step.lower(model, *shapes).compile())
    executor.shutdown(wait=False)

    def call(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        compiled = program.result() if _key(batch) == key else step
        return compiled(model, state, batch)

    return call


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding, weak_type=array.weak_type)


def _key(batch: PyTree[jax.Array]) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(batch)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
