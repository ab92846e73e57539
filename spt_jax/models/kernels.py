"""Fused attention, which holds no row's scores as a whole: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Both take every source of keys as one, under one mask, so that their own gradients are right: nothing is merged by
log-sum-exp.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.sharding import ROWS, fitting

Kernel = Literal["xla", "cudnn", "splash"]
_LANES = 128  # What TPU kernels need lengths to be multiples of.


def check_kernel(kernel: Kernel, config: DecoderConfig, dtype: Any, mesh: Mesh) -> None:
    """Raises ConfigError where a kernel does not run, or not for such a model."""
    if kernel == "xla":
        return
    device = mesh.devices.flat[0]
    needed = {"cudnn": "gpu", "splash": "tpu"}[kernel]
    if device.platform != needed:
        raise ConfigError(f"attention {kernel!r} runs on {needed.upper()}s; these are {device.platform}s; xla works")
    if mesh.shape["sequence"] > 1:
        raise ConfigError(f"attention {kernel!r} does not go with mesh.sequence, which has ring attention; xla works")
    if kernel == "splash":
        return
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise ConfigError(f"attention 'cudnn' needs base.dtype bfloat16 or float16, not {jnp.dtype(dtype)}; xla works")
    if config.head_size % 8 or config.head_size > 256:
        raise ConfigError(
            f"attention 'cudnn' needs heads of a multiple of 8 up to 256, not {config.head_size}; xla works"
        )
    if config.score_cap is not None:
        raise ConfigError("attention 'cudnn' does not cap scores, as this base needs; xla works")


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
    """Softmax attention by one kernel, on each device its rows and heads. A query that sees nothing gets some values.

    On CPU, splash is interpreted: slowly, for tests.
    """
    # A kernel may give NaN where nothing is seen.
    mask = mask.at[:, :, 0].set(mask[:, :, 0] | ~mask.any(axis=-1))
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    function = functools.partial(KERNELS[kernel], scale=scale, cap=cap, interpret=platform == "cpu")
    if mesh is not None and mesh.size > 1:
        heads = fitting(mesh, P(ROWS, None, "tensor"), keys.shape).spec
        rows = P(*heads[:1])
        function = jax.shard_map(
            function, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    return function(queries, keys, values, mask)


def _cudnn(
    queries: Array, keys: Array, values: Array, mask: Array, *, scale: float, cap: float | None, interpret: bool
) -> Array:
    length = queries.shape[1]
    queries, keys, values, mask = _padded(queries, keys, values, mask, 2)  # Its backward pass needs even lengths.
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
        """Masks of several rows at once would have to be there for every head."""
        queries, keys, values, mask = row
        kernel = make_splash(mask[None], attn_logits_soft_cap=cap, interpret=interpret)
        # Inside jit, JAX makes an array of this flag, which it then branches on.
        for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            setattr(kernel, name, getattr(kernel, name)._replace(is_dynamic_mask=True))
        grouped = queries.reshape(-1, kv_heads, heads // kv_heads, queries.shape[-1]).transpose(1, 2, 0, 3)
        out: Any = jax.vmap(kernel)(grouped, keys.transpose(1, 0, 2), values.transpose(1, 0, 2))
        return out.transpose(2, 0, 1, 3).reshape(queries.shape)

    return jax.lax.map(of_row, (queries, keys, values, mask))[:, :length, :, :size]


def _padded(queries: Array, keys: Array, values: Array, mask: Array, length: int, size: int = 1) -> tuple[Array, ...]:
    """With T, S and H rounded up to multiples."""
    more_queries, more_keys, more = -queries.shape[1] % length, -keys.shape[1] % length, -queries.shape[-1] % size
    padded = (
        jnp.pad(array, [(0, 0), (0, count), (0, 0), (0, more)])
        for array, count in ((queries, more_queries), (keys, more_keys), (values, more_keys))
    )
    # Queries that are none see the first key.
    mask = jnp.pad(mask, [(0, 0), (0, more_queries), (0, more_keys)])
    return *padded, mask.at[:, queries.shape[1] :, 0].set(True)


KERNELS: dict[str, Callable[..., Array]] = {"cudnn": _cudnn, "splash": _splash}
