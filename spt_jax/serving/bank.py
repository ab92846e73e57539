"""Prompts by name: trained arrays on the host, and the memory that requests share on the device."""

import collections
import dataclasses
import itertools
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.fingerprint import accepting_floats, quantization_note
from spt_jax.data.batches import round_up
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import CheckpointError, ConfigError, did_you_mean
from spt_jax.inference.generation import BUCKET, programs
from spt_jax.inference.two_sides import decoder_length
from spt_jax.interop.peft import CONFIG_FILE as PEFT_CONFIG
from spt_jax.interop.peft import default_template, import_peft
from spt_jax.models import memory
from spt_jax.models.attention import Prefix
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import SavedPrompt, load_prompt
from spt_jax.prompts.virtual import VirtualPrompt, parts_of
from spt_jax.runtime.sharding import replicated


@dataclasses.dataclass(frozen=True)
class DevicePrompt:
    """The arrays that a prompt's requests share, on the device.

    Lengths are rounded up, so that a few compiled programs serve all prompts.

    Attributes:
      prefix: the memory of the prompt and of the leading ids of its template; padding has the position NEVER.
      virtual: the other parts of the prompt: rows for later virtual ids, shifts, other embeddings, gates, maps, edits,
        a head.
      rows: the number of virtual ids, including those among the leading ids.
      lead: the leading ids.
      start: the position after them.
      decoder: of an encoder-decoder, the number of ids of the template that its decoder reads, with its start token.
      number: that of the prompt's entry in its bank.
    """

    prefix: Prefix | None
    virtual: VirtualPrompt | None
    rows: int
    lead: np.ndarray
    start: int
    decoder: int = 1
    number: int = 0

    @property
    def generates(self) -> bool:
        """Whether requests can share a decode step: they have only token rows and a prefix."""
        return can_generate(self.virtual)

    @property
    def bytes(self) -> int:
        """Size on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.prefix, self.virtual)))


_NOT_DECODED = {
    "shift": "an embedding shift",
    "replaced": "replaced embeddings",
    "gated": "a gated prefix",
    "linear": "a linear memory",
    "edits": "edits of hidden states",
    "head": "a head",
}


def not_decoded(virtual: VirtualPrompt | None) -> list[str]:
    """Returns what a prompt has that the server cannot generate with: a decode step has only the prompt's memory."""
    parts = () if virtual is None else parts_of(virtual)
    return [_NOT_DECODED[name] for name in parts if name in _NOT_DECODED]


def can_generate(virtual: VirtualPrompt | None) -> bool:
    """Whether the server can generate under a prompt."""
    return not not_decoded(virtual)


class UnknownPromptError(ConfigError):
    """There is no prompt with this name."""


NOTHING = DevicePrompt(None, None, 0, np.zeros(0, np.int32), 0)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A prompt of the bank: its arrays on the host, and the template and encoder that read requests.

    Its number is that of no other entry, such as one that it replaces.
    """

    virtual: VirtualPrompt | None
    template: Template
    encoder: Encoder
    number: int = dataclasses.field(default_factory=itertools.count(1).__next__)

    @property
    def bytes(self) -> int:
        """Size of the trained arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.virtual))

    @property
    def positions(self) -> int:
        """The number of positions that all requests share: those of a prefix and of the leading ids of the template."""
        return (0 if self.virtual is None else self.virtual.prefix_length) + len(self.encoder.fixed_lead())

    @property
    def generates(self) -> bool:
        """Whether the server generates text under this prompt."""
        return not self.template.verbalizers and self.template.reads is None and can_generate(self.virtual)

    @property
    def classifies(self) -> bool:
        """Whether its template classifies whole records."""
        return bool(self.template.verbalizers) and self.template.reads is None

    @property
    def kind(self) -> tuple[Any, ...]:
        """A key that is equal for prompts that use the same compiled programs."""
        leaves, structure = jax.tree.flatten(self.virtual)
        sizes = (len(self.encoder.fixed_lead()), *(size for leaf in leaves for size in leaf.shape))
        return structure, tuple(round_up(size, BUCKET) for size in sizes)


