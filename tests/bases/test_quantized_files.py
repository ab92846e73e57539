"""Quantized checkpoints are bases: bit for bit those of the plain checkpoints with the values of their codes."""

import json
from pathlib import Path

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
    file = tmp_path / "model.safetensors"
    config = BNB8 if kind == "int8" else BNB | {"bnb_4bit_quant_type": kind}
    with StoredTensors([file]) as stored:
        checkpoint = QuantizedCheckpoint(stored, file_quantization(config))
        with checkpoint.open(file, []) as opened:
            assert list(opened.names()) == [f"{kind}.weight"] and opened.shape(f"{kind}.weight") == (6, 64)
            found = opened.read(f"{kind}.weight")
    assert found.dtype == expected.dtype and found.astype(np.float32).std() > 0.5
    np.testing.assert_array_equal(found, expected)


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
