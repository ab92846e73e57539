"""Fused attention, which never holds the full score matrix: cuDNN on NVIDIA GPUs, splash attention on TPUs.

All sources of keys are concatenated under one mask, so that the gradients of the kernels are correct; results are not
merged by log-sum-exp.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig, layer_configs
from spt_jax.runtime import measure
from spt_jax.runtime.sharding import ROWS, fitting

Kernel = Literal["xla", "cudnn", "splash"]
KernelChoice = Literal["auto", "xla", "cudnn", "splash"]
FUSED: dict[str, Kernel] = {"gpu": "cudnn", "tpu": "splash"}  # by platform
_LANES = 128  # TPU kernels need lengths that are multiples of this.
_TOLERANCE = 0.05  # Maximum relative error in a trial; with 16-bit dtypes it is about 0.01.


def unsupported_reason(kernel: Kernel, config: DecoderConfig, dtype: Any, mesh: Mesh) -> str | None:
    """Returns why a kernel cannot run such a model on the devices of a mesh; None if it can.

    The conditions for cuDNN are those of `_src/cudnn/fused_attention_stablehlo.py` in JAX, and compute capability 8.0,
    which NVIDIA requires for flash attention. Other causes, such as a missing or outdated cuDNN, are found by a trial
    on the device.
    """
    if kernel == "xla":
        return None
    device = mesh.devices.flat[0]
    if config.sinks or config.biased:
        return f"{kernel} attention takes neither ALiBi nor sinks, which this base has"
    if config.disentangled is not None:
        return f"{kernel} attention does not support disentangled attention, which this base has"
    if config.latent is not None:
        return f"{kernel} attention does not support latent attention, which this base has"
    if any(one.head_size != config.head_size for one in layer_configs(config)):
        return f"{kernel} attention needs heads of one size, and layers of this base differ"
    if FUSED.get(device.platform) != kernel:
        needed = {"cudnn": "NVIDIA GPUs", "splash": "TPUs"}[kernel]
        return f"{kernel} attention runs on {needed}, not on a {device.platform}"
    if mesh.shape["sequence"] > 1:
        return f"{kernel} attention does not work with mesh.sequence, which uses ring attention"
    if kernel == "cudnn":
        capability = measure.compute_capability(device)
        if capability is None:
            return f"cuDNN runs on NVIDIA GPUs, not on {device.device_kind}"
        if capability < (8, 0):
            return f"cuDNN attention needs compute capability 8.0; {device.device_kind} has {device.compute_capability}"
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN attention needs base.dtype bfloat16 or float16, not {jnp.dtype(dtype)}"
        largest = 256 if capability >= (9, 0) else 128
        if config.head_size % 8 or config.head_size > largest:
            return (
                f"cuDNN attention on {device.device_kind} needs a head size that is a multiple of 8 up to {largest},"
                f" not {config.head_size}"
            )
        if config.score_cap is not None:
            return "cuDNN does not support the soft-capped attention scores of this base"
    local = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
    return trial(kernel, config.heads, config.kv_heads, config.head_size, jnp.dtype(dtype), local)


def check_kernel(kernel: Kernel, config: DecoderConfig, dtype: Any, mesh: Mesh) -> None:
    """Raises ConfigError if a kernel cannot run such a model on the devices of a mesh."""
    reason = unsupported_reason(kernel, config, dtype, mesh)
    if reason is not None:
        raise ConfigError(f"attention {kernel!r} cannot be used: {reason}; 'auto' and 'xla' work here")


def choose_kernel(config: DecoderConfig, dtype: Any, mesh: Mesh) -> tuple[Kernel, str]:
    """Resolves attention "auto": the fused kernel for these devices if it can run, else "xla".

    Returns:
      The kernel, and a note to print after its name with the reason for "xla"; empty for a fused kernel.
    """
    platform = mesh.devices.flat[0].platform
    if platform not in FUSED:
        return "xla", f" ({jnp.dtype(dtype)} on {platform})"
    reason = unsupported_reason(FUSED[platform], config, dtype, mesh)
    return (FUSED[platform], "") if reason is None else ("xla", f", because {reason}")


@functools.cache
def trial(kernel: Kernel, heads: int, kv_heads: int, size: int, dtype: np.dtype, device: Any) -> str | None:
    """Runs a kernel on a small input, forward and backward, and compares the results with plain attention.

    Returns:
      A message about what went wrong; None on success.
    """
    random = np.random.default_rng(0)
    length, keys_length = 65, 131  # odd, and not multiples of the block sizes of the kernels
    query_shape, key_shape = (2, length, heads, size), (2, keys_length, kv_heads, size)
    queries, keys, values, cotangent = (
        jnp.asarray(random.standard_normal(shape), dtype) for shape in (query_shape, key_shape, key_shape, query_shape)
    )
    mask = jnp.asarray(random.random((2, length, keys_length)) < 0.7).at[:, :, 0].set(True)
    scale = size**-0.5

    def gradients(attention: Callable[[Array, Array, Array], Array]) -> Any:
        def run(cotangent: Array, *inputs: Array) -> Any:
            out, vjp = jax.vjp(attention, *inputs)
            return out, vjp(cotangent)

        return jax.device_get(jax.jit(run)(*jax.device_put((cotangent, queries, keys, values), device)))

    def plain(*inputs: Array) -> Array:
        return jax.nn.dot_product_attention(*inputs, mask=mask[:, None], scale=scale, implementation="xla")

    def fused(*inputs: Array) -> Array:
        return KERNELS[kernel](*inputs, mask, scale=scale, cap=None, interpret=device.platform == "cpu")

    try:
        results = gradients(fused)
    except Exception as error:  # JAX, cuDNN and kernel compilers raise exceptions of different types
        text = (str(error) or "no message").splitlines()[0]
        return f"{kernel} attention failed in a trial on {device.device_kind} ({type(error).__name__}: {text})"
    for actual, expected in zip(jax.tree.leaves(results), jax.tree.leaves(gradients(plain)), strict=True):
        actual, expected = actual.astype(np.float32), expected.astype(np.float32)
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        if not error <= _TOLERANCE:
            return f"{kernel} attention in a trial on {device.device_kind} differed from plain attention by {error:.0%}"
    return None


def attend_fused(
    kernel: Kernel,
    mesh: Mesh | None,
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    cap: float | None,
) -> Float[Array, "B T N H"]:
    """Computes softmax attention with a fused kernel, sharded over rows and heads.

    A query whose keys are all masked attends to the first key. On CPU, splash is interpreted, which is slow and
    only meant for tests.
    """
    # A kernel may return NaN if all keys are masked.
    mask = mask.at[:, :, 0].set(mask[:, :, 0] | ~mask.any(axis=-1))
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    function = _mappable(functools.partial(KERNELS[kernel], scale=scale, cap=cap, interpret=platform == "cpu"))
    if mesh is not None and mesh.size > 1:
        heads = fitting(mesh, P(ROWS, None, "tensor"), keys.shape).spec
        rows = P(*heads[:1])
        function = jax.shard_map(
            function, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    return function(queries, keys, values, mask)


def _mappable(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """Returns the kernel with a `vmap` rule that folds the mapped axis into the rows, forward and backward.

    The rule of JAX for the cuDNN kernel does not support a mask that all heads share, and Pallas would map the mask
    data of splash attention sequentially.
    """

    def gradients(cotangent: Array, queries: Array, keys: Array, values: Array, mask: Array) -> tuple[Array, ...]:
        _, vjp = jax.vjp(lambda *inputs: kernel(*inputs, mask), queries, keys, values)
        return vjp(cotangent)

    forward, backward = _with_folded_vmap(kernel), _with_folded_vmap(gradients)

    @jax.custom_vjp
    def attention(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
        return forward(queries, keys, values, mask)

    # The residuals of the kernel cannot pass through `custom_vmap`; rematerialization would drop them anyway.
    attention.defvjp(
        lambda *inputs: (forward(*inputs), inputs), lambda inputs, cotangent: (*backward(cotangent, *inputs), None)
    )
    return attention


def _with_folded_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of arrays [B, ...] for which `vmap` folds the mapped axis into B."""
    mappable = jax.custom_batching.custom_vmap(function)

    @mappable.def_vmap
    def rule(size: int, mapped: list[bool], *arrays: Array) -> tuple[Any, Any]:
        batched = (
            array if is_mapped else jnp.broadcast_to(array[None], (size, *array.shape))
            for array, is_mapped in zip(arrays, mapped, strict=True)
        )
        out = mappable(*(array.reshape(-1, *array.shape[2:]) for array in batched))
        return jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), out), jax.tree.map(
            lambda _: True, out
        )

    return mappable


