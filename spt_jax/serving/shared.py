"""Memory of long prompts that all slots read, in place of a copy in each slot.

    a long prompt's memory --share--> some entries of one array, marked with the prompt's segment
    a slot's next token, whose parent is that segment --> attends to these entries, and to those of its slot

All slots attend to all entries, in one matrix product, and a mask leaves each slot those of its prompt. A step
therefore reads each prompt once for all of its requests. Entries need no order: each has its position.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

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
    return Prefix(zeros, places, pinned, places)


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


def is_shared(positions: int, capacity: int) -> bool:
    """Whether requests under a prompt of this length share its memory: it is long, and fits in `capacity` entries."""
    return MIN_SHARED <= positions <= capacity


@dataclasses.dataclass
class _Place:
    """Where a prompt is.

    Attributes:
      segment: its segment.
      entries: the entries of its positions.
      users: the number of requests that read it.
    """

    segment: int
    entries: list[int]
    users: int = 0


class SharedPrompts:
    """The prompts in the shared entries. Those without requests stay until their entries are needed."""

    def __init__(self, arrays: Prefix | None):
        """Creates free entries.

        Args:
          arrays: the result of `empty_entries`; None for no entries.
        """
        self.arrays = arrays
        self._capacity = 0 if arrays is None else arrays.positions.shape[0]
        self._free = list(range(self._capacity))
        # By the number of the prompt, the least recently used first.
        self._places: collections.OrderedDict[int, _Place] = collections.OrderedDict()
        self._next_segment = _FIRST_SEGMENT

    def has_room(self, held: DevicePrompt) -> bool:
        """Whether a prompt has entries, or can have those that no request reads."""
        unused = sum(len(place.entries) for place in self._places.values() if not place.users)
        return held.number in self._places or held.start <= len(self._free) + unused

    def enter(self, held: DevicePrompt, put: Callable[..., Prefix]) -> int:
        """Adds a request under a prompt for which there is room.

        Args:
          held: the prompt.
          put: `share`, compiled.

        Returns:
          The segment of the prompt.
        """
        place = self._places.get(held.number)
        if place is None:
            for number in [number for number, other in self._places.items() if not other.users]:
                if held.start <= len(self._free):
                    break
                self._free += self._places.pop(number).entries
            entries, self._free = self._free[: held.start], self._free[held.start :]
            place = self._places[held.number] = _Place(self._next_segment, entries)
            self._next_segment += 1
            self.arrays = put(self.arrays, *self.inputs(held, entries, place.segment))
        place.users += 1
        self._places.move_to_end(held.number)
        return place.segment

    def leave(self, held: DevicePrompt) -> None:
        """Removes a request that `enter` has added."""
        self._places[held.number].users -= 1

    def inputs(self, held: DevicePrompt, entries: Sequence[int], segment: int) -> tuple[Prefix, np.ndarray, np.ndarray]:
        """Returns the arguments of `share` after the entries.

        Args:
          held: a prompt.
          entries: the entries of its positions.
          segment: its segment.
        """
        assert held.prefix is not None
        real = np.asarray(held.prefix.positions) != NEVER
        places = np.full(len(real), self._capacity, np.int32)  # There is no such entry: padding is left out.
        places[real] = entries
        return held.prefix, places, np.asarray(segment, np.int32)