class PromptBank:
    """The prompts of one base.

    If the prompts on the device exceed the budget, the least recently used ones are removed from the device.
    All methods are thread-safe.
    """

    def __init__(self, base: FrozenBase, *, budget_bytes: int | None = None):
        """Creates an empty bank.

        Args:
          base: the frozen base.
          budget_bytes: device memory for prefixes and rows; None for no limit.
        """
        self.base = base
        self._budget = budget_bytes
        self._entries: dict[str | None, Entry] = {}
        self._held: collections.OrderedDict[str, DevicePrompt] = collections.OrderedDict()
        self._bytes = 0
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._chat: Entry | None = None
        if not base.layout.generates:
            return  # An encoder answers nothing without a prompt.
        self._entries[None] = self._entry(Template(prompt="{text}", target="{target}"), None)
        if base.tokenizer.chat_template and not base.layout.encodes:
            self._chat = self._entry(Template(prompt=f"{{{MESSAGES}}}"), None)

    @property
    def names(self) -> list[str]:
        """Returns the names of the prompts, sorted, without the bare base."""
        with self._lock:
            return sorted(name for name in self._entries if name is not None)

    @property
    def device_bytes(self) -> int:
        """Size of the prompts that are on the device now."""
        return self._bytes

    def load(self, name: str, folder: Path) -> None:
        """Loads a prompt directory of this library or of PEFT; in a PEFT prompt, the text follows the virtual tokens.

        Args:
          name: the name to serve it under.
          folder: the directory.

        Raises:
          CheckpointError: the directory is damaged or for another base, a head's classes have no names, or the
            template is not valid text or too long for the base.
        """
        if (folder / PEFT_CONFIG).exists():
            method, virtual = import_peft(folder, self.base)
            if virtual.head is not None:
                raise CheckpointError(
                    f"{folder}: a PEFT head has no class names; use `spt-jax import` with --verbalizers"
                )
            prompt = default_template(self.base, method)
            self._put(name, virtual, Template(prompt=prompt, target="{target}", virtual_tokens=method.token_count))
        else:
            self.add(name, load_prompt(folder, self.base))

    def add(self, name: str, saved: SavedPrompt) -> None:
        """Adds a prompt, or replaces the one with this name. Nothing is computed yet.

        Args:
          name: the name to serve it under.
          saved: the prompt.

        Raises:
          CheckpointError: it is for another base, or its template is not valid text or too long for the base.
        """
        differences = accepting_floats(saved.fingerprint, self.base.fingerprint).differences(self.base.fingerprint)
        if differences:
            raise CheckpointError(f"prompt {name!r} is for another base: {'; '.join(differences)}")
        note = quantization_note(saved.fingerprint, self.base.fingerprint)
        if note:  # without the name, so that it appears once
            warnings.warn(f"prompts were {note}", stacklevel=2)
        self._put(name, saved.virtual, saved.template)

    def _put(self, name: str, virtual: VirtualPrompt, template: Template) -> None:
        texts = [template.prompt, template.target, template.system or "", *template.verbalizers.values()]
        if not all(map(_is_text, texts)):
            raise CheckpointError(
                f"prompt {name!r}: its template has half of a surrogate pair, which is not a character"
            )
        if virtual.instance is not None:
            raise CheckpointError(
                f"prompt {name!r} has virtual tokens that depend on each input, so requests cannot share its memory,"
                " which the server keeps; use it with spt_jax.load_prompt or the commands that read files"
            )
        # On the host: the arrays on the device are made at the first request.
        entry = self._entry(template, jax.tree.map(np.asarray, virtual))
        self._check_length(name, entry)
        with self._lock:
            self._entries[name] = entry
            self._forget(name)

    def _check_length(self, name: str, entry: Entry) -> None:
        """Checks that the template with empty fields leaves a position for an answer."""
        template, positions = entry.template, self.base.layout.max_positions
        if template.is_conversation:
            return  # a chat template may reject an empty chat
        ids = _without_text(entry)
        taken = len(ids) + (0 if entry.virtual is None else entry.virtual.prefix_length)
        if taken >= positions:
            raise CheckpointError(
                f"prompt {name!r}: its template takes {taken} positions without any text, but the base has {positions}"
            )

    def _forget(self, name: str) -> None:
        held = self._held.pop(name, None)
        self._bytes -= 0 if held is None else held.bytes

    def _entry(self, template: Template, virtual: VirtualPrompt | None) -> Entry:
        taken = 0 if virtual is None else virtual.prefix_length
        return Entry(virtual, template, encoder_for(self.base, template, taken=taken))

    def remove(self, name: str) -> None:
        """Removes a prompt. Running requests are not affected.

        Args:
          name: the prompt's name.

        Raises:
          UnknownPromptError: there is no prompt with this name.
        """
        self.entry(name)
        with self._lock:
            self._entries.pop(name, None)
            self._forget(name)

    def request_ids(self, name: str | None, record: Mapping[str, Any]) -> np.ndarray:
        """Returns the ids of a record under the prompt's template; the bare base reads {text}, or {messages} as a chat.

        Args:
          name: the prompt's name; None for the bare base.
          record: the values of the template's fields.

        Raises:
          ConfigError: there is no prompt with this name, or the record is a chat and the base has no chat template.
          DataError: the record lacks a field.
        """
        return self.encoder(name, record).prompt_ids(record)

    def encoder(self, name: str | None, record: Mapping[str, Any]) -> Encoder:
        """Returns the prompt's encoder, or for the bare base its encoder for texts or for chats.

        Args:
          name: the prompt's name; None for the bare base.
          record: the values of the template's fields.

        Raises:
          ConfigError: as in `request_ids`.
        """
        if name is not None or MESSAGES not in record:
            return self.entry(name).encoder
        if self._chat is None:
            raise ConfigError("the base's tokenizer has no chat template")
        return self._chat.encoder

    def held(self, name: str | None) -> DevicePrompt:
        """Returns the arrays that requests under this prompt share, and computes them if they are not on the device.

        Args:
          name: the prompt's name; None for the bare base.

        Raises:
          UnknownPromptError: there is no prompt with this name.
        """
        return self.take(name)[1]

    def take(self, name: str | None) -> tuple[Entry, DevicePrompt]:
        """Returns a prompt and its shared arrays, which match even if the prompt is replaced meanwhile.

        Args:
          name: the prompt's name; None for the bare base.

        Raises:
          UnknownPromptError: there is no prompt with this name.
        """
        entry = self.entry(name)
        return entry, NOTHING if name is None else self._held_of(name, entry)

    def _held_of(self, name: str, entry: Entry) -> DevicePrompt:
        held = self._found(name, entry)
        if held is None:
            with self._making:
                held = self._found(name, entry)
                if held is None:
                    assert entry.virtual is not None
                    new = len(entry.encoder.template.new_tokens)
                    held = hold(self.base, entry.virtual, entry.encoder.fixed_lead(), new)
                    held = dataclasses.replace(held, number=entry.number)
                    if (start := self.base.layout.start_id) is not None:
                        count = decoder_length(_without_text(entry), start)
                        held = dataclasses.replace(held, decoder=count)
        with self._lock:
            if self._entries.get(name) is not entry:
                return held  # replaced meanwhile; this request still uses the old one
            if name not in self._held:
                self._held[name] = held
                self._bytes += held.bytes
            self._held.move_to_end(name)
            while self._budget is not None and len(self._held) > 1 and self._bytes > self._budget:
                self._bytes -= self._held.popitem(last=False)[1].bytes
        return held

    def _found(self, name: str, entry: Entry) -> DevicePrompt | None:
        with self._lock:
            return self._held.get(name) if self._entries.get(name) is entry else None

    def entry(self, name: str | None) -> Entry:
        """Returns the prompt with this name; None is the bare base.

        Args:
          name: the prompt's name.

        Raises:
          UnknownPromptError: there is no prompt with this name.
        """
        with self._lock:
            if name in self._entries:
                return self._entries[name]
        if name is None:
            raise UnknownPromptError("the base is an encoder, which answers nothing without a prompt; name a prompt")
        raise UnknownPromptError(f"there is no prompt {name!r}; {did_you_mean(str(name), self.names)}")


