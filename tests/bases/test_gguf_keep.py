"""`--base.quantize keep`: matrices of a GGUF file stay in their blocks on the device."""

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from spt_jax.bases.base import load_base
from spt_jax.errors import ConfigError
from spt_jax.models.quantized.gguf_blocks import BLOCK_TYPES, GgufKernel, GgufTable
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.cost import DENSE_COPIES, StepShape, step_memory
from tests.bases.gguf_files import ARCHITECTURES, write_gguf
from tests.layouts import row_logits

IDS = np.arange(3, 43)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_function_is_that_of_the_dequantized_base(architecture, tmp_path):
    """The fingerprints too, so that prompts are exchanged."""
    _, file = write_gguf(tmp_path, architecture, Kind.Q4_1)
    ours, theirs = load_base(file, dtype="float32", quantize="keep"), load_base(file, dtype="float32")
    packed = [leaf for leaf in leaves(ours) if isinstance(leaf, GgufKernel)]
    assert len(packed) == (6 if architecture in ("falcon", "gpt2") else 7)
    assert isinstance(ours.params["embedding"], GgufTable)
    np.testing.assert_allclose(row_logits(ours, IDS), row_logits(theirs, IDS), atol=1e-4, rtol=0)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.parameter_count == theirs.parameter_count and ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours.model.embedding_table(), theirs.model.embedding_table(), rtol=1e-6)


def leaves(base):
    return jax.tree.leaves(base.params, is_leaf=lambda leaf: isinstance(leaf, GgufKernel | GgufTable))


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q5_0])
def test_bytes_are_those_of_the_file(kind, tmp_path):
    _, file = write_gguf(tmp_path, "llama", kind)
    base = load_base(file, dtype="float32", quantize="keep")
    kernels = [leaf for leaf in leaves(base) if isinstance(leaf, GgufKernel)]
    block = BLOCK_TYPES[kind.name]
    shapes = [(leaf.rows, leaf.blocks.shape[0] * leaf.blocks.shape[-1]) for leaf in kernels]
    assert sum(leaf.blocks.nbytes for leaf in kernels) == sum(r * c // block.values * block.size for r, c in shapes)
    shape = StepShape(rows=1, length=8, outputs=8, lead=8)
    estimate = step_memory(base.config, shape, remat="dots", itemsize=4, mesh=base.mesh, params=base.params)
    largest = max(rows * leaf.blocks.shape[-1] for leaf, (rows, _) in zip(kernels, shapes, strict=True))
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
    assert estimate.weights == own + DENSE_COPIES * 4 * largest


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"fsdp": 2}], ids=str)
def test_meshes(axes, tmp_path):
    _, file = write_gguf(tmp_path, "llama", Kind.Q8_0, num_key_value_heads=2)
    split = load_base(file, dtype="float32", quantize="keep", mesh=make_mesh(MeshConfig(**axes)))
    whole = load_base(file, dtype="float32", quantize="keep")
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split.params["layers"]))
    np.testing.assert_allclose(row_logits(split, IDS), row_logits(whole, IDS), atol=1e-4, rtol=0)


def test_what_cannot_be_kept_is_refused(tmp_path):
    directory, file = write_gguf(tmp_path, "llama", Kind.F16)
    for base in (directory, file):
        with pytest.raises(ConfigError, match=r"keep is for GGUF files and quantized checkpoints .*; .* has none"):
            load_base(base, quantize="keep")
    write_tiny_checkpoint(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="'kept' is not supported; known: int8, int4, nf4, fp8, keep"):
        load_base(tmp_path / "tiny", quantize="kept")
