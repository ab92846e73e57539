"""Host memory of the leaves of a base's parameters, while a checkpoint is read."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from spt_jax.bases.float_values import cast_into, check_range
from spt_jax.bases.packed import Form, Kept, Packed
from spt_jax.bases.places import Place
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.quantized import Int8Table, KernelArray
from spt_jax.models.quantized.gguf_blocks import BLOCK_TYPES, GgufKernel, GgufTable, packed_units
from spt_jax.models.quantized.kernel_array import Encoder, placed_arrays
from spt_jax.models.quantized.table import TableEncoder
from spt_jax.runtime.host_arrays import aligned_empty, put_on_devices
from spt_jax.runtime.sharding import fitting


@runtime_checkable
class LeafBuffer(Protocol):
    """Memory that the tensors of a checkpoint fill, one after the other.

    Attributes:
      packed: whether `fill` needs the arrays of tensors that are stored in few bits.
    """

    packed: bool

    def fill(self, place: Place, tensor: Packed, source: str) -> None:
        """Takes what a tensor is for.

        Args:
          place: the part of the leaf that it fills.
          tensor: the tensor.
          source: its file and name, as errors begin.

        Raises:
          CheckpointError: a value is beyond the range of the leaf's dtype.
        """
        ...

    def placed(self, sharding: NamedSharding) -> jax.Array | KernelArray | Int8Table | GgufTable:
        """Returns the leaf on devices.

        Args:
          sharding: that of a leaf of floats; of a table, [V, D].
        """
        ...


@dataclasses.dataclass(frozen=True)
class Fill:
    """A tensor, or a part of one, that a leaf is made of.

    Attributes:
      place: what it fills.
      form: how it is stored.
      shape: that of the tensor.
    """

    place: Place
    form: Form
    shape: tuple[int, ...]


class FloatBuffer:
    """Implements `LeafBuffer` for a leaf of floats."""

    packed = False

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype):
        """Prepares for a leaf of this shape and dtype."""
        self._leaf = aligned_empty(shape, dtype)

    def fill(self, place: Place, tensor: Packed, source: str) -> None:
        target = place.stored(self._leaf)
        cast_into(target, place.origin.taken(tensor.values).reshape(target.shape), source)

    def placed(self, sharding: Sharding) -> jax.Array:
        return put_on_devices(self._leaf, sharding)


class KernelBuffer:
    """Implements `LeafBuffer` for a kernel [*L, D, F] that is quantized.

    Only the layers or experts that are being read are in memory as floats.
    """

    packed = False

    def __init__(self, kind: type[KernelArray], shape: tuple[int, ...], indices: Iterable[tuple[int, ...]]):
        """Prepares for tensors that are stored at these indices of the leading axes, one or more at each.

        Args:
          kind: the representation.
          shape: of the kernel.
          indices: for each tensor or part of one, the place that it fills or is a part of.
        """
        indices = list(indices)
        self._shape, self._depth = shape, min(map(len, indices))
        self._encoder = Encoder(kind, shape[:-2])
        self._missing = Counter(index[: self._depth] for index in indices)
        self._parts: dict[tuple[int, ...], np.ndarray] = {}

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        """Returns the memory of a place, to be filled."""
        key = index[: self._depth]
        if key not in self._parts:
            self._parts[key] = aligned_empty(self._shape[self._depth :], np.float32)
        return self._parts[key][index[self._depth :]]

    def fill(self, place: Place, tensor: Packed, source: str) -> None:
        target = place.stored(self)
        cast_into(target, place.origin.taken(tensor.values).reshape(target.shape), source)
        self.filled(place.index)

    def filled(self, index: tuple[int, ...]) -> None:
        """Counts a tensor; with the last one of a layer or expert, its floats are encoded and freed."""
        key = index[: self._depth]
        self._missing[key] -= 1
        if self._missing[key] == 0:
            part = self._parts.pop(key)
            for i in np.ndindex(part.shape[:-2]):
                self._encoder.add((*key, *i), part[i])

    def placed(self, sharding: NamedSharding) -> KernelArray:
        return self._encoder.placed(sharding)


class TableBuffer:
    """Implements `LeafBuffer` for a table [V, D] that becomes int8."""

    packed = False

    def __init__(self, shape: tuple[int, int], dtype: jnp.dtype):
        """Prepares for a table of this shape, whose rows are used in a dtype."""
        self._encoder = TableEncoder(shape, dtype)

    def fill(self, place: Place, tensor: Packed, source: str) -> None:
        self._encoder.fill(place.origin.taken(tensor.values))

    def placed(self, sharding: NamedSharding) -> Int8Table:
        return self._encoder.placed(sharding)


class BlockBuffer:
    """Implements `LeafBuffer` for a kernel [*L, D, F] in the blocks of a GGUF file, which stay packed."""

    packed = True

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype, kinds: Iterable[str], fills: Sequence[Fill]):
        """Prepares for tensors of these types.

        Args:
          shape: of the kernel.
          dtype: of products with it.
          kinds: names in `BLOCK_TYPES`; every type's block divides the rows.
          fills: the tensors.

        Raises:
          ConfigError: the kernel is not made of whole columns of one tensor.
        """
        self._dtype, self._columns = dtype, {fill.place.origin: _columns(fill, shape) for fill in fills}
        self._leading, (self._rows, columns) = shape[:-2], shape[-2:]
        self._kinds = tuple(sorted(set(kinds)))
        blocks = [BLOCK_TYPES[kind] for kind in self._kinds]
        unit = max(block.values for block in blocks)
        self._units = self._rows // unit, max(unit // block.values * block.size for block in blocks)
        self._blocks = aligned_empty((*self._leading, *self._units, columns), np.uint8)
        self._kind = np.empty(self._leading, np.int32)

    def fill(self, place: Place, tensor: Packed, source: str) -> None:
        assert isinstance(tensor.form, str)
        check_range(self._dtype, tensor.values, source)
        blocks = tensor.arrays["blocks"][self._columns[place.origin]]
        self._blocks[place.index] = packed_units(blocks, *self._units)
        self._kind[place.index] = self._kinds.index(tensor.form)

    def placed(self, sharding: NamedSharding) -> GgufKernel:
        """Returns the kernel on devices. Rows are split between blocks."""
        rank = len(self._leading) + 2
        *leading, rows, columns = (*sharding.spec, *(None,) * rank)[:rank]
        spec = fitting(sharding.mesh, PartitionSpec(*leading, rows, None, columns), self._blocks.shape)
        kind = fitting(sharding.mesh, PartitionSpec(*leading), self._leading)
        return GgufKernel(
            put_on_devices(self._blocks, spec), put_on_devices(self._kind, kind), kinds=self._kinds, rows=self._rows
        )


class BlockTableBuffer:
    """Implements `LeafBuffer` for a table [V, D] in the blocks of a GGUF file, which stay packed."""

    packed = True

    def __init__(self, width: int, dtype: jnp.dtype):
        """Prepares for a table of rows of this width, which are used in a dtype."""
        self._width, self._dtype = width, dtype
        self._kind, self._blocks = "", np.empty((0, 0), np.uint8)

    def fill(self, place: Place, tensor: Packed, source: str) -> None:
        assert isinstance(tensor.form, str)
        check_range(self._dtype, tensor.values, source)
        stored = tensor.arrays["blocks"]
        self._kind, self._blocks = tensor.form, aligned_empty(stored.shape, np.uint8)
        self._blocks[...] = stored

    def placed(self, sharding: NamedSharding) -> GgufTable:
        spec = fitting(sharding.mesh, PartitionSpec(*sharding.spec[:1]), self._blocks.shape)
        return GgufTable(put_on_devices(self._blocks, spec), kind=self._kind, width=self._width, dtype=self._dtype)


class KeptBuffer:
    """Implements `LeafBuffer` for a kernel [*L, D, F] of a quantized checkpoint, which stays packed."""

    packed = True

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype, form: Kept, fills: Sequence[Fill]):
        """Prepares for weights of one form.

        Args:
          shape: of the kernel.
          dtype: of products with it.
          form: that of all weights.
          fills: the weights.

        Raises:
          ConfigError: the kernel is not made of whole columns of one weight.
        """
        self._shape, self._dtype, self._form = shape, dtype, form
        self._columns = {fill.place.origin: _columns(fill, shape) for fill in fills}
        self._arrays: dict[str, np.ndarray] = {}

    def fill(self, place: Place, tensor: Packed, source: str) -> None:
        check_range(self._dtype, tensor.values, source)
        columns = self._columns[place.origin]
        for name, array in tensor.arrays.items():
            own = array if name == "order" else array[..., columns]
            if name not in self._arrays:
                leading = self._shape[: len(place.index)]
                self._arrays[name] = aligned_empty((*leading, *own.shape), own.dtype)
            others = self._arrays[name][place.index]
            if (own.shape, own.dtype) != (others.shape, others.dtype):
                raise CheckpointError(
                    f"{source}: base.quantize keep needs every {name!r} of a kernel alike, and this one has shape"
                    f" {own.shape} in {own.dtype}, others {others.shape} in {others.dtype}; set another base.quantize"
                )
            others[...] = own

    def placed(self, sharding: NamedSharding) -> KernelArray:
        arrays = placed_arrays(self._arrays, len(self._shape), sharding)
        return self._form.kind(**arrays, **dict(self._form.options))


def _columns(fill: Fill, shape: tuple[int, ...]) -> np.ndarray:
    """Returns which output features of a stored weight a kernel of this shape takes, in the kernel's order."""
    axes = (-2, -1) if fill.place.origin.transpose else (-1, -2)
    (columns, column_axes), (rows, row_axes) = (_indices(fill, axis) for axis in axes)
    first, second = (column_axes, row_axes) if axes[0] < axes[1] else (row_axes, column_axes)
    in_order = all(i < j for i in first for j in second)
    whole = np.array_equal(rows, np.arange(shape[-2])) and columns.size == shape[-1]
    if fill.place.origin.into is not None or not in_order or not whole:
        raise _unsupported(fill.place, "columns are not the output features of one matrix")
    return columns


