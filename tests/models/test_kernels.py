"""Fused attention equals plain attention, forward and backward; splash runs here as JAX interprets TPU kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from spt_jax.bases.base import DTYPES, default_dtype, describe_base, load_base
from spt_jax.bases.config import decoder_config
from spt_jax.data.batches import pack, plan_batches
from spt_jax.errors import ConfigError
from spt_jax.models import kernels
from spt_jax.models.attention import Scoring, Source, attend
from spt_jax.models.kernels import FUSED, KERNELS, check_kernel, choose_kernel
from spt_jax.prompts import PromptTuning
from spt_jax.runtime.sharding import AXES, MeshConfig, make_mesh
from spt_jax.testing import tiny_base, tiny_config, write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.optimizers import OptimizerConfig, resolve_optimizer
from spt_jax.training.population import Member, init_members, make_population_step, stack_batches
from tests.examples import HEAD, VIRTUAL, random_examples
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
    fused = dataclasses.replace(base, model=base.model.with_options(attention="splash"))
    ours, theirs = (np.asarray(forward(one, rows, stream)[0]) for one in (fused, base))
    for run in runs:
        np.testing.assert_allclose(ours[run.slice], theirs[run.slice], atol=1e-4)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_mapped_over_members(kernel, axes):
    """As a population maps it: two members with keys of their own and masks that they share."""
    *inputs, cotangent = arrays()
    inputs = [jnp.stack([array, -0.5 * array]) for array in inputs]
    mesh = make_mesh(MeshConfig(**axes))
    seen = jnp.ones((B, T, 1, 1)).at[1, -1].set(0)

    def slopes(*inputs, **options):
        out, pull = jax.vjp(functools.partial(attention, **options), *inputs)
        return out * seen, pull(cotangent * seen)

    expected = jax.jit(jax.vmap(slopes))(*inputs)
    ours = jax.jit(jax.vmap(functools.partial(slopes, kernel=kernel, mesh=mesh)))(*inputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), ours, expected)


def test_cudnn_in_a_population_s_step(monkeypatch):
    """Lowered for CUDA, without a GPU: the kernel is there, forward and backward, for all members at once."""
    fused = KERNELS["cudnn"]
    monkeypatch.setitem(KERNELS, "cudnn", lambda *inputs, interpret, **own: fused(*inputs, interpret=False, **own))
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    base = tiny_base(dtype="bfloat16")
    base = dataclasses.replace(base, model=base.model.with_options(attention="cudnn"))
    optimizer = resolve_optimizer(OptimizerConfig(name="sgd", learning_rate=0.1), "llama")
    method, examples = PromptTuning(length=VIRTUAL), random_examples("target", 4)
    plan = plan_batches(examples, lead=len(HEAD), batch_size=4)
    members = [Member(method, examples, plan, seed, 0.1) for seed in range(2)]
    batches = stack_batches([pack(examples, plan)] * 2)
    step = make_population_step(base, method, optimizer, 4, CrossEntropy())
    traced = step.func.trace(*step.args, init_members(base, members, optimizer, 4), jnp.ones(2), batches)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    rows = len(members) * batches.rows.ids.shape[1]
    calls = [line for line in program.splitlines() if "custom_call @__cudnn$" in line]
    backward = [line for line in calls if "Backward" in line]
    assert backward and len(calls) > len(backward)
    assert any(f"tensor<{rows}x" in line for line in backward)


@dataclasses.dataclass(frozen=True)
class Device:
    """What is read of a device that is not there."""

    platform: str
    device_kind: str = "a device"
    compute_capability: str = ""
    id: int = 0
    process_index: int = 0


CPU, TPU = Device("cpu", "cpu"), Device("tpu", "TPU v5e")
T4, A100, H100 = (
    Device("gpu", kind, capability)
    for kind, capability in (("Tesla T4", "7.5"), ("NVIDIA A100", "8.0"), ("NVIDIA H100", "9.0"))
)
MI300 = Device("gpu", "AMD Instinct MI300X", "gfx942")


def mesh_of(device: Device, sequence: int = 1) -> Mesh:
    devices = np.asarray([dataclasses.replace(device, id=i) for i in range(sequence)]).reshape(1, 1, 1, sequence)
    return Mesh(devices, AXES)


@pytest.fixture
def trial_passes(monkeypatch):
    monkeypatch.setattr(kernels, "trial", lambda *arguments: None)


WIDE = {"head_dim": 192}


@pytest.mark.parametrize(
    ("kernel", "mesh", "dtype", "family", "sizes", "reason"),
    [
        ("cudnn", mesh_of(CPU), "bfloat16", "llama", {}, "cudnn attention runs on NVIDIA GPUs, not on a cpu"),
        ("splash", mesh_of(H100), "bfloat16", "llama", {}, "splash attention runs on TPUs, not on a gpu"),
        ("cudnn", mesh_of(MI300), "bfloat16", "llama", {}, "NVIDIA GPUs, not on AMD Instinct MI300X"),
        ("cudnn", mesh_of(T4), "float16", "llama", {}, "needs compute capability 8.0; Tesla T4 has 7.5"),
        ("cudnn", mesh_of(H100), "float32", "llama", {}, "needs base.dtype bfloat16 or float16, not float32"),
        ("cudnn", mesh_of(H100), "bfloat16", "qwen3", {}, "that is a multiple of 8 up to 256, not 12"),
        ("cudnn", mesh_of(A100), "bfloat16", "qwen3", WIDE, "that is a multiple of 8 up to 128, not 192"),
        (
            "cudnn",
            mesh_of(H100),
            "bfloat16",
            "gemma2",
            {"head_dim": 16},
            "does not support the soft-capped attention scores",
        ),
        ("splash", mesh_of(TPU, 2), "bfloat16", "llama", {}, "does not work with mesh.sequence"),
    ],
)
@pytest.mark.usefixtures("trial_passes")
def test_where_it_cannot_run(kernel, mesh, dtype, family, sizes, reason):
    """One reason, as an error where the kernel was asked for and as words where it would be the default."""
    config = decoder_config(tiny_config(family, **sizes))
    with pytest.raises(ConfigError, match=reason):
        check_kernel(kernel, config, DTYPES[dtype], mesh)
    if FUSED.get(mesh.devices.flat[0].platform) == kernel:
        chosen, note = choose_kernel(config, DTYPES[dtype], mesh)
        assert chosen == "xla" and note.startswith(", because ") and reason in note


@pytest.mark.parametrize(
    ("device", "dtype", "sizes", "expected"),
    [
        (CPU, "float32", {}, ("xla", " (float32 on cpu)")),
        (H100, "bfloat16", {}, ("cudnn", "")),
        (H100, "float16", WIDE, ("cudnn", "")),
        (A100, "bfloat16", {}, ("cudnn", "")),
        (TPU, "float32", {}, ("splash", "")),
    ],
)
@pytest.mark.usefixtures("trial_passes")
def test_the_default_of_a_device(device, dtype, sizes, expected):
    config = decoder_config(tiny_config("qwen3", **{"head_dim": 16, **sizes}))
    assert choose_kernel(config, DTYPES[dtype], mesh_of(device)) == expected
    if expected[0] != "xla":
        check_kernel(expected[0], config, DTYPES[dtype], mesh_of(device))


def test_a_base_says_which_it_has(tmp_path):
    directory = write_tiny_checkpoint(tmp_path)
    base = load_base(directory)
    assert base.model.module.attention == "xla"
    assert describe_base(base).splitlines()[1] == "attention: xla (float32 on cpu)"
    assert describe_base(load_base(directory, attention="xla")).splitlines()[1] == "attention: xla"
    with pytest.raises(ConfigError, match="not on a cpu"):
        load_base(directory, attention="splash")


@pytest.mark.parametrize(
    ("device", "dtype"),
    [(CPU, "float32"), (TPU, "bfloat16"), (T4, "float16"), (A100, "bfloat16"), (H100, "bfloat16"), (MI300, "bfloat16")],
)
def test_the_default_precision_of_a_device(device, dtype):
    assert default_dtype(device) == dtype


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_a_trial_that_succeeds(kernel):
    """As on CPU: cuDNN's place is taken by plain attention, and splash is interpreted."""
    assert kernels.trial.__wrapped__(kernel, 4, 2, 16, jnp.dtype("bfloat16"), jax.devices()[0]) is None


def missing(*inputs, **options):
    raise RuntimeError("cuDNN is not detected.\nSee the documentation")


def blind(queries, keys, values, mask, **options):
    """Sees what the mask hides."""
    return jax.nn.dot_product_attention(queries, keys, values)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (missing, "cudnn attention failed in a trial on cpu (RuntimeError: cuDNN is not detected.)"),
        (blind, "cudnn attention in a trial on cpu differed from plain attention by"),
    ],
)
def test_a_trial_that_fails(monkeypatch, broken, reason):
    """Then "auto" is xla, and "cudnn" an error, both of which say why."""
    monkeypatch.setitem(KERNELS, "cudnn", broken)
    real = kernels.trial.__wrapped__
    monkeypatch.setattr(kernels, "trial", lambda *arguments: real(*arguments[:-1], jax.devices()[0]))
    config = decoder_config(tiny_config("llama"))
    kernel, note = choose_kernel(config, jnp.bfloat16, mesh_of(H100))
    assert kernel == "xla" and reason in note
    with pytest.raises(ConfigError, match="'auto' and 'xla' work here"):
        check_kernel("cudnn", config, jnp.bfloat16, mesh_of(H100))
