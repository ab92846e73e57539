"""Weights of integers in groups of rows, as the devices keep them."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from spt_jax.bases.packed import Kept
from spt_jax.bases.quantized_files.stored import PackedWeight
from spt_jax.models.quantized.grouped import Grouped
from spt_jax.models.quantized.packing import pack

_KEPT_BITS = (4, 8)
# Codes uint8 [in, out], and the zero points and scales of G groups [G, out].
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of a weight.

    Attributes:
      index: int [in], the group of each row.
      count: G.
      read: returns the parts, from the tensors as stored.
    """

    index: np.ndarray
    count: int
    read: Callable[..., Parts]

    def order(self) -> np.ndarray | None:
        """Returns the rows group by group, or None if groups have different numbers of rows."""
        sizes = np.bincount(self.index, minlength=self.count)
        return np.argsort(self.index, kind="stable") if (sizes == sizes[0]).all() else None


def with_kept(weights: Mapping[str, tuple[PackedWeight, Groups | None]], bits: int) -> dict[str, PackedWeight]:
    """Returns the weights of a checkpoint, with `kept` set where the devices can keep them as `Grouped` kernels.

    If any weight has its rows in another order than its groups, all get an order, so that they can be stacked.

    Args:
      weights: all quantized weights, by name, and the groups of those that have whole groups of inputs.
      bits: of a code.
    """
    if bits not in _KEPT_BITS:
        return {name: weight for name, (weight, _) in weights.items()}
    orders = {name: None if groups is None else groups.order() for name, (_, groups) in weights.items()}
    ordered = any(order is not None and (order[1:] < order[:-1]).any() for order in orders.values())
    names = ("codes", "zero", "scale", "order") if ordered else ("codes", "zero", "scale")
    found = {}
    for name, (weight, groups) in weights.items():
        order = orders[name]
        if groups is not None and order is not None:
            arrays = partial(_arrays, groups.read, bits, order if ordered else None)
            weight = dataclasses.replace(weight, kept=Kept(Grouped, names, arrays, (("bits", bits),)))
        found[name] = weight
    return found


def _arrays(
    read: Callable[..., Parts], bits: int, order: np.ndarray | None, *stored: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the arrays of a `Grouped` kernel."""
    codes, zeros, scales = read(*stored)
    codes = codes if order is None else codes[order]
    scales = scales.astype(np.float32) if scales.dtype == np.float64 else scales
    arrays = {"codes": pack(codes) if bits == 4 else codes, "zero": zeros, "scale": scales}
    return arrays if order is None else arrays | {"order": np.argsort(order).astype(np.int32)}
