"""Every representation of kernels: its numbers, its products and their gradients, and bases with it."""

import dataclasses
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spt_jax.bases.base import load_base
from spt_jax.bases.leaf_buffers import KernelBuffer
from spt_jax.errors import ConfigError
from spt_jax.models.attention import Stream
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.models.layers import dense
from spt_jax.models.quantized import KERNEL_ARRAYS, Int4, Int8Table, KernelArray, Nf4
from spt_jax.models.quantized.kernel_array import encoded_shapes
from spt_jax.models.quantized.nf4 import LEVELS
from spt_jax.models.quantized.packing import group_rows, pack, unpack
from spt_jax.prompts import LlamaAdapter
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base

KINDS = sorted(KERNEL_ARRAYS)
FOUR_BITS = ["int4", "nf4"]
ONE = NamedSharding(make_mesh(), PartitionSpec())


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def all_logits(model, ids=(1, 40, 41, 42, 60, 9)):
    ids = jnp.asarray([ids])
    places = jnp.arange(ids.shape[1])[None]
    stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places))
    hidden, _ = jax.jit(DecoderModel.run)(model, model.embed(ids), stream)
    return np.asarray(model.logits(hidden[0]))


def with_dense_kernels(model):
    quantized = (KernelArray, Int8Table)
    model = jax.tree.map(
        lambda a: dense(a) if isinstance(a, quantized) else a, model, is_leaf=lambda a: isinstance(a, quantized)
    )
    if model.config.tied:
        return model
    return dataclasses.replace(model, params={**model.params, "output": model.params["output"].T})


def test_two_codes_per_byte():
    codes = np.random.default_rng(0).integers(0, 16, (10, 3)).astype(np.uint8)
    packed = pack(codes)
    assert packed.dtype == np.uint8 and packed.shape == (5, 3)
    assert packed[2, 1] == codes[4, 1] + 16 * codes[5, 1]
    np.testing.assert_array_equal(unpack(jnp.asarray(np.stack([packed, packed])))[1], codes)


@pytest.mark.parametrize(
    ("rows", "size"), [(4096, 128), (14336, 128), (256, 128), (64, 64), (172, 86), (2, 2), (194, 2)]
)
def test_groups_divide_the_rows(rows, size):
    assert group_rows(rows, 128, "int4") == size


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_odd_rows_are_refused(kind):
    with pytest.raises(ConfigError, match=rf"{kind} packs pairs of input features.* has 27; use int8"):
        KERNEL_ARRAYS[kind].quantize(noise(27, 4), ONE)


def test_int4_is_exact_where_16_steps_suffice():
    """Groups of 128 whose values are on a grid of their own."""
    codes = np.random.default_rng(0).integers(0, 16, (2, 128, 5))
    codes[:, :16] = np.arange(16)[:, None]
    kernel = (codes * 0.25 - np.asarray([[[1.0]], [[2.5]]])).reshape(256, 5).astype(np.float32)
    own = Int4.quantize(kernel, ONE)
    np.testing.assert_array_equal(own.dense(), kernel)
    assert own.packed.nbytes + own.scale.nbytes + own.offset.nbytes == kernel.size * 4.25 / 8


def test_int4_has_less_error_than_rounding_to_the_range_of_each_group():
    kernel = noise(4, 128, 32)
    low, high = kernel.min(axis=1, keepdims=True), kernel.max(axis=1, keepdims=True)
    step = (high - low) / 15
    plain = np.rint((kernel - low) / step) * step + low
    own = np.asarray(Int4.quantize(kernel.reshape(512, 32), ONE).dense()).reshape(kernel.shape)
    assert np.square(own - kernel).sum() < 0.95 * np.square(plain - kernel).sum()
    assert np.abs(own - kernel).max() < 2 * step.max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3, -7e-30])
def test_constant_kernels(kind, value):
    own = KERNEL_ARRAYS[kind].quantize(np.full((128, 3), value, np.float32), ONE)
    np.testing.assert_allclose(own.dense(), value, rtol=2**-8)


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """QLoRA's appendix E: eight positive and seven negative quantiles, and 0."""
    outer = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive, negative = ([NormalDist().inv_cdf(p) for p in np.linspace(outer, 0.5, n)[:-1]] for n in (9, 8))
    expected = np.sort([*positive, 0, *(-value for value in negative)]) / max(positive)
    np.testing.assert_allclose(LEVELS, expected, atol=1e-4)


