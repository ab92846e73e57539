"""Continuous batching: requests start and end independently, each under its own prompt."""

import collections
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from spt_jax.data.batches import round_up
from spt_jax.errors import ConfigError, DataError
from spt_jax.inference.answers import Generated, answer, continuation_text, endings, is_opening, stop_end
from spt_jax.inference.decoding import ALTERNATIVES
from spt_jax.inference.generation import BUCKET, check_prompt
from spt_jax.runtime.sharding import row_shards
from spt_jax.serving.admission import Admission, Extension, Sharing, wanted
from spt_jax.serving.bank import DevicePrompt, PromptBank, not_decoded, overflow
from spt_jax.serving.chunks import chunk_of
from spt_jax.serving.fairness import Sender, Turns
from spt_jax.serving.lookup import Drafts, check_lookup, drafts_of
from spt_jax.serving.programs import programs_of
from spt_jax.serving.requests import NOBODY, Request, Ticket, until
from spt_jax.serving.shared import SharedPrompts, check_shared
from spt_jax.serving.slots import MAX_STEPS, MIN_STEPS, NewTokens
from spt_jax.serving.two_sides import check_decoder_ids

# Target seconds per decode call; between calls the host admits new requests and collects finished ones.
POLL_SECONDS = 0.02


class Engine:
    """Answers requests in a fixed number of slots.

    Any thread may call `submit`; only one thread may call `step` and `cancel`.

    The decode program takes any mixture of prompts, lengths and sampling settings. There is one program for each cache
    length: the number of entries in the fullest slot, rounded up to 64, 96, 128, 192, ...; with shared prompts, there
    are two. A request's ids are run once, in a program per length (rounded up to 16, 32, 64, ...) and number of
    requests (1, 4 or 16); a request with more ids than a chunk runs a chunk at a time, and others are decoded in
    between. The prompt's memory is computed once and then copied, or shared by the slots.

    Senders take turns. With 16 or more slots, two slots are reserved: an HTTP request that already has a slot gets
    neither of them, and a client that already has a slot gets at most one. A short request therefore does not wait for
    the long answers of others. With 8 to 15 slots one slot is reserved, with fewer slots none.
    """

    def __init__(
        self,
        bank: PromptBank,
        *,
        slots: int = 16,
        context: int | None = None,
        lookup: int = 0,
        chunk: int | None = None,
        shared: int = 0,
    ):
        """Allocates the slots on the device.

        Args:
          bank: the prompts; they may be added and removed while the engine runs.
          slots: the number of requests that run at once.
          context: positions per slot, for prompt and answer together; None for all positions of the base. A prompt that
            is shared takes none of them.
          lookup: the most ids of a draft, which is looked up in a request's earlier text; 0 for no drafts.
          chunk: the most ids of a request that are run at a time; 0 for no limit, None for the default: no limit in
            encoder-decoders, and `chunks.DEFAULT_CHUNK` in others.
          shared: positions for prompts that all slots share without copies, those with at least `shared.MIN_SHARED`
            positions; 0 copies all prompts into the slots. A request whose prompt has no place yet makes later ones
            under shared prompts wait too, and all later ones of its sender.

        Raises:
          ConfigError: `slots` is not a multiple of the number of parts into which the mesh splits rows; `lookup` is out
            of range, or the base cannot decode with drafts; `chunk` is out of range, or the base is an encoder-decoder;
            `shared` is out of range, or slots of the base cannot share prompts.
        """
        self.bank, base = bank, bank.base
        if slots < 1 or slots % row_shards(base.mesh):
            shards = row_shards(base.mesh)
            raise ConfigError(
                f"slots is {slots}; it must be a multiple of {shards}, the number of parts the mesh splits rows into"
            )
        check_lookup(base.layout, base.name, lookup)
        self._lookup = lookup
        self.context = min(context or base.layout.max_positions, base.layout.max_positions)
        self._capacity = round_up(self.context, BUCKET) + 3 * BUCKET
        self._let_in = False
        self._steps = MAX_STEPS  # steps that take POLL_SECONDS, estimated from the latest decode call
        self._compiling = threading.Lock()
        self._programs = programs_of(base.mesh, base.layout)
        chunk = chunk_of(base.layout, base.name, chunk)
        check_shared(base.model, base.name, shared)
        self._admission = Admission(base.layout, slots, self._capacity, chunk, shared)
        self._slots = self._programs.empty(base.model, slots, self._capacity)
        entries = self._programs.empty_entries(base.model, capacity=shared) if shared else None
        self._shared = SharedPrompts(entries)
        self._blocked: Ticket | None = None  # the request for whose prompt there is no shared place
        self._busy: list[Ticket | None] = [None] * slots
        self._started: dict[int, int] = {}  # slots whose requests have not all ids in them yet: how many they have
        self._spare = min(slots // 8, 2)
        self._waiting: Turns[Ticket] = Turns()
        self._compiled: dict[Any, Callable[..., Any]] = {}
        arrays = self._slots, entries
        self._shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), arrays)

    @property
    def slots(self) -> int:
        """The number of requests that can run at once."""
        return len(self._busy)

    @property
    def slot_bytes(self) -> int:
        """The size of the slots and of the shared entries on the device, all of which is allocated at the start."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self._slots, self._shared.arrays)))

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def under_way(self) -> int:
        """The number of requests that have a slot."""
        return sum(ticket is not None for ticket in self._busy)

    def submit(self, request: Request) -> Ticket:
        """Queues a request; `step` answers it.

        Args:
          request: the prompt's name, the ids and how to sample.

        Returns:
          A ticket, which receives the answer's tokens.

        Raises:
          ConfigError: there is no such prompt, it has parts that the engine cannot decode with (`bank.not_decoded`),
            the request has more tokens than the base or a slot has positions, or it wants too many alternatives.
          DataError: there are no ids, or ids that neither the base nor the prompt has.
        """
        base, held = self.bank.base, request.held or self.bank.held(request.prompt)
        ids = np.asarray(request.ids, np.int32)
        if not 0 <= request.alternatives <= ALTERNATIVES:
            raise ConfigError(f"alternatives is {request.alternatives}; it must be between 0 and {ALTERNATIVES}")
        if not held.generates:
            raise ConfigError(
                f"prompt {request.prompt!r} has {' and '.join(not_decoded(held.virtual))}, which the engine cannot"
                " decode with; use `Prompt.generate` or `spt-jax generate`"
            )
        check_prompt(
            base, ids, 0, None if request.prompt is None else held.rows, held.start - len(held.lead), request.sampling
        )
        if not np.array_equal(ids[: len(held.lead)], held.lead) or len(ids) == len(held.lead):
            raise ConfigError(
                f"the ids do not begin with the leading ids of prompt {request.prompt!r}'s template, or end after them"
            )
        own_ids = ids[len(held.lead) :]
        if held.virtual is None and own_ids.max() >= base.layout.vocab_size:
            raise DataError(f"id {own_ids.max()}: {request.prompt!r} has no virtual ids after its leading ids")
        check_decoder_ids(base.layout, ids, held.decoder)
        needed = self._needed(held, len(ids)) + request.sampling.max_new_tokens
        if needed > self.context:
            raise ConfigError(f"the request needs {needed} positions, but a slot has {self.context}")
        ticket = self._ticket(dataclasses.replace(request, ids=ids), held)
        self._waiting.add(ticket.sender, ticket)
        return ticket

    def room(self, held: DevicePrompt, length: int) -> int:
        """Returns the most tokens of an answer to a request; less than 1 if the request is too long.

        Args:
          held: the prompt's arrays, from `PromptBank.held`.
          length: the number of ids.
        """
        of_base = self.bank.base.layout.max_positions - (held.start - len(held.lead) + length)
        return min(self.context - self._needed(held, length), of_base)

    def _needed(self, held: DevicePrompt, length: int) -> int:
        """Returns the number of positions of a slot that a request of `length` ids needs before its answer."""
        return length - len(held.lead) + (0 if self._admission.shares(held) else held.start)

    def cancel(self, ticket: Ticket) -> None:
        """Cancels a request; its slot becomes free at once.

        Args:
          ticket: the result of `submit`.
        """
        self._waiting.remove(ticket.sender, ticket)
        if ticket in self._busy:
            slot = self._busy.index(ticket)
            self._leave(slot)
            self._started.pop(slot, None)
        self._blocked = None if ticket is self._blocked else self._blocked
        ticket.done = True

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self._waiting and not any(self._busy)

    def step(self) -> list[Ticket]:
        """Alternates between admitting waiting requests and decoding a few tokens for all; returns ended tickets.

        Of the requests that are run in chunks, the first gets its next one in each step that admits.

        Returns:
          The tickets of the requests that ended.
        """
        admitted = []
        if not self._let_in:
            admitted += [self._extend()] if self._started else []
            admitted += [self._admit(*group) for group in self._groups()]
        self._let_in = bool(admitted)
        ended = []
        for slots, new in admitted:
            firsts = jax.tree.map(lambda a: np.asarray(a)[None], new)
            for number, slot in enumerate(slots):
                ended += [] if slot in self._started else self._take(slot, firsts, number)
        running = self._running()
        busy = np.asarray([ticket is not None for ticket in running])
        if busy.any() and not self._let_in:
            counts, new = self._decode(busy, running)
            for slot in np.flatnonzero(busy).tolist():
                count = int(counts[slot])
                ended += self._take(slot, jax.tree.map(lambda a, count=count: a[:count], new), slot)
        return ended

    def _running(self) -> list[Ticket | None]:
        """Returns the request in each slot if all its ids are in it."""
        return [None if slot in self._started else ticket for slot, ticket in enumerate(self._busy)]

    def _decode(self, busy: np.ndarray, running: list[Ticket | None]) -> tuple[np.ndarray, NewTokens]:
        """Generates tokens for busy slots; returns how many of each slot are real, and the tokens."""
        base, tickets = self.bank.base, [ticket for ticket in running if ticket is not None]
        began, drafts = time.perf_counter(), drafts_of(running, self._lookup, base.layout.vocab_size)
        filled, shared = max(map(self._admission.filled, tickets)), None
        if any(ticket.parent for ticket in tickets):
            shared = self._shared.arrays
        if drafts is not None:
            inputs = base.model, busy, wanted(tickets), drafts, shared, self._slots
            self._slots, new, counts = self._programs.verify(self._admission.reach(filled + self._lookup + 1), *inputs)
            return np.asarray(counts), jax.tree.map(np.asarray, new)
        reach = self._admission.reach(max(filled + 1, *map(self._admission.crossed, tickets)))
        most = min(reach - filled, self._steps, MIN_STEPS if self._lookup else MAX_STEPS)  # tokens may allow drafts
        inputs = busy, wanted(tickets), until(tickets, most, bool(self._waiting)), shared, self._slots
        self._slots, new, steps = self._programs.decode(reach, base.model, *inputs)
        self._steps = min(max(int(POLL_SECONDS * int(steps) / (time.perf_counter() - began)), 1), MAX_STEPS)
        return np.full(len(busy), int(steps)), jax.tree.map(np.asarray, new)

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Answers requests and returns the results in order; other submitted requests run along with them.

        Args:
          requests: what to answer.

        Returns:
          The answers, in the order of the requests.

        Raises:
          ConfigError, DataError: as in `submit`, in which case no request is answered.
          ConfigError: values of a request overflow the base's dtype.
        """
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self.submit(request))
            while not all(ticket.done for ticket in tickets):
                self.step()
        finally:
            for ticket in tickets:
                if not ticket.done:
                    self.cancel(ticket)
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
        results = [ticket.result for ticket in tickets]
        assert all(result is not None for result in results)
        return [result for result in results if result is not None]

    def is_warm(self, held: DevicePrompt, length: int) -> bool:
        """Whether the programs that `warm` compiles exist already, or no slot has room for such a request.

        Args:
          held: the prompt's arrays, from `PromptBank.held`.
          length: the number of ids.

        Returns:
          Whether all exist.
        """
        length = _warmed(held, length)
        return self.room(held, length) < 1 or all(
            key in self._compiled for key in self._admission.programs(held, length)
        )

    def warm(self, held: DevicePrompt, length: int) -> None:
        """Compiles the programs for a request of `length` ids under this prompt, unless they exist. Thread-safe.

        Args:
          held: the prompt's arrays, from `PromptBank.held`.
          length: the number of ids.
        """
        if self.is_warm(held, length):
            return
        base, request = self.bank.base, Request(np.zeros(_warmed(held, length), np.int32))
        ticket = self._ticket(request, held)
        with self._compiling:
            for key in self._admission.programs(held, len(request.ids)):
                if key in self._compiled:
                    continue
                slots, shared = self._shapes
                if isinstance(key, Sharing):
                    program = self._programs.share.lower(shared, *self._shared.inputs(held, range(held.start), 0))
                elif isinstance(key, Extension):
                    inputs = *self._admission.chunk_inputs(ticket, 0, 0), slots
                    program = self._programs.extend.lower(key.reach, base.model, *inputs)
                else:
                    inputs = *self._admission.inputs([ticket] * key[0], [0] * key[0]), slots
                    program = self._programs.admit.lower(base.model, *inputs)
                self._compiled[key] = program.compile()

    def warm_decoding(self) -> None:
        """Compiles the decode programs, which do not depend on requests. Call it only while there are none."""
        base, idle, reach = self.bank.base, np.zeros(len(self._busy), bool), 0
        while reach < self._capacity:
            reach = self._admission.reach(reach + 1)
            for shared in [None] if self._shared.arrays is None else [None, self._shared.arrays]:
                inputs = idle, wanted([]), until([], 0, False), shared, self._slots
                self._slots, *_ = self._programs.decode(reach, base.model, *inputs)
                if self._lookup:
                    rows: Any = np.zeros((len(idle), self._lookup), np.int32), np.zeros(len(idle), np.int32)
                    inputs = idle, wanted([]), Drafts(*rows), shared, self._slots
                    self._slots, *_ = self._programs.verify(reach, base.model, *inputs)

    def _groups(self) -> list[tuple[list[int], list[Ticket]]]:
        """Returns groups of free slots and waiting requests, each group admitted by one program call."""
        free = [slot for slot, ticket in enumerate(self._busy) if ticket is None]
        return self._admission.groups(free, self._next(len(free)))

    def _next(self, free: int) -> list[Ticket]:
        """Removes and returns the waiting requests that are next to enter `free` free slots."""
        holders = collections.Counter(ticket.sender for ticket in self._busy if ticket is not None)
        clients = collections.Counter(ticket.sender.client for ticket in self._busy if ticket is not None)
        found: list[Ticket] = []

        def may(sender: Sender, ticket: Ticket) -> bool:
            spare = self._spare if holders[sender] else (self._spare + 1) // 2
            if sender != NOBODY and clients[sender.client] and free - len(found) <= spare:
                return False
            if not self._admission.shares(ticket.held):
                return True
            # None overtakes a request that waits for a shared place, so that it gets one when others end.
            if self._blocked is None and not self._shared.has_room(ticket.held):
                self._blocked = ticket
            return self._blocked in (None, ticket) and self._shared.has_room(ticket.held)

        while len(found) < free and (ticket := self._waiting.take(may)) is not None:
            found.append(ticket)
            if self._admission.shares(ticket.held):
                self._blocked = None
                put = self._compiled.get(self._admission.sharing(ticket.held)) or self._programs.share
                ticket.parent = self._shared.enter(ticket.held, put)
            holders[ticket.sender] += 1
            clients[ticket.sender.client] += 1
        return found

    def _leave(self, slot: int) -> None:
        """Frees a slot."""
        ticket, self._busy[slot] = self._busy[slot], None
        if ticket is not None and ticket.parent:
            self._shared.leave(ticket.held)

    def _admit(self, slots: list[int], tickets: list[Ticket]) -> tuple[list[int], NewTokens]:
        """Puts requests into slots; returns the slots and the first tokens."""
        base, first = self.bank.base, tickets[0]
        program = self._compiled.get((len(tickets), self._admission.key(first.held, len(first.request.ids))))
        program = program or self._programs.admit
        self._slots, firsts = program(base.model, *self._admission.inputs(tickets, slots), self._slots)
        for slot, ticket in zip(slots, tickets, strict=True):
            self._busy[slot] = ticket
            count = self._admission.first(ticket.held, len(ticket.request.ids))
            if count < len(ticket.request.ids) - len(ticket.held.lead):
                self._started[slot] = count
        return slots, firsts

    def _extend(self) -> tuple[list[int], NewTokens]:
        """Runs the next chunk of the request that came in first; returns its slot and the token after the chunk."""
        slot, count = next(iter(self._started.items()))
        ticket = self._busy[slot]
        assert ticket is not None
        key = self._admission.extension(ticket.held, count)
        program = self._compiled.get(key) or functools.partial(self._programs.extend, key.reach)
        inputs = self._admission.chunk_inputs(ticket, slot, count)
        self._slots, first = program(self.bank.base.model, *inputs, self._slots)
        self._started[slot] = count + self._admission.chunk
        if self._started[slot] == len(ticket.request.ids) - len(ticket.held.lead):
            del self._started[slot]
        return [slot], first

    def _ticket(self, request: Request, held: DevicePrompt) -> Ticket:
        base = self.bank.base
        text_of = functools.partial(continuation_text, base.tokenizer, opens=is_opening(base, request.ids))
        ends = endings(base.tokenizer, base.end_ids + request.sampling.end_ids, request.sampling.stop)
        return Ticket(request, held, ends, text_of)

    def _take(self, slot: int, new: NewTokens, column: int) -> list[Ticket]:
        """Adds a column of new tokens to the request in a slot; if it ends, frees the slot and returns its ticket."""
        ticket = self._busy[slot]
        assert ticket is not None
        ends, checked, last = ticket.ends, len(ticket.ids), False
        ids, log_probabilities = (values[:, column].tolist() for values in (new.ids, new.log_probabilities))
        for step, (id_, log_probability) in enumerate(zip(ids, log_probabilities, strict=True)):
            if not math.isfinite(log_probability):
                ticket.error, ticket.done = overflow(self.bank.base, ticket.request.prompt), True
                self._leave(slot)
                return [ticket]
            ticket.ids.append(id_)
            ticket.log_probabilities.append(log_probability)
            if count := ticket.request.alternatives:
                likeliest = (values[step, column, :count].tolist() for values in new.likeliest)
                # A token that the base forces has no alternatives: all others have a probability of 0.
                finite = {id_: value for id_, value in zip(*likeliest, strict=True) if math.isfinite(value)}
                ticket.alternatives.append(finite)
            last = id_ in ends.ids or len(ticket.ids) == ticket.request.sampling.max_new_tokens
            if last:
                break
        end = stop_end(ticket.text_of, ticket.ids, checked, ends.texts)
        if not last and end is None:
            return []
        result = answer(ticket.text_of, ticket.ids, end, ends, ticket.log_probabilities)
        ticket.result = dataclasses.replace(result, alternatives=ticket.alternatives[: len(result.ids)])
        ticket.ids, ticket.log_probabilities = result.ids, result.log_probabilities
        ticket.alternatives = ticket.result.alternatives
        ticket.done = True
        self._leave(slot)
        return [ticket]


def _warmed(held: DevicePrompt, length: int) -> int:
    """Returns `length`, or the fewest ids of a request under this prompt if these are more."""
    return max(length, len(held.lead) + 1, held.decoder + 1)
