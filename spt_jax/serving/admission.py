"""The shapes and the arguments of the programs that admit requests."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from spt_jax.data.batches import bucket
from spt_jax.inference.decoding import RowSampling
from spt_jax.inference.generation import BUCKET
from spt_jax.models.attention import Prefix
from spt_jax.models.layout import Layout
from spt_jax.serving.bank import DevicePrompt
from spt_jax.serving.chunks import first_count, reach_of
from spt_jax.serving.requests import Ticket
from spt_jax.serving.shared import is_shared
from spt_jax.serving.slots import RequestIds
from spt_jax.serving.two_sides import decoder_ids

# Numbers of requests that one program admits at a time, and the most ids that they may have in total.
SIZES = (1, 4, 16)
TOGETHER = 2048


@dataclasses.dataclass(frozen=True)
class Extension:
    """The key of a program that runs a chunk of a request.

    Attributes:
      reach: the number of cache entries that it reads.
      kind: structure and shapes of the rows for the request's virtual ids, and of the shared memory that it follows.
    """

    reach: int
    kind: Any


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The key of a program that writes the memory of a prompt to shared entries.

    Attributes:
      kind: structure and shapes of the memory.
    """

    kind: Any


@dataclasses.dataclass(frozen=True)
class Admission:
    """Chooses the program that admits a request.

    Attributes:
      layout: that of the base.
      slots: the number of slots.
      capacity: the number of cache entries of a slot.
      chunk: the most ids that are run at a time; 0 for no limit.
      shared: the number of entries for prompts whose memory all slots share.
    """

    layout: Layout
    slots: int
    capacity: int
    chunk: int = 0
    shared: int = 0

    def shares(self, held: DevicePrompt) -> bool:
        """Whether requests under a prompt read shared entries, and no copy of its memory in their slots."""
        return held.prefix is not None and is_shared(held.start, self.shared)

    def taken(self, held: DevicePrompt) -> int:
        """Returns the number of entries of its slot that a request's prompt takes, padding included."""
        return 0 if held.prefix is None or self.shares(held) else held.prefix.positions.shape[0]

    def filled(self, ticket: Ticket) -> int:
        """Returns the number of entries of its slot that a request has filled; its newest token is not among them yet.

        In an encoder-decoder, these are the decoder's: those of the template, such as the start token, and new ones.
        """
        held = ticket.held
        own = held.decoder if self.layout.encodes else len(ticket.request.ids) - len(held.lead)
        return self.taken(held) + own + len(ticket.ids) - 1

    def crossed(self, ticket: Ticket) -> int:
        """Returns the number of cache entries of a request that cross-attention reads."""
        own = len(ticket.request.ids) - ticket.held.decoder
        return self.taken(ticket.held) + own if self.layout.encodes else 0

    def reach(self, entries: int) -> int:
        """Returns how many cache entries per slot the decode program for `entries` entries reads."""
        most = bucket(entries, 2 * BUCKET)
        fewer = 3 * most // 4
        return min(fewer if 2 * BUCKET < entries <= fewer else most, self.capacity)

    def first(self, held: DevicePrompt, length: int) -> int:
        """Returns how many of a request's ids are run when it is admitted, without the leading ones.

        Args:
          held: the arrays of the request's prompt.
          length: the number of ids of the request, the leading ones included.
        """
        return first_count(length - len(held.lead), self.chunk)

    def key(self, held: DevicePrompt, length: int) -> tuple[Any, ...]:
        """Returns the key of the program that admits requests of `length` ids, apart from the number of requests.

        Args:
          held: the arrays of the requests' prompt.
          length: the number of ids of a request, the leading ones included.
        """
        return _kind(held.virtual, *self._memory(held)), held.decoder, self._bucket(held, length)

    def extension(self, held: DevicePrompt, count: int) -> Extension:
        """Returns the key of the program that runs the next chunk of a request.

        Args:
          held: the arrays of the request's prompt.
          count: how many of the request's ids have been run, without the leading ones.
        """
        reach = reach_of(self.taken(held) + count, self.chunk, self.capacity)
        return Extension(reach, _kind(held.virtual, self._memory(held)[1]))

    def sharing(self, held: DevicePrompt) -> Sharing:
        """Returns the key of the program that shares a prompt."""
        return Sharing(_kind(held.prefix))

    def programs(self, held: DevicePrompt, length: int) -> list[tuple[int, Any] | Extension | Sharing]:
        """Returns the keys of all programs that requests of `length` ids need before they are decoded.

        Args:
          held: the arrays of the requests' prompt.
          length: the number of ids of a request, the leading ones included.
        """
        key, own, first = self.key(held, length), length - len(held.lead), self.first(held, length)
        later = {self.extension(held, count): None for count in range(first, own, self.chunk or own)}
        shared = [self.sharing(held)] if self.shares(held) else []
        return [*shared, *((size, key) for size in self.sizes(key)), *later]

    def sizes(self, key: tuple[Any, ...]) -> list[int]:
        """Returns the numbers of requests that the programs of this key admit at a time."""
        return [size for size in SIZES if size == 1 or (size <= self.slots and size * key[-1] <= TOGETHER)]

    def groups(self, free: Sequence[int], tickets: Iterable[Ticket]) -> list[tuple[list[int], list[Ticket]]]:
        """Returns groups of slots and requests, each group admitted by one program call.

        Args:
          free: free slots, at least as many as there are requests.
          tickets: the requests.
        """
        alike: dict[Any, list[Ticket]] = {}
        for ticket in tickets:
            key = self.key(ticket.held, len(ticket.request.ids))
            alike.setdefault((key, ticket.parent), []).append(ticket)
        groups, remaining = [], list(free)
        for (key, _), own in alike.items():
            while own:
                size = max(size for size in self.sizes(key) if size <= len(own))
                groups.append((remaining[:size], own[:size]))
                remaining, own = remaining[size:], own[size:]
        return groups

    def inputs(self, tickets: Sequence[Ticket], slots: Sequence[int]) -> tuple[Any, ...]:
        """Returns the arguments of `slots.admit` between the model and the slots.

        Args:
          tickets: requests with the same key and the same parent.
          slots: the slot of each.
        """
        own_ids = [self._own(ticket) for ticket in tickets]
        configs = [ticket.request.sampling for ticket in tickets]
        padded = np.zeros((len(tickets), self._bucket(tickets[0].held, len(tickets[0].request.ids))), np.int32)
        for row, ids in zip(padded, own_ids, strict=True):
            row[: len(ids)] = ids
        # NumPy arrays: a compiled program takes them faster than converting them to device arrays first.
        lengths = np.asarray([len(ids) for ids in own_ids], np.int32)
        starts = np.asarray([ticket.held.start for ticket in tickets], np.int32)
        sampling: Any = (
            np.asarray([config.temperature for config in configs], np.float32),
            np.asarray([min(config.top_k, self.layout.vocab_size) for config in configs], np.int32),
            np.asarray([config.top_p for config in configs], np.float32),
            np.asarray([config.seed for config in configs], np.uint32),
            np.zeros(len(configs), np.int32),
        )
        shared = self._memory(tickets[0].held)[1]
        prompts = [(ticket.held.virtual, self._memory(ticket.held)[0]) for ticket in tickets]
        requests: Any = padded, lengths, starts, np.asarray([ticket.parent for ticket in tickets], np.int32)
        if self.layout.encodes:
            requests += (decoder_ids(lengths, [ticket.held.decoder for ticket in tickets], padded.shape[1]),)
        at = np.asarray(slots, np.int32)
        return prompts, shared, RequestIds(*requests), RowSampling(*sampling), at, wanted(tickets)

    def chunk_inputs(self, ticket: Ticket, slot: int, count: int) -> tuple[Any, ...]:
        """Returns the arguments of `chunks.extend` between the model and the slots.

        Args:
          ticket: a request.
          slot: its slot.
          count: how many of its ids have been run, without the leading ones.
        """
        begin = len(ticket.held.lead) + count
        ids = ticket.request.ids[begin : begin + self.chunk]
        return ticket.held.virtual, ids, np.asarray(slot, np.int32), wanted([ticket]), self._memory(ticket.held)[1]

    def _memory(self, held: DevicePrompt) -> tuple[Prefix | None, Prefix | None]:
        """Returns the memory of a prompt if requests copy it, and if they share it."""
        return (None, held.prefix) if self.shares(held) else (held.prefix, None)

    def _own(self, ticket: Ticket) -> np.ndarray:
        """Returns the ids of a request that are run when it is admitted."""
        begin = len(ticket.held.lead)
        return ticket.request.ids[begin : begin + self.first(ticket.held, len(ticket.request.ids))]

    def _bucket(self, held: DevicePrompt, length: int) -> int:
        """Returns the number of ids that are run when a request of `length` ids is admitted, rounded up."""
        return min(bucket(self.first(held, length), BUCKET // 2), self.capacity - self.taken(held))


def wanted(tickets: Iterable[Ticket]) -> np.ndarray:
    """Whether any of these requests wants alternatives."""
    return np.asarray(any(ticket.request.alternatives for ticket in tickets))


def _kind(*trees: Any) -> tuple[Any, ...]:
    """Returns the structure and the shapes of arrays."""
    leaves, structure = jax.tree.flatten(trees)
    return structure, tuple(leaf.shape for leaf in leaves)
