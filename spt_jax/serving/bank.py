"""Prompts by name: what their files hold is on the host, the keys and values that requests begin with on the device."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.base import FrozenBase
from spt_jax.data.batches import round_up
from spt_jax.data.encoder import Encoder
from spt_jax.errors import CheckpointError, ConfigError, did_you_mean
from spt_jax.generation import BUCKET, programs
from spt_jax.models.attention import Prefix
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import SavedPrompt
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.sharding import replicated


@dataclasses.dataclass(frozen=True)
class Held:
    """What a prompt's requests share, on the device. Lengths are rounded up, so that few programs serve all prompts.

    prefix: keys and values of the prompt and of the leading ids of its template; padding stands at NEVER.
    virtual: rows for virtual ids further on.
    rows: how many of those are real.
    lead: the leading ids.
    start: the position behind them.
    """

    prefix: Prefix | None
    virtual: VirtualPrompt | None
    rows: int
    lead: np.ndarray
    start: int

    @property
    def bytes(self) -> int:
        """On the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.prefix, self.virtual)))


NOTHING = Held(None, None, 0, np.zeros(0, np.int32), 0)


class PromptBank:
    """The prompts of one base. The least recently used leave the device where all together would not fit a budget."""

    def __init__(self, base: FrozenBase, *, budget_bytes: int | None = None):
        """budget_bytes: for keys, values and rows on the device; None for no limit."""
        self.base = base
        self._budget = budget_bytes
        self._saved: dict[str, tuple[SavedPrompt, Encoder]] = {}
        self._held: collections.OrderedDict[str, Held] = collections.OrderedDict()

    @property
    def names(self) -> list[str]:
        return sorted(self._saved)

    @property
    def device_bytes(self) -> int:
        """Of the prompts that are on the device now."""
        return sum(held.bytes for held in self._held.values())

    def add(self, name: str, saved: SavedPrompt) -> None:
        """Takes a prompt in, or another one under a name that there is. Nothing is computed yet.

        Raises:
          CheckpointError: it is for another base.
          ConfigError: it is more than virtual tokens, or keys and values.
        """
        differences = saved.fingerprint.differences(self.base.fingerprint)
        if differences:
            raise CheckpointError(f"prompt {name!r} is for another base: {'; '.join(differences)}")
        virtual = saved.virtual
        if any(part is not None for part in (virtual.shift, virtual.gated, virtual.head)):
            raise ConfigError(
                f"prompt {name!r} has shifts, gates or a head; requests share tokens, keys and values alone"
            )
        base = self.base
        positions = base.config.max_positions - virtual.prefix_length
        encoder = Encoder(saved.template, base.tokenizer, base.config.vocab_size, positions)
        self._held.pop(name, None)
        # On the host: what requests need of it is made on the device when they come.
        self._saved[name] = dataclasses.replace(saved, virtual=jax.tree.map(np.asarray, virtual)), encoder

    def remove(self, name: str) -> None:
        """Forgets a prompt. Requests under way keep what they have of it.

        Raises:
          ConfigError: there is none of this name.
        """
        self._known(name)
        self._held.pop(name, None)
        del self._saved[name]

    def request_ids(self, name: str, record: Mapping[str, Any]) -> np.ndarray:
        """A record's ids, as the prompt's template reads it.

        Raises:
          ConfigError: there is no prompt of this name.
          DataError: the record lacks a field.
        """
        return self._known(name)[1].prompt_ids(record)

    def held(self, name: str | None) -> Held:
        """What requests under this prompt share, made if it is not on the device; None names the bare base.

        Raises:
          ConfigError: there is no prompt of this name.
        """
        if name is None:
            return NOTHING
        if name not in self._held:
            saved, encoder = self._known(name)
            self._held[name] = hold(self.base, saved.virtual, encoder.fixed_lead())
        self._held.move_to_end(name)
        while self._budget is not None and len(self._held) > 1 and self.device_bytes > self._budget:
            self._held.popitem(last=False)
        return self._held[name]

    def _known(self, name: str) -> tuple[SavedPrompt, Encoder]:
        if name not in self._saved:
            raise ConfigError(f"there is no prompt {name!r}; {did_you_mean(name, self._saved)}")
        return self._saved[name]


def hold(base: FrozenBase, virtual: VirtualPrompt, lead: np.ndarray) -> Held:
    """Runs a prompt and the leading ids of its template through the base."""
    padded = jax.device_put(_padded(stack_prompts([virtual])), replicated(base.mesh))
    first = virtual.prefix_length
    rows = None if padded.tokens is None else VirtualPrompt(tokens=padded.tokens[0])
    prefix = None
    if len(lead) or first:
        ids = np.zeros((1, round_up(len(lead), BUCKET)), np.int32)
        ids[0, : len(lead)] = lead
        encode = programs(base.mesh).encode_leads
        prefix = encode(base.module, base.params, padded, ids, np.asarray([len(lead)], np.int32))
        prefix = jax.tree.map(lambda array: array[0], prefix)
    count = 0 if virtual.tokens is None else virtual.tokens.shape[0]
    return Held(prefix, rows, count, lead, first + len(lead))


def _padded(virtual: VirtualPrompt) -> VirtualPrompt:
    """Rows, keys and values up to a multiple of `BUCKET`; how many of them are real is said elsewhere."""

    def up(array: Any, axis: int) -> Any:
        missing = round_up(array.shape[axis], BUCKET) - array.shape[axis]
        return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)])

    prefix = virtual.prefix
    if prefix is not None:
        prefix = dataclasses.replace(prefix, keys=up(prefix.keys, 2), values=up(prefix.values, 2))
    tokens = None if virtual.tokens is None else up(virtual.tokens, 1)
    return VirtualPrompt(tokens=tokens, prefix=prefix)
