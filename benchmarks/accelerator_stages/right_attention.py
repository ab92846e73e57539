"""Compares the device's fused attention with plain attention in float32, forward and backward."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Skip
from benchmarks.accelerator_stages.right_models import (
    accelerator,
    cpu,
    differences,
    figures,
    moved_base,
    on_device,
    prompt_batch,
    reference_base,
)
from spt_jax.models.attention import Source, Stream, attend, visible, within_window
from spt_jax.prompts import PromptTuning
from spt_jax.runtime.sharding import make_mesh
from spt_jax.training.objectives import CrossEntropy
from tests.examples import VIRTUAL
from tests.family import moved_params

BOUNDS = {"output": 0.02, "gradient": 0.03}  # relative to the largest number, bfloat16 against float32
B, T, P, WINDOW = 2, 75, 21, 11
# Query heads, key/value heads and head size of each case. The lengths are odd, so the kernel's backward pass must pad
# them.
CASES: dict[str, tuple[int, int, int]] = {
    "shared prefix": (4, 4, 64),
    "grouped queries": (6, 2, 128),
    "windows": (4, 2, 64),
    "packing": (4, 2, 64),
}


def fused() -> Any:
    """Returns the fused kernel of the device.

    Raises:
      Skip: the device has none.
    """
    kernel = device.fused_kernel()
    if kernel == "xla":
        raise Skip(f"needs a GPU or TPU; this is a {jax.default_backend()}")
    return kernel


def streams(case: str) -> Stream:
    """Returns rows of one text, or of three consecutive texts and padding."""
    if case != "packing":
        positions = np.broadcast_to(P + np.arange(T), (B, T))
        return Stream(jnp.asarray(positions), jnp.ones((B, T), jnp.int32), jnp.zeros((B, T), jnp.int32))
    lengths = (30, 20, 15)
    positions, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        positions[:, start : start + length] = P + np.arange(length)
        segments[:, start : start + length] = number
        start += length
    return Stream(jnp.asarray(positions), jnp.asarray(segments), jnp.zeros((B, T), jnp.int32))


def inputs_of(case: str) -> tuple[Any, ...]:
    """Returns queries, a shared prefix's keys and values, the rows' own keys and values, and a cotangent, float32."""
    heads, kv_heads, size = CASES[case]
    random = np.random.default_rng(0)
    shapes = ((B, T, heads, size), *[(P, kv_heads, size)] * 2, *[(B, T, kv_heads, size)] * 2, (B, T, heads, size))
    return tuple(random.standard_normal(shape).astype(np.float32) for shape in shapes)


def output_and_gradients(case: str, kernel: Any, place: Any, dtype: Any) -> Any:
    """Returns the output of attention and the gradients of its five inputs, float32 on the host."""
    mesh = make_mesh(devices=[place])
    stream = streams(case)
    prefix = jnp.broadcast_to(jnp.arange(P)[None], (B, P))
    masks = [visible(stream, prefix, None), visible(stream, stream.positions, stream.segments)]
    if case == "windows":
        windows = [within_window(stream, positions, WINDOW) for positions in (prefix, stream.positions)]
        masks = [mask & window for mask, window in zip(masks, windows, strict=True)]
    seen = (stream.segments > 0).astype(jnp.float32)[:, :, None, None]  # outputs at padding are meaningless

    def attention(queries: Any, keys: Any, values: Any, own_keys: Any, own_values: Any) -> Any:
        sources = [Source(keys, values, masks[0]), Source(own_keys, own_values, masks[1])]
        return attend(queries, sources, kernel=kernel, mesh=mesh)

    def both(cotangent: Any, *inputs: Any) -> Any:
        out, pull = jax.vjp(attention, *(array.astype(dtype) for array in inputs))
        slopes = pull((cotangent * seen).astype(dtype))
        return jax.tree.map(lambda array: array.astype(jnp.float32), (out * seen.astype(dtype), slopes))

    *inputs, cotangent = inputs_of(case)
    return jax.tree.map(np.asarray, jax.jit(both)(*jax.device_put((cotangent, *inputs), place)))


def attention(case: str, kernel: Any = None) -> Mapping[str, float]:
    """Checks one case; `kernel` defaults to the device's."""
    kernel = kernel or fused()
    with on_device(cpu()):
        expected, theirs = output_and_gradients(case, "xla", cpu(), jnp.float32)
    with jax.default_device(accelerator()):
        out, slopes = output_and_gradients(case, kernel, accelerator(), jnp.bfloat16)
    pairs = zip(slopes, theirs, strict=True)
    return {
        "output": float(np.abs(out - expected).max() / np.abs(expected).max()),
        "gradient": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs),
    }


def model(kernel: Any = None) -> Mapping[str, float]:
    """Checks a complete model with a sliding window and grouped queries, whose prompt is trained."""
    kernel, method = kernel or fused(), PromptTuning(length=VIRTUAL)
    reference = reference_base("mistral", head_dim=64)
    with on_device(cpu()):
        params = jax.tree.map(np.asarray, moved_params(method, reference))
    base = moved_base(reference, accelerator(), dtype="bfloat16", attention=kernel)
    ours, theirs = (figures(one, method, CrossEntropy(), params, prompt_batch(one, True)) for one in (base, reference))
    return differences(ours, theirs)