def _cudnn(
    queries: Array, keys: Array, values: Array, mask: Array, *, scale: float, cap: float | None, interpret: bool
) -> Array:
    length = queries.shape[1]
    queries, keys, values, mask = _padded(
        queries, keys, values, mask, 2
    )  # The backward pass of cuDNN needs even lengths.
    out = jax.nn.dot_product_attention(
        queries, keys, values, mask=mask[:, None], scale=scale, implementation="xla" if interpret else "cudnn"
    )
    return out[:, :length]


def _splash(
    queries: Array, keys: Array, values: Array, mask: Array, *, scale: float, cap: float | None, interpret: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import make_splash_mqa_single_device as make_splash

    _, length, heads, size = queries.shape
    kv_heads = keys.shape[2]
    queries, keys, values, mask = _padded(queries * scale, keys, values, mask, _LANES, _LANES)

    def of_row(row: tuple[Array, Array, Array, Array]) -> Array:
        """Computes one row: masks of several rows at once would have to be repeated for every head."""
        queries, keys, values, mask = row
        kernel = make_splash(mask[None], attn_logits_soft_cap=cap, interpret=interpret)
        # Inside jit, JAX turns this flag into an array but branches on it in Python.
        for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            setattr(kernel, name, getattr(kernel, name)._replace(is_dynamic_mask=True))
        grouped = queries.reshape(-1, kv_heads, heads // kv_heads, queries.shape[-1]).transpose(1, 2, 0, 3)
        out: Any = jax.vmap(kernel)(grouped, keys.transpose(1, 0, 2), values.transpose(1, 0, 2))
        return out.transpose(2, 0, 1, 3).reshape(queries.shape)

    return jax.lax.map(of_row, (queries, keys, values, mask))[:, :length, :, :size]


def _padded(queries: Array, keys: Array, values: Array, mask: Array, length: int, size: int = 1) -> tuple[Array, ...]:
    """Pads T and S to multiples of `length`, and H to a multiple of `size`."""
    more_queries, more_keys, more = -queries.shape[1] % length, -keys.shape[1] % length, -queries.shape[-1] % size
    padded = (
        jnp.pad(array, [(0, 0), (0, count), (0, 0), (0, more)])
        for array, count in ((queries, more_queries), (keys, more_keys), (values, more_keys))
    )
    # Padding queries attend to the first key.
    mask = jnp.pad(mask, [(0, 0), (0, more_queries), (0, more_keys)])
    return *padded, mask.at[:, queries.shape[1] :, 0].set(True)


KERNELS: dict[str, Callable[..., Array]] = {"cudnn": _cudnn, "splash": _splash}
