"""Quantized checkpoints are bases: bit for bit those of the plain checkpoints with the values of their codes."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import describe_base, load_base
from spt_jax.bases.quantized_files import file_quantization
from spt_jax.bases.quantized_files.opened import QuantizedCheckpoint
from spt_jax.bases.quantized_files.stored import StoredTensors
from tests.bases.quantized_checkpoints import (
    awq,
    bnb4,
    bnb8,
    change_config,
    compressed,
    fp8,
    gptq,
    load,
    mxfp4,
    save,
    write_quantized,
)
from tests.layouts import row_logits

GOLDEN = Path(__file__).parents[1] / "golden"
IDS = np.arange(3, 43)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 20], "activation_scheme": "dynamic"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}


def compressed_config(weights, form="pack-quantized"):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.layers.*.self_attn"]}
# What is packed, config, and the line that a run prints.
FORMATS = {
    "gptq": (gptq(4, 16), GPTQ, "GPTQ, 4 bits, groups of 16"),
    "gptq by activation": (gptq(4, 16, shuffled=True), GPTQ | {"desc_act": True}, "GPTQ, 4 bits, groups of 16"),
    "gptq without g_idx": (gptq(4, 16, index=False), GPTQ, "GPTQ, 4 bits, groups of 16"),
    "gptq of 8 bits": (gptq(8, -1), GPTQ | {"bits": 8, "group_size": -1}, "GPTQ, 8 bits, one group"),
    "gptq of 2 bits": (gptq(2, 8), GPTQ | {"bits": 2, "group_size": 8}, "GPTQ, 2 bits, groups of 8"),
    "gptq_v2": (
        gptq(4, 16, stored_offset=0),
        GPTQ | {"checkpoint_format": "gptq_v2"},
        "GPTQ, 4 bits, groups of 16",
    ),
    "awq": (awq(16), AWQ, "AWQ, 4 bits, groups of 16"),
    "compressed-tensors": (
        compressed(4, 16),
        compressed_config(INT4),
        "compressed-tensors, int4, a scale per 1 x 16 values",
    ),
    "compressed-tensors by activation": (
        compressed(4, 16, shuffled=True),
        compressed_config(INT4 | {"actorder": "group"}),
        "compressed-tensors, int4, a scale per 1 x 16 values",
    ),
    "fp8": (fp8((24, 20)), FP8, "fp8, blocks of 24 x 20"),
    "fp8 whole": (fp8(None), FP8 | {"weight_block_size": None}, "fp8, a scale for each matrix"),
    "nf4": (bnb4(), BNB, "bitsandbytes, nf4"),
    "nf4 nested": (bnb4(nested=True, dtype="float16"), BNB, "bitsandbytes, nf4"),
    "fp4": (bnb4("fp4", dtype="float32"), BNB | {"bnb_4bit_quant_type": "fp4"}, "bitsandbytes, fp4"),
    "int8": (bnb8(), BNB8, "bitsandbytes, int8"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_base_is_that_of_the_dequantized_weights(name, tmp_path):
    pack, quantization, note = FORMATS[name]
    packed, dense = write_quantized(tmp_path, pack, quantization, num_hidden_layers=1)
    found, expected = load_base(packed, dtype="float32"), load_base(dense, dtype="float32")
    assert found.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(row_logits(found, IDS), row_logits(expected, IDS))
    assert np.std(row_logits(found, IDS)) > 0.3
    assert describe_base(found).splitlines()[-1] == f"files: {note}; kept in float32"
    assert "files:" not in describe_base(expected)


def test_mxfp4_experts(tmp_path):
    packed, dense = write_quantized(tmp_path, mxfp4(), MXFP4, "gpt_oss", intermediate_size=32, num_local_experts=3)
    found, expected = load_base(packed, dtype="float32"), load_base(dense, dtype="float32")
    np.testing.assert_array_equal(row_logits(found, IDS), row_logits(expected, IDS))
    assert np.std(row_logits(found, IDS)) > 0.3


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantized_again(quantize, tmp_path):
    packed, dense = write_quantized(tmp_path, gptq(4, 16), GPTQ, num_hidden_layers=1)
    found, expected = (load_base(path, dtype="float32", quantize=quantize) for path in (packed, dense))
    assert found.fingerprint == expected.fingerprint and found.fingerprint.quantize == quantize
    np.testing.assert_array_equal(row_logits(found, IDS), row_logits(expected, IDS))
    assert found.files_note == f"GPTQ, 4 bits, groups of 16; kept in {quantize}"


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_tensors_that_bitsandbytes_wrote(kind, tmp_path):
    """The state dicts of `Linear4bit` (nf4 with nested scales) and `Linear8bitLt` of bitsandbytes 0.50.2 on random
    weights, and in `expected` what its `dequantize_4bit` and `int8_vectorwise_dequant` return."""
    tensors = safetensors.numpy.load_file(GOLDEN / "bitsandbytes.safetensors")
    expected = tensors.pop(f"{kind}.expected")
    save({name: tensor for name, tensor in tensors.items() if name.startswith(f"{kind}.")}, tmp_path)
    config = BNB8 if kind == "int8" else BNB | {"bnb_4bit_quant_type": kind}
    found = read_only_weight(tmp_path, config, kind)
    assert found.dtype == expected.dtype and found.shape == (6, 64) and found.astype(np.float32).std() > 0.5
    np.testing.assert_array_equal(found, expected)


def read_only_weight(directory, config, module):
    """Returns the only weight of a checkpoint."""
    with StoredTensors([directory / "model.safetensors"]) as stored:
        checkpoint = QuantizedCheckpoint(stored, file_quantization(config))
        with checkpoint.open(directory / "model.safetensors", []) as opened:
            assert list(opened.names()) == [f"{module}.weight"]
            found = opened.read(f"{module}.weight")
            assert opened.shape(f"{module}.weight") == found.shape
            return found


INT8, FLOAT8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("int4_group", compressed_config(INT4 | {"symmetric": True})),
        ("int4_zeros", compressed_config(INT4)),
        ("int8_packed", compressed_config(INT8 | {"strategy": "channel"})),
        ("int8_channel", compressed_config(INT8 | {"strategy": "channel"}, "int-quantized")),
        ("float8_channel", compressed_config(FLOAT8 | {"strategy": "channel"}, "float-quantized")),
        ("float8_tensor", compressed_config(FLOAT8 | {"strategy": "tensor"}, "float-quantized")),
        (
            "float8_block",
            compressed_config(FLOAT8 | {"strategy": "block", "block_structure": [4, 16]}, "naive-quantized"),
        ),
    ],
)
def test_tensors_that_compressed_tensors_wrote(name, config, tmp_path):
    """What `compress` of compressed-tensors 0.20.1 returns for random weights; `expected` is what `decompress` makes of
    it. It multiplies in bfloat16, to which exact products are rounded here."""
    tensors = golden_tensors("compressed_tensors.safetensors")
    expected = tensors.pop(f"{name}.expected")
    save({own: tensor for own, tensor in tensors.items() if own.startswith(f"{name}.")}, tmp_path)
    found = read_only_weight(tmp_path, config, name)
    assert found.dtype == np.float32 and found.shape == (12, 64) and found.std() > 0.5
    np.testing.assert_array_equal(found.astype(expected.dtype), expected)


def golden_tensors(name):
    """Returns the tensors of a file, 8-bit floats among them."""
    with StoredTensors([GOLDEN / name]) as stored:
        headers = stored.headers.items()
        return {
            own: stored.read(own).view(ml_dtypes.float8_e4m3fn) if header.dtype == "F8_E4M3" else stored.read(own)
            for own, header in headers
        }


def test_parts_of_a_weight_in_several_files(tmp_path):
    packed, _ = write_quantized(tmp_path, awq(16), AWQ, num_hidden_layers=1)
    expected = load_base(packed, dtype="float32").fingerprint
    tensors = load(packed)
    (packed / "model.safetensors").unlink()
    weight_map = {}
    for at in range(2):
        own = dict(sorted(tensors.items())[at::2])
        safetensors.numpy.save_file(own, packed / f"{at}.safetensors")
        weight_map |= dict.fromkeys(own, f"{at}.safetensors")
    (packed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_base(packed, dtype="float32").fingerprint == expected


def test_zero_biases_of_auto_gptq_are_left_out(tmp_path):
    packed, _ = write_quantized(tmp_path, gptq(4, 16), GPTQ, num_hidden_layers=1)
    expected, tensors = load_base(packed, dtype="float32").fingerprint, load(packed)
    bias = "model.layers.0.mlp.up_proj.bias"
    save(tensors | {bias: np.zeros(64, np.float16)}, packed)
    assert load_base(packed, dtype="float32").fingerprint == expected
    save(tensors | {bias: np.ones(64, np.float16)}, packed)
    with pytest.raises(Exception, match=r"does not have: 'model\.layers\.0\.mlp\.up_proj\.bias'"):
        load_base(packed, dtype="float32")


def test_plain_modules_and_a_quantized_output_matrix(tmp_path):
    """Which modules are quantized is decided by the tensors."""
    packed, dense = write_quantized(tmp_path, gptq(4, 16), GPTQ, num_hidden_layers=1)
    stored, plain = load(packed), load(dense)
    module = "model.layers.0.self_attn.q_proj"
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith(module)}
    stored[f"{module}.weight"] = plain[f"{module}.weight"]
    parts, plain["lm_head.weight"] = gptq(4, 16)(stored.pop("lm_head.weight"))
    save(stored | {f"lm_head{suffix}": part for suffix, part in parts.items()}, packed)
    save(plain, dense)
    change_config(packed, quantization_config=GPTQ | {"modules_to_not_convert": ["q_proj"]})
    assert load_base(packed, dtype="float32").fingerprint == load_base(dense, dtype="float32").fingerprint
