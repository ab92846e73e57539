"""Stacks several soft prompts, for calls whose rows have different prompts."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from spt_jax.errors import ConfigError
from spt_jax.models import memory
from spt_jax.models.attention import GatedPrefix, LinearMemory
from spt_jax.models.edits import HiddenEdits
from spt_jax.prompts.virtual import Head, ReplacedRows, VirtualPrefix, VirtualPrompt


def stack_prompts(prompts: Sequence[VirtualPrompt]) -> VirtualPrompt:
    """Stacks S prompts, of any methods and lengths, along a new leading S axis.

    A part that only some of the prompts have is padded for the others: with token rows that no template uses, with an
    empty prefix, a gate of 0, maps or edits of zeros, or embeddings of no id.

    Args:
      prompts: prompts of one frozen base.

    Returns:
      The prompts as one, for `prompt_index`.

    Raises:
      ConfigError: there are no prompts; only some have a head, or their heads have different numbers of classes; gated
        prefixes differ in length; the virtual tokens of one depend on each input; or the prompts are for bases of
        different sizes.
    """
    if not prompts:
        raise ConfigError("there are no prompts to stack")
    if any(p.instance is not None for p in prompts):
        raise ConfigError(
            "the virtual tokens of a lopa prompt depend on each input, so it cannot be stacked with others, or served"
        )
    # Hidden states may be wider than embeddings, as in ALBERT.
    of_tokens = {p.tokens.shape[-1] for p in prompts if p.tokens is not None}
    of_heads = {p.head.kernel.shape[0] for p in prompts if p.head is not None}
    for sizes in (of_tokens, of_heads):
        if len(sizes) > 1:
            raise ConfigError(f"these prompts are for bases of different width: {sorted(sizes)}")
    return VirtualPrompt(
        tokens=memory.stack_padded([p.tokens for p in prompts], axis=0),
        shift=memory.stack_padded([p.shift for p in prompts], axis=0),
        prefix=_stacked_prefix([p.prefix for p in prompts]),
        gated=_stacked_gated([p.gated for p in prompts]),
        linear=_stacked_linear([p.linear for p in prompts]),
        edits=_stacked_edits([p.edits for p in prompts]),
        replaced=_stacked_replaced([p.replaced for p in prompts]),
        head=_stacked_head([p.head for p in prompts]),
        pinned=_stacked_pins([p.pinned for p in prompts]),
    )


def _stacked_pins(pins: Sequence[bool | tuple[bool, ...]]) -> bool | tuple[bool, ...]:
    flags = tuple(pin is True for pin in pins)
    return flags[0] if len(set(flags)) == 1 else flags


def _stacked_prefix(parts: Sequence[VirtualPrefix | None]) -> VirtualPrefix | None:
    if not any(parts):
        return None
    lengths = [0 if part is None else memory.length(part.memory) for part in parts]
    stacked = memory.stack_prompts([part and part.memory for part in parts])
    return VirtualPrefix(stacked, jnp.asarray(lengths, jnp.int32))


def _stacked_gated(parts: Sequence[GatedPrefix | None]) -> GatedPrefix | None:
    if not any(parts):
        return None
    # Gated prefixes end at the last layer, so missing layers are padded at the front. `rows` is only used in files.
    gates = memory.stack_padded([part and part.gates for part in parts], axis=0, at_end=False)
    assert gates is not None
    return GatedPrefix(memory.stack_last_layers([part and part.memory for part in parts]), gates)


def _stacked_linear(parts: Sequence[LinearMemory | None]) -> LinearMemory | None:
    groups = sorted({name for part in parts if part is not None for name in part.maps})
    maps = {name: memory.stack_padded([part and part.maps.get(name) for part in parts], axis=0) for name in groups}
    return LinearMemory({name: own for name, own in maps.items() if own is not None}) if any(parts) else None


def _stacked_edits(parts: Sequence[HiddenEdits | None]) -> HiddenEdits | None:
    def stacked(name: str, axis: int) -> Any:
        return memory.stack_padded([None if part is None else getattr(part, name) for part in parts], axis=axis)

    # Smaller ranks are padded with zeros.
    return HiddenEdits(stacked("down", 2), stacked("bias", 1), stacked("up", 1)) if any(parts) else None


def _stacked_replaced(parts: Sequence[ReplacedRows | None]) -> ReplacedRows | None:
    rows = memory.stack_padded([part and part.rows for part in parts], axis=0)
    # Padding is zeros, and the id of padding is -1.
    ids = memory.stack_padded([None if part is None else part.ids + 1 for part in parts], axis=0)
    return None if rows is None or ids is None else ReplacedRows(rows, ids - 1)


def _stacked_head(parts: Sequence[Head | None]) -> Head | None:
    if not any(parts):
        return None
    if not all(parts):
        raise ConfigError("some of these prompts have a head and others do not; evaluate them separately")
    kernel, bias = (memory.stack_padded([getattr(part, name) for part in parts], axis=0) for name in ("kernel", "bias"))
    assert kernel is not None and bias is not None
    return Head(kernel, bias)
