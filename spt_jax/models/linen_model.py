"""What models of Linen modules with one embedding table and one output matrix share."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from spt_jax.models.model import Params
from spt_jax.models.output_matrix import matrix_rows
from spt_jax.models.quantized import TableArray
from spt_jax.runtime.sharding import to_host

Own = TypeVar("Own", bound="LinenModel")


class LinenModel:
    """Base class of frozen dataclasses with the fields `params` and `module`.

    The config of the module has the fields `tied` and `logit_bias`.
    """

    params: Params
    module: Any

    @property
    def dtype(self) -> jnp.dtype:
        return self.params["embedding"].dtype

    @property
    def mesh(self) -> Mesh | None:
        return self.module.mesh

    def with_options(self: Own, **options: Any) -> Own:
        """Returns the same weights in a module with other options: fields of the module, such as `mesh` or `remat`."""
        return dataclasses.replace(self, module=self.module.clone(**options))  # type: ignore[type-var]

    @property
    def input_matrix(self) -> Float[Array, "V D"] | TableArray:
        """The embedding table as stored."""
        return self.params["embedding"]

    @property
    def output_matrix(self) -> Float[Array, "V D"] | TableArray:
        """The matrix that maps hidden states to logits; the embedding table if they are tied."""
        matrix, tied = self._stored_output()
        return matrix if tied or isinstance(matrix, TableArray) else matrix.T

    def _output_rows(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Returns rows of `output_matrix`, without a transposed copy of it."""
        matrix, tied = self._stored_output()
        return matrix_rows(matrix, ids, by_token=tied)

    def _logit_bias(self) -> Float[Array, " V"] | None:
        """Returns the bias of the logits, float32, without a gradient; None for none."""
        if not self.module.config.logit_bias:
            return None
        return jax.lax.stop_gradient(self.params["logit_bias"].astype(jnp.float32))

    def _stored_output(self) -> tuple[Any, bool]:
        tied = self.module.config.tied
        return self.params["embedding" if tied else "output"], tied

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.apply({"params": self.params}, *args, **kwargs)


def host_table(table: Float[Array, "V D"] | TableArray) -> Float[np.ndarray, "V D"]:
    """Returns an embedding table or output matrix in host memory, as float32; it may be the memory of the device."""
    if isinstance(table, TableArray):
        chunks = [to_host(table.chunk(i)) for i in range(table.chunk_count)]
        return np.stack(chunks, axis=1).reshape(table.shape)
    return to_host(table).astype(np.float32, copy=False)
