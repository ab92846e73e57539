"""Kernels with few bits per weight: one file per representation, registered here."""

from spt_jax.models.quantized.fp8 import Fp8
from spt_jax.models.quantized.int4 import Int4
from spt_jax.models.quantized.int8 import Int8
from spt_jax.models.quantized.kernel_array import KernelArray
from spt_jax.models.quantized.nf4 import Nf4
from spt_jax.models.quantized.table import Int8Table, TableArray

__all__ = ["KERNEL_ARRAYS", "Fp8", "Int4", "Int8", "Int8Table", "KernelArray", "Nf4", "TableArray", "quantizations"]

# By the word of `--base.quantize`.
KERNEL_ARRAYS: dict[str, type[KernelArray]] = {"int8": Int8, "int4": Int4, "nf4": Nf4, "fp8": Fp8}


def quantizations() -> tuple[str, ...]:
    """Lists what `--base.quantize` takes.

    Returns:
      The names in `KERNEL_ARRAYS`, and "keep" for matrices that are stored packed already.
    """
    return (*KERNEL_ARRAYS, "keep")