def test_nf4_chooses_the_nearest_levels():
    kernel = noise(128, 6)
    blocks = kernel.reshape(2, 64, 6)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs((blocks / scale)[..., None] - np.asarray(LEVELS)).argmin(axis=-1)
    expected = np.asarray(LEVELS, np.float32)[nearest] * scale
    np.testing.assert_allclose(Nf4.quantize(kernel, ONE).dense(), expected.reshape(kernel.shape), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_products_and_their_gradients_are_those_of_the_same_numbers(kind, dtype):
    own, x, cotangent = KERNEL_ARRAYS[kind].quantize(noise(256, 24), ONE), noise(2, 5, 256), noise(2, 5, 24, seed=1)
    kernel = np.asarray(own.dense())
    found, pull = jax.vjp(lambda x: jax.jit(lambda own, x: own.matmul(x))(own, x), jnp.asarray(x, dtype))
    (gradient,) = pull(jnp.asarray(cotangent, dtype))
    assert found.dtype == gradient.dtype == dtype
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[jnp.dtype(dtype).name]
    for ours, theirs in ((found, x @ kernel), (gradient, cotangent @ kernel.T)):
        assert np.abs(ours.astype(jnp.float32) - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_size_of_a_float_kernel_is_saved_for_the_backward_pass(kind):
    own = KERNEL_ARRAYS[kind].quantize(noise(256, 64), ONE)
    _, pull = jax.vjp(own.matmul, jnp.asarray(noise(3, 256)))
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert saved <= 1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_a_stack_and_experts_under_vmap(kind):
    kernels, x = noise(3, 128, 8), noise(3, 4, 128, seed=1)
    own = KERNEL_ARRAYS[kind].quantize(kernels, ONE)
    found, pull = jax.vjp(jax.vmap(lambda own, x: own.matmul(x), in_axes=(0, 0)), own, jnp.asarray(x))
    np.testing.assert_allclose(found, x @ np.asarray(own.dense()), atol=1e-4)
    cotangent = noise(3, 4, 8, seed=2)
    expected = cotangent @ np.asarray(own.dense()).swapaxes(1, 2)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[1], expected, atol=1e-4)
    for i, kernel in enumerate(kernels):
        alone = KERNEL_ARRAYS[kind].quantize(kernel, ONE)
        np.testing.assert_array_equal(alone.dense(), dense(own)[i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [PartitionSpec(None, "tensor"), PartitionSpec(None, None, "tensor")], ids=str)
@pytest.mark.parametrize("devices", [2, 4])
def test_split_kernels(kind, spec, devices):
    """By rows, where three groups do not divide over the devices, and by columns."""
    mesh = make_mesh(MeshConfig(tensor=devices))
    kernel, x = noise(2, 384, 8), noise(5, 384)
    own = KERNEL_ARRAYS[kind].quantize(kernel, NamedSharding(mesh, spec))
    plain = KERNEL_ARRAYS[kind].quantize(kernel, ONE)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(own))
    planned = encoded_shapes(type(own), kernel.shape, NamedSharding(mesh, spec))
    for name, shape in planned.items():
        leaf = getattr(own, name)
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)

    @jax.jit
    def product(own, x):
        return jax.vjp(jax.tree.map(lambda a: a[1], own).matmul, x)[1](jnp.ones((5, 8)))[0]

    np.testing.assert_allclose(product(own, x), product(plain, x), atol=1e-4)


def test_buffers_hold_one_layer():
    """Two tensors per layer, and the layers one after another."""
    kernel = noise(3, 128, 8)
    indices = [(layer,) for layer in range(3) for _ in range(2)]
    buffer = KernelBuffer(Int4, kernel.shape, indices)
    for layer, half in ((0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)):
        buffer[layer,][half * 64 : (half + 1) * 64] = kernel[layer, half * 64 : (half + 1) * 64]
        assert len(buffer._parts) == 1
        buffer.filled((layer,))
    np.testing.assert_array_equal(buffer.placed(ONE).dense(), Int4.quantize(kernel, ONE).dense())


@pytest.mark.parametrize(
    ("kind", "family"), [("int4", "llama"), ("nf4", "gpt2"), ("int4", "gpt_oss"), ("int4", "deepseek_v2")]
)
def test_a_base_computes_with_their_numbers(kind, family):
    base = tiny_base(family, quantize=kind)
    ours = all_logits(base.model)
    np.testing.assert_allclose(ours, all_logits(with_dense_kernels(base.model)), atol=1e-4)
    plain = tiny_base(family)
    assert 0 < np.abs(ours - all_logits(plain.model)).max() < 0.5 * np.abs(ours).max()
    assert base.parameter_count == plain.parameter_count


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"tensor": 4}], ids=str)
def test_a_base_on_a_mesh(axes):
    sizes = {"num_key_value_heads": 4}
    split = tiny_base(quantize="int4", mesh=make_mesh(MeshConfig(**axes)), **sizes)
    np.testing.assert_allclose(
        all_logits(split.model), all_logits(tiny_base(quantize="int4", **sizes).model), atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gated_prompts_are_computed_from_their_numbers(kind):
    base = tiny_base(quantize=kind)
    method = LlamaAdapter(length=2, layers=2)
    params = method.init_params(jax.random.key(0), base)
    ours, theirs = (method.materialize(params, model) for model in (base.model, with_dense_kernels(base.model)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("fp8", 0.03), ("int4", 0.08), ("nf4", 0.08)])
def test_logits_of_the_starter(kind, bound):
    """Norm of the difference from float32 over the norm of the logits, both without each position's mean."""
    plain = load_base("starter")
    ids = plain.tokenizer("The committee will meet on Monday. What is the capital of France? She said no.")["input_ids"]

    def centred(base):
        logits = all_logits(base.model, ids)
        return logits - logits.mean(axis=-1, keepdims=True)

    expected = centred(plain)
    error = np.linalg.norm(centred(load_base("starter", quantize=kind)) - expected) / np.linalg.norm(expected)
    print(kind, error)
    assert 1e-4 < error < bound


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4.25), ("nf4", 4.5)])
def test_bits_per_weight(kind, bits):
    """Of a layer of 4,096 x 14,336; with 8 bits there is also a scale per channel."""
    shapes = encoded_shapes(KERNEL_ARRAYS[kind], (4096, 14336), ONE)
    found = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
    assert found == 4096 * 14336 * bits / 8 + (4 * 14336 if bits == 8 else 0)


def test_the_fields_are_arrays_of_what_they_say():
    for kind in KERNEL_ARRAYS.values():
        encoded = kind.encode(noise(128, 4))
        arrays = {field.name for field in dataclasses.fields(kind) if not field.metadata.get("static")}
        assert set(encoded) == arrays
