"""Memory of long prompts that all slots read, in place of a copy in each slot.

    a long prompt's memory --share--> some entries of one array, marked with the prompt's segment
    a slot's next token, whose parent is that segment --> attends to these entries, and to those of its slot

All slots attend to all entries, in one matrix product, and a mask leaves each slot those of its prompt. A step
therefore reads each prompt once for all of its requests. Entries need no order: each has its position.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.attention import NEVER, Prefix
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.model import Model
from spt_jax.serving.bank import DevicePrompt

# The fewest positions of a prompt that is shared: copying fewer is cheap, and all slots compute scores for shared ones.
MIN_SHARED = 64
# Segments 0 and 1 are those of a slot's empty and filled entries.
_FIRST_SEGMENT = 2


def check_shared(model: Model, name: str, entries: int) -> None:
    """Checks that slots of a base can share the memory of prompts.

    Args:
      model: the base.
      name: the name of the base.
      entries: the number of entries for shared prompts; 0 for none.

    Raises:
      ConfigError: `entries` is out of range, or the base is not one of the library's decoders, or it has recurrent
        layers, whose states each slot needs for itself.
    """
    check_entries(entries)
    if entries and model.layout.state_groups:
        raise ConfigError(
            f"shared is {entries}, but {name} has recurrent layers, whose states slots cannot share; use 0"
        )
    if entries and not can_share(model):
        raise ConfigError(f"shared is {entries}, but {name} is not one of the decoders of this library; use 0")


def can_share(model: Model) -> bool:
    """Whether slots of a base can share the memory of prompts: a model of users need not know `Prefix.segments`."""
    return isinstance(model, DecoderModel) and model.layout.generates and not model.layout.state_groups


def check_entries(entries: int) -> None:
    """Checks a number of entries for shared prompts, as far as it does not depend on the base.

    Args:
      entries: the number; 0 for none.

    Raises:
      ConfigError: it is negative, or too small for any prompt that is shared.
    """
    if entries and entries < MIN_SHARED:
        raise ConfigError(f"shared is {entries}; it must be at least {MIN_SHARED}, or 0 to copy prompts to the slots")


def empty_entries(model: Model, capacity: int) -> Prefix:
    """Returns entries of no prompt."""
    places = jnp.zeros(capacity, jnp.int32)
    pinned = jnp.zeros(capacity, bool) if model.layout.windowed else None
    zeros = jax.tree.map(lambda array: array[:, 0], memory.empty_cache(model.layout, 1, capacity, model.dtype))
    return Prefix(zeros, places, pinned, places, in_cache_order=True)


def share(shared: Prefix, prefix: Prefix, entries: Int[Array, " P"], segment: Int[Array, ""]) -> Prefix:
    """Writes the memory of a prompt to entries.

    Args:
      shared: the entries of all prompts.
      prefix: the memory of the prompt.
      entries: the entry of each position of the prompt; one that does not exist for padding.
      segment: the segment of the prompt.

    Returns:
      The new entries.
    """

    assert shared.segments is not None
    own = memory.finite(memory.cast(prefix.memory, jax.tree.leaves(shared.memory)[0].dtype))
    kept = memory.put_places(shared.memory, own, entries)
    pinned = shared.pinned
    if pinned is not None:
        pinned = pinned.at[entries].set(False if prefix.pinned is None else prefix.pinned, mode="drop")
    positions = shared.positions.at[entries].set(prefix.positions, mode="drop")
    segments = shared.segments.at[entries].set(segment, mode="drop")
    return dataclasses.replace(shared, memory=kept, positions=positions, pinned=pinned, segments=segments)


@dataclasses.dataclass
class _Place:
    """Where a prompt is.

    Attributes:
      of: the positions of the prompt's memory, an array whose identity is that of the prompt.
      segment: its segment.
      entries: the entries of its positions.
      users: the number of requests that read it.
    """

    of: Int[Array, " P"]
    segment: int
    entries: list[int]
    users: int = 0


def is_shared(held: DevicePrompt, capacity: int) -> bool:
    """Whether requests under a prompt share its memory: it is long, and fits in `capacity` entries."""
    return held.prefix is not None and MIN_SHARED <= held.start <= capacity


class SharedPrompts:
    """The prompts in the shared entries. Those without requests stay until their entries are needed."""

    def __init__(self, arrays: Prefix | None, put: Any):
        """Creates free entries.

        Args:
          arrays: the result of `empty_entries`; None for no entries.
          put: `share`, from `jax.jit`.
        """
        self.arrays, self._put = arrays, put
        self._shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays)
        self._compiled: dict[int, Callable[..., Prefix]] = {}  # by the length of a prompt's memory, padding included
        self.capacity = 0 if arrays is None else arrays.positions.shape[0]
        self._free = list(range(self.capacity))
        self._places: collections.OrderedDict[int, _Place] = collections.OrderedDict()  # The least recently used first.
        self._next = _FIRST_SEGMENT

    def has_room(self, held: DevicePrompt) -> bool:
        """Whether a prompt has entries, or can have those that no request reads."""
        unused = sum(len(place.entries) for place in self._places.values() if not place.users)
        return _identity(held) in self._places or held.start <= len(self._free) + unused

    def enter(self, held: DevicePrompt) -> int:
        """Adds a request under a prompt for which there is room; returns the segment of the prompt."""
        place = self._places.get(key := _identity(held))
        if place is None:
            for other in [other for other, one in self._places.items() if not one.users]:
                if held.start <= len(self._free):
                    break
                self._free += self._places.pop(other).entries
            entries, self._free = self._free[: held.start], self._free[held.start :]
            place = self._places[key] = _Place(_positions(held), self._next, entries)
            self._next += 1
            put: Any = self._compiled.get(len(place.of), self._put)
            self.arrays = put(self.arrays, *self._inputs(held, entries, place.segment))
        place.users += 1
        self._places.move_to_end(key)
        return place.segment

    def leave(self, held: DevicePrompt) -> None:
        """Removes a request that `enter` has added."""
        self._places[_identity(held)].users -= 1

    def is_warm(self, held: DevicePrompt) -> bool:
        """Whether the program that `warm` compiles exists already."""
        return len(_positions(held)) in self._compiled

    def warm(self, held: DevicePrompt) -> None:
        """Compiles the program that writes a prompt to entries. Thread-safe, unless it is called twice at a time."""
        inputs = self._inputs(held, range(held.start), 0)
        self._compiled[len(_positions(held))] = self._put.lower(self._shapes, *inputs).compile()

    def _inputs(self, held: DevicePrompt, entries: Sequence[int], segment: int) -> tuple[Any, ...]:
        """Returns the arguments of `share` after the entries; `entries` are those of the prompt's positions."""
        real = np.asarray(_positions(held)) != NEVER
        places = np.full(len(real), self.capacity, np.int32)  # There is no such entry: padding is left out.
        places[real] = entries
        return held.prefix, places, np.asarray(segment, np.int32)


def _positions(held: DevicePrompt) -> Int[Array, " P"]:
    assert held.prefix is not None
    return held.prefix.positions


def _identity(held: DevicePrompt) -> int:
    """Returns a number that no other prompt has as long as `_Place.of` keeps the array."""
    return id(_positions(held))
