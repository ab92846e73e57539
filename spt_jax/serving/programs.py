"""The compiled functions of the engine, one set for each mesh and layout."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from spt_jax.inference.decoding import RowSampling
from spt_jax.inference.generation import cache_sharding
from spt_jax.models import memory
from spt_jax.models.attention import Prefix
from spt_jax.models.layout import Layout
from spt_jax.runtime.sharding import replicated, row_sharding
from spt_jax.serving.chunks import extend
from spt_jax.serving.lookup import verify
from spt_jax.serving.shared import empty_entries, share
from spt_jax.serving.slots import NewTokens, Slots, admit, decode, empty_slots


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled functions of `slots`, `chunks`, `lookup` and `shared`, which donate the buffers that they replace.

    Attributes:
      empty: `slots.empty_slots`.
      admit: `slots.admit`.
      extend: `chunks.extend`.
      decode: `slots.decode`.
      verify: `lookup.verify`.
      empty_entries: `shared.empty_entries`.
      share: `shared.share`.
    """

    empty: Callable[..., Slots]
    admit: Callable[..., tuple[Slots, NewTokens]]
    extend: Callable[..., tuple[Slots, NewTokens]]
    decode: Callable[..., tuple[Slots, NewTokens, jax.Array]]
    verify: Callable[..., tuple[Slots, NewTokens, jax.Array]]
    empty_entries: Callable[..., Prefix]
    share: Callable[..., Prefix]


@functools.cache
def programs_of(mesh: Mesh, layout: Layout) -> Programs:
    """Returns the compiled functions for bases of one layout.

    Args:
      mesh: the mesh of the base.
      layout: the layout of the base.

    Returns:
      The functions, whose slots are sharded by rows.
    """
    rows: Any = row_sharding(mesh)
    everywhere: Any = replicated(mesh)
    sampling: Any = RowSampling(rows, rows, rows, rows, rows)
    slots: Any = Slots(cache_sharding(mesh, layout), rows, rows, rows, rows, sampling, rows)
    heads = memory.shardings(layout.attention_groups, mesh, PartitionSpec(None, "tensor"), PartitionSpec())
    entries: Any = Prefix(heads, everywhere, everywhere, everywhere)
    return Programs(
        empty=jax.jit(empty_slots, static_argnames=("count", "capacity"), out_shardings=slots),
        admit=jax.jit(admit, donate_argnames="slots", out_shardings=(slots, everywhere)),
        extend=jax.jit(extend, static_argnames="reach", donate_argnames="slots", out_shardings=(slots, everywhere)),
        decode=jax.jit(
            decode, static_argnames="reach", donate_argnames="slots", out_shardings=(slots, everywhere, everywhere)
        ),
        verify=jax.jit(
            verify, static_argnames="reach", donate_argnames="slots", out_shardings=(slots, everywhere, everywhere)
        ),
        empty_entries=jax.jit(empty_entries, static_argnames="capacity", out_shardings=entries),
        share=jax.jit(share, donate_argnames="shared", out_shardings=entries),
    )
