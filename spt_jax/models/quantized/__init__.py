"""Kernels with few bits per weight: one file per representation, registered here."""

from spt_jax.models.quantized.int8 import Int8
from spt_jax.models.quantized.kernel_array import KernelArray

__all__ = ["KERNEL_ARRAYS", "Int8", "KernelArray"]

# By the word of `--base.quantize`.
KERNEL_ARRAYS: dict[str, type[KernelArray]] = {"int8": Int8}
