"""`--base.quantize keep`: weights of quantized checkpoints stay packed on the device."""

import itertools
import math

import jax
import numpy as np
import pytest

from spt_jax.bases.base import load_base
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.layers import dense
from spt_jax.models.quantized import Fp8, KernelArray
from spt_jax.models.quantized.codebook import Codebook
from spt_jax.models.quantized.grouped import Grouped
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base
from spt_jax.training.cost import DENSE_COPIES, StepShape, step_memory
from tests.bases.quantized_checkpoints import bnb4, bnb8, fp8, gptq, mxfp4, write_quantized
from tests.bases.test_quantized_files import BNB, BNB8, FORMATS, FP8, GPTQ, IDS, MXFP4
from tests.layouts import row_logits

# The representation of each format.
KEPT = {
    **dict.fromkeys(("gptq", "gptq by activation", "gptq without g_idx", "gptq of 8 bits", "gptq_v2", "awq"), Grouped),
    **dict.fromkeys(("compressed-tensors", "compressed-tensors by activation"), Grouped),
    **dict.fromkeys(("nf4", "nf4 nested", "fp4"), Codebook),
    "fp8 whole": Fp8,
}


def is_kernel(leaf):
    return isinstance(leaf, KernelArray)


def kernels(base):
    return [leaf for leaf in jax.tree.leaves(base.params, is_leaf=is_kernel) if is_kernel(leaf)]


def check_same(found, expected):
    """Checks that the kernels have the numbers of the float ones, bit for bit, and the function is the same."""
    numbers = jax.jit(lambda params: jax.tree.map(dense, params, is_leaf=is_kernel))(found.params)
    jax.tree.map(np.testing.assert_array_equal, numbers, expected.params)
    assert found.fingerprint == expected.fingerprint
    np.testing.assert_allclose(row_logits(found, IDS), row_logits(expected, IDS), atol=1e-4, rtol=0)
    assert np.std(row_logits(found, IDS)) > 0.2


@pytest.mark.parametrize("name", KEPT)
def test_numbers_function_and_fingerprint_are_those_of_the_dequantized_base(name, tmp_path):
    pack, quantization, note = FORMATS[name]
    packed, plain = write_quantized(tmp_path, pack, quantization, hidden_size=64, num_hidden_layers=2)
    found, expected = load_base(packed, dtype="float32", quantize="keep"), load_base(plain, dtype="float32")
    assert len(kernels(found)) == 7 and {type(kernel) for kernel in kernels(found)} == {KEPT[name]}
    check_same(found, expected)
    assert found.files_note == f"{note}; kept packed"
    shape = StepShape(rows=1, length=8, outputs=8, lead=8)
    estimate = step_memory(found.config, shape, remat="dots", itemsize=4, mesh=found.mesh, params=found.params)
    assert estimate.weights == sum(a.nbytes for a in jax.tree.leaves(found.params)) + DENSE_COPIES * 4 * 64 * 64


def test_experts_in_blocks(tmp_path):
    """Columns of gates and of up-projections alternate in one stored weight."""
    sizes = {"intermediate_size": 32, "num_local_experts": 3, "hidden_size": 64}
    packed, _ = write_quantized(tmp_path, mxfp4(), MXFP4, "gpt_oss", **sizes)
    found = load_base(packed, dtype="float32", quantize="keep")
    assert [type(kernel) for kernel in kernels(found)] == [Codebook] * 3
    assert {kernel.packed.nbytes / math.prod(dense(kernel).shape) for kernel in kernels(found)} == {0.5}
    check_same(found, load_base(packed, dtype="float32"))


@pytest.mark.parametrize("name", ["gptq by activation", "awq"])
def test_weights_that_hold_several_kernels(name, tmp_path):
    pack, quantization, _ = FORMATS[name]
    packed, _ = write_quantized(tmp_path, pack, quantization, "phi3", num_hidden_layers=2)
    found = load_base(packed, dtype="float32", quantize="keep")
    assert len(kernels(found)) == 7
    check_same(found, load_base(packed, dtype="float32"))


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"fsdp": 2}], ids=str)
@pytest.mark.parametrize("name", ["gptq by activation", "nf4"])
def test_meshes(name, axes, tmp_path):
    pack, quantization, _ = FORMATS[name]
    packed, plain = write_quantized(tmp_path, pack, quantization, hidden_size=64, num_hidden_layers=1)
    split = load_base(packed, dtype="float32", quantize="keep", mesh=make_mesh(MeshConfig(**axes)))
    assert all(not jax.tree.leaves(kernel)[0].sharding.is_fully_replicated for kernel in kernels(split))
    whole = load_base(plain, dtype="float32")
    np.testing.assert_allclose(row_logits(split, IDS), row_logits(whole, IDS), atol=1e-4, rtol=0)


REFUSED = {
    "codes of 2 bits": (FORMATS["gptq of 2 bits"], {}, "GPTQ, 2 bits, groups of 8"),
    "unequal groups": ((gptq(4, 24), GPTQ | {"group_size": 24}), {}, "GPTQ, 4 bits, groups of 24"),
    "blocks of both axes": ((fp8((24, 20)), FP8), {}, "fp8, blocks of 24 x 20"),
    "blocks over several outputs": ((bnb4(), BNB), {"hidden_size": 32}, "bitsandbytes, nf4"),
    "int8 of bitsandbytes": ((bnb8(), BNB8), {}, "bitsandbytes, int8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_named(name, tmp_path):
    (pack, quantization, *_), sizes, how = REFUSED[name]
    packed, _ = write_quantized(tmp_path, pack, quantization, num_hidden_layers=1, **{"hidden_size": 64} | sizes)
    with pytest.raises(ConfigError, match=rf"keep: layers/.*/kernel is stored as {how}; kept are .*Set another"):
        load_base(packed, quantize="keep")


def test_layers_that_are_stored_in_different_ways_are_refused(tmp_path):
    """Half of the weights have scales in float32, which the float16 ones of the first layer cannot hold."""
    pack, quantization, _ = FORMATS["gptq"]
    written = itertools.count()

    def packed(weight):
        stored, values = pack(weight)
        dtype = np.float32 if next(written) >= 7 else np.float16
        return stored | {".scales": stored[".scales"].astype(dtype)}, values

    folder, _ = write_quantized(tmp_path, packed, quantization, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"layers\.1.*keep needs every 'scale' of a kernel alike.* float32"):
        load_base(folder, quantize="keep")


def test_encoder_decoders_are_refused():
    with pytest.raises(ConfigError, match="keep does not support encoder-decoders"):
        tiny_base("t5", quantize="keep")


def test_values_beyond_the_range_of_the_products_are_named(tmp_path):
    pack, quantization, _ = FORMATS["gptq"]

    def large(weight):
        return pack(weight * (1e5 / np.abs(weight).max()))

    packed, _ = write_quantized(tmp_path, large, quantization, hidden_size=64, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"proj\.weight' holds values beyond the range of float16"):
        load_base(packed, dtype="float16", quantize="keep")
