"""Fused attention equals plain attention, forward and backward; splash runs here as JAX interprets TPU kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from spt_jax.base import load_base
from spt_jax.errors import ConfigError
from spt_jax.models.attention import Scoring, Source, attend
from spt_jax.models.config import decoder_config
from spt_jax.models.kernels import check_kernel
from spt_jax.sharding import AXES, MeshConfig, make_mesh
from spt_jax.testing import tiny_base, tiny_config, write_tiny_checkpoint
from tests.golden.cases import CASES, token_ids
from tests.layouts import Run, forward, lay_out

B, T, P, N, K, H = 2, 9, 5, 4, 2, 12


def arrays() -> tuple:
    """Queries, a prefix that all rows share, the rows' own keys and values, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = ((B, T, N, H), (P, K, H), (P, K, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def masks() -> tuple[jax.Array, jax.Array]:
    """Of prefix and rows; the last query of the second row sees nothing, as padding does."""
    keys = jax.random.split(jax.random.key(1))
    prefix, own = (jax.random.bernoulli(key, 0.6, (B, T, size)) for key, size in zip(keys, (P, T), strict=True))
    prefix = prefix.at[:, :, 1].set(True).at[1, -1].set(False)
    return prefix, own.at[1, -1].set(False)


def attention(queries, keys, values, own_keys, own_values, **options):
    ahead, own = masks()
    return attend(queries, [Source(keys, values, ahead), Source(own_keys, own_values, own)], **options)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}, {"data": 4}], ids=str)
@pytest.mark.parametrize("scoring", [None, Scoring(0.5, 1.5)], ids=["plain", "capped"])
@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_outputs_and_gradients(kernel, scoring, axes):
    """Four devices for two rows leave the rows whole. cuDNN's part here is what surrounds its kernel."""
    if kernel == "cudnn" and scoring is not None:
        scoring = Scoring(0.5)
    *inputs, cotangent = arrays()
    seen = jnp.ones((B, T, 1, 1)).at[1, -1].set(0)
    mesh = make_mesh(MeshConfig(**axes))
    fused = functools.partial(attention, scoring=scoring, kernel=kernel, mesh=mesh)
    expected, pull = jax.vjp(functools.partial(attention, scoring=scoring), *inputs)

    def both(cotangent, *inputs):
        out, pull = jax.vjp(fused, *inputs)
        return out, pull(cotangent)

    ours, slopes = jax.jit(both)(cotangent * seen, *inputs)
    np.testing.assert_allclose(ours * seen, expected * seen, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), slopes, pull(cotangent * seen))
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_whole_model(family):
    """Packed rows with a child of a shared context, windows, caps and grouped heads."""
    base = tiny_base(family)
    ids = token_ids(next(case for case in CASES if case.name == family))
    runs = [Run(0, 0, ids[:20]), Run(0, 20, ids[20:29]), Run(0, 29, ids[29:33], ids[20:29]), Run(1, 0, ids[40:70])]
    rows, stream = lay_out(runs, 40)
    fused = dataclasses.replace(base, module=base.module.clone(attention="splash"))
    ours, theirs = (np.asarray(forward(one, rows, stream)[0]) for one in (fused, base))
    for run in runs:
        np.testing.assert_allclose(ours[run.slice], theirs[run.slice], atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Device:
    """What the check reads of a device that is not there."""

    platform: str
    id: int = 0
    device_kind: str = ""


def mesh_of(platform: str, sequence: int = 1) -> Mesh:
    devices = np.asarray([Device(platform, i) for i in range(sequence)]).reshape(1, 1, 1, sequence)
    return Mesh(devices, AXES)


@pytest.mark.parametrize(
    ("kernel", "mesh", "dtype", "family", "sizes", "message"),
    [
        ("cudnn", mesh_of("cpu"), jnp.bfloat16, "llama", {}, "'cudnn' runs on GPUs; these are cpus; xla works"),
        ("splash", mesh_of("gpu"), jnp.bfloat16, "llama", {}, "'splash' runs on TPUs; these are gpus; xla works"),
        ("cudnn", mesh_of("gpu"), jnp.float32, "llama", {}, "needs base.dtype bfloat16 or float16, not float32"),
        ("cudnn", mesh_of("gpu"), jnp.bfloat16, "qwen3", {}, "heads of a multiple of 8 up to 256, not 12"),
        ("cudnn", mesh_of("gpu"), jnp.bfloat16, "gemma2", {"head_dim": 16}, "does not cap scores"),
        ("splash", mesh_of("tpu", 2), jnp.bfloat16, "llama", {}, "does not go with mesh.sequence"),
    ],
)
def test_asked_where_it_is_not(kernel, mesh, dtype, family, sizes, message):
    with pytest.raises(ConfigError, match=message):
        check_kernel(kernel, decoder_config(tiny_config(family, **sizes)), dtype, mesh)


def test_asked_where_it_is(tmp_path):
    config = decoder_config(tiny_config("llama"))
    check_kernel("cudnn", config, jnp.bfloat16, mesh_of("gpu"))
    check_kernel("splash", config, jnp.float32, mesh_of("tpu"))
    with pytest.raises(ConfigError, match="these are cpus"):
        load_base(write_tiny_checkpoint(tmp_path), attention="splash")