def _without_text(entry: Entry) -> np.ndarray:
    """Returns the ids of a prompt whose fields are empty."""
    return entry.encoder.prompt_ids(dict.fromkeys(entry.template.prompt_fields, ""))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def overflow(base: FrozenBase, name: str | None) -> ConfigError:
    """Returns the error for values that are not finite."""
    source = "the bare base" if name is None else f"prompt {name!r}"
    return ConfigError(f"{source} produces values that overflow {jnp.dtype(base.dtype).name}; use another dtype")


def hold(base: FrozenBase, virtual: VirtualPrompt, lead: np.ndarray, new_tokens: int = 0) -> DevicePrompt:
    """Runs a prompt and the leading ids of its template through the base.

    Args:
      base: the frozen base.
      virtual: the prompt.
      lead: the leading ids.
      new_tokens: the number of new tokens, which may also occur after the leading ids.
    """
    padded = jax.device_put(_padded(stack_prompts([virtual])), replicated(base.mesh))
    first = virtual.prefix_length
    prefix = None
    if len(lead) or virtual.prefix is not None:
        ids = np.zeros((1, round_up(len(lead), BUCKET)), np.int32)
        ids[0, : len(lead)] = lead
        encode = programs(base.mesh, base.layout).encode_leads
        prefix = encode(base.model, padded, ids, np.asarray([len(lead)], np.int32))
        prefix = jax.tree.map(lambda array: array[0], prefix)
    count = 0 if virtual.tokens is None else virtual.tokens.shape[0]
    all_in_lead = not new_tokens and count == int((lead >= base.layout.vocab_size).sum())
    remaining = dataclasses.replace(padded, prefix=None, tokens=None if all_in_lead else padded.tokens)
    remaining = jax.tree.map(lambda array: array[0], remaining) if jax.tree.leaves(remaining) else None
    return DevicePrompt(prefix, remaining, count, lead, first + len(lead))


def _padded(virtual: VirtualPrompt) -> VirtualPrompt:
    """Pads stacked rows and prefixes to a multiple of `BUCKET`; the caller knows the true lengths."""

    def missing(length: int) -> int:
        return round_up(length, BUCKET) - length

    tokens, prefix = virtual.tokens, virtual.prefix
    if prefix is not None:
        padded = memory.pad(prefix.memory, missing(virtual.prefix_length))
        prefix = dataclasses.replace(prefix, memory=padded)
    if tokens is not None:
        tokens = jnp.pad(tokens, [(0, 0), (0, missing(tokens.shape[1])), (0, 0)])
    return dataclasses.replace(virtual, tokens=tokens, prefix=prefix)
