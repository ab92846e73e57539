"""Tables with a row per token that are not float arrays: embeddings and output matrices."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int8, Shaped

from spt_jax.runtime.host_arrays import aligned_empty, put_on_devices
from spt_jax.runtime.sharding import fitting

# Maximum number of values that are dense at a time, in products with a whole table and while one is encoded.
CHUNK_VALUES = 2**22


class TableArray:
    """A frozen matrix [V, D] with a row per token. Subclasses are registered dataclasses whose arrays all have
    V first.

    Attributes:
      dtype: of the rows that `take` returns.
    """

    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """V and D."""
        raise NotImplementedError

    def dense(self) -> Float[Array, "*B D"]:
        """Returns the rows as a float32 array."""
        raise NotImplementedError

    def take(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Returns rows by token, in `dtype`.

        Args:
          ids: tokens in [0, V).
        """
        return jax.tree.map(lambda a: jnp.take(a, ids, axis=0), self).dense().astype(self.dtype)

    @property
    def chunk_count(self) -> int:
        """The number of chunks of at most CHUNK_VALUES values; 1 if no such number divides V."""
        vocabulary, width = self.shape
        least = math.ceil(vocabulary * width / CHUNK_VALUES)
        return next((n for n in range(least, 4 * least) if vocabulary % n == 0), 1)

    def chunk(self, index: Int[Array, ""] | int) -> Float[Array, "v D"]:
        """Returns the rows of the tokens index, index + chunk_count, ... as float32.

        Every chunk has equally many tokens from each part of the vocabulary, so that none is copied between devices.

        Args:
          index: of the chunk, in [0, chunk_count).
        """
        return jax.tree.map(lambda a: strided(a, self.chunk_count, index), self).dense()

    def products(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Returns x @ table.T in float32, with one chunk of the table dense at a time.

        Args:
          x: hidden states.
        """

        def of_chunk(index: Int[Array, ""]) -> Float[Array, "*B v"]:
            return jnp.dot(x, self.chunk(index).astype(x.dtype).T, preferred_element_type=jnp.float32)

        products = jnp.moveaxis(jax.lax.map(of_chunk, jnp.arange(self.chunk_count)), 0, -1)
        return products.reshape(*x.shape[:-1], self.shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Table(TableArray):
    """int8 values times a float32 scale per token.

    Attributes:
      values: the integers.
      scale: the scale of each of the V rows.
      dtype: of the rows that `take` returns.
    """

    values: Int8[Array, "V D"]
    scale: Float[Array, " V"]
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @classmethod
    def encode(cls, rows: Float[np.ndarray, "v D"]) -> Mapping[str, Shaped[np.ndarray, "..."]]:
        """Returns the integers and scales of some rows; the largest value of a row becomes 127.

        Args:
          rows: float32 rows in host memory.
        """
        scale = np.maximum(np.abs(rows).max(axis=1) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        return {"values": np.rint(rows / scale[:, None]).astype(np.int8), "scale": scale}

    @property
    def shape(self) -> tuple[int, int]:
        """V and D."""
        vocabulary, width = self.values.shape
        return vocabulary, width

    def dense(self) -> Float[Array, "*B D"]:
        """Returns the rows as a float32 array."""
        return self.values.astype(jnp.float32) * self.scale[..., None]


def strided(array: Shaped[Array, "V ..."], count: int, index: Int[Array, ""] | int) -> Shaped[Array, "v ..."]:
    """Returns array[index::count] for a traced index; `count` divides V."""
    chunks = array.reshape(array.shape[0] // count, count, *array.shape[1:])
    return jax.lax.dynamic_index_in_dim(chunks, index, axis=1, keepdims=False)


class TableEncoder:
    """Encodes a table a few rows at a time."""

    def __init__(self, shape: tuple[int, int], dtype: jnp.dtype):
        """Prepares for a table of this shape, whose rows are used in a dtype."""
        self._dtype = dtype
        self._arrays = {name: aligned_empty(own, kind) for name, (own, kind) in _arrays(shape).items()}

    def fill(self, table: Float[np.ndarray, "V D"]) -> None:
        """Encodes the table."""
        step = max(1, CHUNK_VALUES // table.shape[1])
        for start in range(0, table.shape[0], step):
            rows = table[start : start + step].astype(np.float32)
            for name, array in Int8Table.encode(rows).items():
                self._arrays[name][start : start + step] = array

    def placed(self, sharding: NamedSharding) -> Int8Table:
        """Returns the table on devices, given the sharding of a float table [V, D]."""
        put = {name: put_on_devices(a, _sharding(a.shape, sharding)) for name, a in self._arrays.items()}
        return Int8Table(**put, dtype=self._dtype)


def table_shapes(shape: tuple[int, int], sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a table's arrays, by the names of the fields.

    Args:
      shape: V and D.
      sharding: that of a float table [V, D].
    """
    return {
        name: jax.ShapeDtypeStruct(own, kind, sharding=_sharding(own, sharding))
        for name, (own, kind) in _arrays(shape).items()
    }


def _arrays(shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {"values": (shape, np.dtype(np.int8)), "scale": (shape[:1], np.dtype(np.float32))}


def _sharding(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    spec = (*sharding.spec, None, None)[: len(shape)]
    return fitting(sharding.mesh, PartitionSpec(*spec), shape)