def _indices(fill: Fill, axis: int) -> tuple[np.ndarray, list[int]]:
    """Returns the indices along an axis of a tensor that a leaf takes, and the axes of the view that have them."""
    indices = np.arange(fill.shape[axis]).reshape(-1, *(1,) * (-1 - axis))
    taken = fill.place.origin.taken(np.broadcast_to(indices, fill.shape))
    axes = [i for i in range(taken.ndim) if taken.shape[i] > 1 and taken.strides[i]]
    return taken[tuple(slice(None) if i in axes else 0 for i in range(taken.ndim))].reshape(-1), axes


def kept_kernel(shape: tuple[int, ...], dtype: jnp.dtype, fills: Sequence[Fill]) -> LeafBuffer:
    """Returns memory for a kernel that stays packed.

    Args:
      shape: of the kernel.
      dtype: of products with it.
      fills: the tensors that it is made of.

    Raises:
      ConfigError: their forms cannot be kept together, or they are stored in another order.
    """
    first = fills[0].form
    if isinstance(first, Kept) and all(isinstance(fill.form, Kept) and first.matches(fill.form) for fill in fills):
        return KeptBuffer(shape, dtype, first, fills)
    return BlockBuffer(shape, dtype, _block_types(fills), fills)


def kept_table(shape: tuple[int, int], dtype: jnp.dtype, fills: Sequence[Fill]) -> LeafBuffer:
    """Returns memory for a table of a GGUF file that stays packed.

    Args:
      shape: V and D.
      dtype: of the rows when they are used.
      fills: the tensor that it is made of.

    Raises:
      ConfigError: its form cannot be kept, or only a part of it is taken.
    """
    _block_types(fills)
    if any(fill.place.origin.take or fill.place.origin.view or fill.place.origin.into for fill in fills):
        raise _unsupported(fills[0].place, "rows are not those of the table")
    return BlockTableBuffer(shape[1], dtype)


def _block_types(fills: Sequence[Fill]) -> list[str]:
    """Returns the types of tensors in blocks, after checking that they can stay so."""
    kinds = [fill.form for fill in fills if isinstance(fill.form, str) and fill.form in BLOCK_TYPES]
    if len(kinds) < len(fills):
        names = ", ".join(sorted({_name(fill.form) for fill in fills}))
        raise ConfigError(
            f"base.quantize keep: {'/'.join(fills[0].place.path)} is stored as {names}; kept are"
            f" {', '.join(BLOCK_TYPES)}, and weights of quantized checkpoints of 4 or 8 bits with a scale for each of"
            " some equally large groups of the inputs of an output feature, all layers alike. Set another base.quantize"
        )
    return kinds


def _name(form: Form) -> str:
    """Returns a form in words."""
    return form if isinstance(form, str) else "floats" if form is None else form.kind.__name__


def _unsupported(place: Place, why: str) -> ConfigError:
    return ConfigError(
        f"base.quantize keep does not support tensors like {place.origin.key!r}, whose {why}; set another"
        " base.quantize, such as int8"
    )
