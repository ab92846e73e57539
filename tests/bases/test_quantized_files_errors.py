"""Damaged or contradictory quantized checkpoints are refused before a weight is read, by the names of tensors."""

import json

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from spt_jax.bases.base import load_base
from spt_jax.bases.quantized_files import FORMATS, file_quantization
from spt_jax.bases.quantized_files.stored import StoredTensors
from spt_jax.errors import CheckpointError, ConfigError
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
from tests.bases.test_quantized_files import AWQ, BNB, BNB8, FP8, GPTQ, INT4, MXFP4, compressed_config

MODULE = "model.layers.0.mlp.up_proj"  # a weight [64, 32]
EXPERTS = "model.layers.0.mlp.experts.down_proj"
STATE = f"{MODULE}.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch):
    """Only indices and descriptions are."""
    read = StoredTensors.read

    def small(self, name):
        assert name.endswith((".g_idx", "_g_idx", "__nf4", ".weight_format", ".weight_shape", ".quant_map")), (
            f"{name} was read"
        )
        return read(self, name)

    monkeypatch.setattr(StoredTensors, "read", small)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "quip"}, "method 'quip' are not supported; supported are " + ", ".join(FORMATS)),
        ({"quant_method": ["gptq"]}, r"method \['gptq'\] are not supported"),
        ({}, "method None"),
        ([], r"'quantization_config' is \[\]; it must be an object"),
        (GPTQ | {"bits": 3}, r"\(gptq\): 'bits' is 3; GPTQ files of 2, 4 and 8 bits"),
        (GPTQ | {"bits": "4"}, "'bits' is '4'"),
        (GPTQ | {"bits": True}, "'bits' is True"),
        (GPTQ | {"group_size": 0}, "'group_size' is 0; it must be a positive integer, or -1"),
        (GPTQ | {"group_size": "128"}, "'group_size' is '128'"),
        (GPTQ | {"checkpoint_format": "marlin"}, "'checkpoint_format' is 'marlin'; 'gptq' and 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, "'checkpoint_format' is 'marlin'"),
        (GPTQ | {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "'dynamic' gives some modules other bits"),
        (GPTQ | {"modules_to_not_convert": "lm_head"}, "must be a list of names"),
        (AWQ | {"bits": 8}, r"\(awq\): 'bits' is 8; AWQ files of 4 bits"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; AWQ files of version 'gemm'"),
        (AWQ | {"version": None, "checkpoint_format": "gemv_fast"}, "version is 'gemv_fast'"),
        (AWQ | {"backend": "llm-awq"}, "'backend' is 'llm-awq'"),
        (AWQ | {"zero_point": False}, "'zero_point' is False"),
        (AWQ | {"group_size": -2}, "'group_size' is -2"),
        (FP8 | {"fmt": "e5m2"}, r"\(fp8\): 'fmt' is 'e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"'weight_block_size' is \[128\]; it must be two positive integers"),
        (FP8 | {"weight_block_size": [128, 0]}, r"'weight_block_size' is \[128, 0\]"),
        (compressed_config(INT4 | {"num_bits": 3}), r"\(compressed-tensors\): weights are 'int' of 3 bits"),
        (compressed_config(INT4, "int-quantized"), "weights are 'int' of 4 bits, which is not supported in 'int-"),
        (compressed_config(INT4 | {"type": "float"}), "weights are 'float' in 'pack-quantized'"),
        (
            compressed_config(INT4, "nvfp4-pack-quantized"),
            "'format' is 'nvfp4-pack-quantized'; read are pack-quantized",
        ),
        (compressed_config(INT4 | {"strategy": "token"}), "'strategy' is 'token'; read are tensor, channel"),
        (compressed_config(INT4 | {"group_size": None}), "'group_size' is None"),
        (compressed_config(INT4 | {"strategy": "block"}), "'block_structure' is None"),
        (compressed_config(None), "must quantize all weights alike"),
        (compressed_config(INT4) | {"config_groups": {}}, "'config_groups' must be an object that is not empty"),
        (compressed_config(INT4) | {"sparsity_config": {"format": "marlin-24"}}, "'sparsity_config' is not supported"),
        (BNB | {"load_in_8bit": True}, r"\(bitsandbytes\): exactly one of 'load_in_4bit' and 'load_in_8bit'"),
        (BNB | {"load_in_4bit": False}, "exactly one of"),
        (BNB | {"bnb_4bit_quant_type": "int4"}, "'bnb_4bit_quant_type' is 'int4'; 'nf4' and 'fp4'"),
    ],
)
def test_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        file_quantization(fields)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.text(max_size=4) | st.sampled_from(["int", "group", "gemm"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weights", "a"]), inner, max_size=2),
    max_leaves=5,
)
CONFIGS = (AWQ, BNB, FP8, GPTQ, compressed_config(INT4), compressed_config(INT4)["config_groups"]["group_0"]["weights"])


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.sampled_from(CONFIGS), st.data())
def test_any_config_is_read_or_refused(fields, data):
    names = [*fields, "format", "dynamic", "checkpoint_format", "block_structure", "sparsity_config"]
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    changed = {**fields, **changes}
    if "num_bits" in fields:
        changed = compressed_config(changed)
    try:
        found = file_quantization(changed)
    except ConfigError:
        return
    assert found is not None and str(found.how)


def test_configs_that_are_written_otherwise():
    old = {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True, "quant_method": "awq"}
    for fields, note in (
        (old, "AWQ, 4 bits, groups of 64"),
        ({"load_in_8bit": True}, "bitsandbytes, int8"),
        (GPTQ | {"dynamic": {"-:.*down_proj": {}}}, "GPTQ, 4 bits, groups of 16"),
        ({"load_in_4bit": True}, "bitsandbytes, fp4"),
    ):
        assert str(file_quantization(fields).how) == note


def without(name):
    return lambda tensors: {own: tensor for own, tensor in tensors.items() if own != name}


def with_(name, change):
    return lambda tensors: tensors | {name: change(tensors.get(name))}


def renamed(old, new):
    return lambda tensors: without(old)(tensors) | {new: tensors[old]}


def state(**fields):
    def change(stored):
        return np.frombuffer(json.dumps(json.loads(stored.tobytes()) | fields).encode(), np.uint8)

    return with_(STATE, change)


PACKS = {
    "gptq": (gptq(4, 16), GPTQ),
    "awq": (awq(16), AWQ),
    "compressed": (compressed(4, 16, shuffled=True), compressed_config(INT4)),
    "fp8": (fp8((24, 20)), FP8),
    "nf4": (bnb4(nested=True), BNB),
    "int8": (bnb8(), BNB8),
    "mxfp4": (mxfp4(), MXFP4),
}
QWEIGHT, QZEROS, SCALES, G_IDX = (f"{MODULE}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", without(SCALES), rf"'{QWEIGHT}' is in the file, and '{SCALES}' is missing"),
        ("gptq", without(QWEIGHT), rf"'{QZEROS}' is in the file, and '{QWEIGHT}' is missing"),
        ("gptq", with_(QWEIGHT, lambda t: t[:3]), r"g_idx' has shape \(32,\), and must have \(24,\)"),
        ("gptq", with_(QWEIGHT, lambda t: t[:2]), r"scales' has shape \(2, 64\), and must have \(1, 64\)"),
        ("gptq", with_(QWEIGHT, lambda t: t.astype(np.int64)), r"qweight' holds I64; it must be I32"),
        ("gptq", with_(QWEIGHT, lambda t: t[None]), r"qweight' has shape \(1, 4, 64\); it must have 2 axes"),
        ("gptq", with_(QWEIGHT, lambda t: t[:0]), r"qweight' has shape \(0, 64\).*none empty"),
        ("gptq", with_(QZEROS, lambda t: t[:, :4]), r"qzeros' has shape \(2, 4\), and must have \(2, 8\)"),
        ("gptq", with_(SCALES, lambda t: t.astype(np.int32)), r"scales' holds I32; it must be F64 or F32"),
        ("gptq", with_(G_IDX, lambda t: t + 1), r"g_idx' names groups 1 to 2; there are 2"),
        ("gptq", with_(G_IDX, lambda t: t - 1), r"g_idx' names groups -1 to 0; there are 2"),
        ("gptq", with_(G_IDX, lambda t: t[:16]), r"g_idx' has shape \(16,\), and must have \(32,\)"),
        ("gptq", with_(f"{MODULE}.weight", lambda _: np.ones((64, 32), np.float16)), r"are both in the checkpoint"),
        ("awq", without(QZEROS), rf"'{QZEROS}' is missing"),
        ("awq", with_(SCALES, lambda t: t[:1]), r"scales' has shape \(1, 64\), and must have \(2, 64\)"),
        ("awq", with_(QWEIGHT, lambda t: t[:24]), r"qweight' has 24 rows; the group size 16 must divide them"),
        ("compressed", without(f"{MODULE}.weight_scale"), r"weight_scale' is missing"),
        ("compressed", without(f"{MODULE}.weight_zero_point"), r"weight_zero_point' is missing"),
        ("compressed", without(f"{MODULE}.weight_packed"), r"weight_packed' is missing"),
        ("compressed", without(f"{MODULE}.weight_shape"), r"weight_shape' is missing"),
        ("compressed", with_(f"{MODULE}.weight_shape", lambda t: t + 8), r"weight_shape' is \[72, 40\]; .*\(64, 4\)"),
        ("compressed", with_(f"{MODULE}.weight_shape", lambda t: -t), r"weight_shape' is \[-64, -32\]"),
        (
            "compressed",
            with_(f"{MODULE}.weight_scale", lambda t: t[:, :1]),
            r"shape \(64, 1\), and must have \(64, 2\)",
        ),
        ("compressed", with_(f"{MODULE}.weight_zero_point", lambda t: t[:7]), r"\(7, 2\), and must have \(8, 2\)"),
        ("compressed", with_(f"{MODULE}.weight_g_idx", lambda t: t + 1), r"weight_g_idx' names groups 1 to 2"),
        ("fp8", without(f"{MODULE}.weight_scale_inv"), r"up_proj\.weight_scale_inv' is missing"),
        ("fp8", without(f"{MODULE}.weight"), r"weight_scale_inv' is in the file, and '.*' is missing"),
        ("fp8", with_(f"{MODULE}.weight_scale_inv", lambda t: t[:2]), r"has shape \(2, 2\), and must have \(3, 2\)"),
        ("nf4", without(f"{MODULE}.weight"), r"up_proj\.weight' is missing"),
        ("nf4", without(STATE), r"absmax' is in the file, and '.*quant_state\.bitsandbytes__nf4' is missing"),
        (
            "nf4",
            with_(f"{MODULE}.weight", lambda t: t[:-1]),
            r"\(1023, 1\); 2048 codes of 4 bits take 1024 bytes",
        ),
        (
            "nf4",
            with_(f"{MODULE}.weight.absmax", lambda t: t[:-1]),
            r"shape \(31,\), and must have \(32,\): .* of 64",
        ),
        ("nf4", with_(f"{MODULE}.weight.quant_map", lambda t: t[:8]), r"quant_map' has shape \(8,\)"),
        ("nf4", without(f"{MODULE}.weight.nested_absmax"), r"nested_absmax' is missing"),
        ("nf4", with_(STATE, lambda t: t[:-3]), r"nf4' is not a quantization state \(JSONDecodeError"),
        ("nf4", with_(STATE, lambda t: t.astype(np.int32)), r"nf4' holds I32 of shape"),
        ("nf4", state(shape=[64, 1 << 40]), r"says shape is \[64, 1099511627776\]"),
        ("nf4", state(shape=[64]), r"says shape is \[64\]"),
        ("nf4", state(blocksize=0), r"says blocksize is 0"),
        ("nf4", state(blocksize=48), r"says blocksize is 48"),
        ("nf4", state(blocksize=128), r"absmax' has shape \(32,\), and must have \(16,\)"),
        ("nf4", state(dtype="complex64"), r"says dtype is 'complex64'"),
        ("nf4", state(quant_type="fp4"), r"says quant_type is 'fp4'"),
        ("nf4", state(nested_offset="1"), r"says nested_offset is '1'"),
        ("nf4", state(nested_blocksize=0), r"absmax' holds U8; it must be F32"),
        ("int8", with_(f"{MODULE}.SCB", lambda t: t[:-1]), r"SCB' has shape \(63,\), and must have \(64,\)"),
        ("int8", with_(f"{MODULE}.weight_format", lambda t: t + np.uint8(1)), r"weight_format' is 1; weights in rows"),
        ("int8", without(f"{MODULE}.SCB"), r"weight_format' is in the file, and '.*SCB' is missing"),
        ("mxfp4", without(f"{EXPERTS}_scales"), r"down_proj_scales' is missing"),
        ("mxfp4", without(f"{EXPERTS}_blocks"), r"down_proj_blocks' is missing"),
        ("mxfp4", with_(f"{EXPERTS}_blocks", lambda t: t[..., :8]), r"has blocks of 8 bytes; those of MXFP4 have 16"),
        (
            "mxfp4",
            with_(f"{EXPERTS}_scales", lambda t: t[:, :-1]),
            r"\(2, 31, 1\), and must have \(2, 32, 1\)",
        ),
    ],
)
def test_tensors(name, change, message, tmp_path, quantized):
    directory = quantized(name)
    original = quantized.tensors[name]
    save(change(original), directory)
    with pytest.raises(CheckpointError, match=message):
        load_base(directory)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Returns the directory of a checkpoint by its name in `PACKS`; its tensors are in `tensors`."""
    directories = {}

    def find(name):
        if name not in directories:
            pack, quantization = PACKS[name]
            sizes = {"num_hidden_layers": 2, "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
            options = ("gpt_oss", sizes) if name == "mxfp4" else ("llama", {"num_hidden_layers": 1})
            directory, _ = write_quantized(tmp_path_factory.mktemp(name), pack, quantization, options[0], **options[1])
            directories[name] = directory
            find.tensors[name] = load_all(directory)
        return directories[name]

    find.tensors = {}
    return find


def load_all(directory):
    """Reads the tensors, 8-bit floats among them."""
    with StoredTensors([directory / "model.safetensors"]) as stored:
        names = {name: header.dtype for name, header in stored.headers.items()}
        if "F8_E4M3" not in names.values():
            return load(directory)
        bytes_ = {name: READ(stored, name) for name in names}
    return {name: t.view(ml_dtypes.float8_e4m3fn) if names[name] == "F8_E4M3" else t for name, t in bytes_.items()}


READ = StoredTensors.read


def config_of(directory, quantization):
    change_config(directory, quantization_config=quantization)
    return directory


@pytest.mark.parametrize(
    ("name", "quantization", "message"),
    [
        ("gptq", None, r"down_proj\.g_idx' is one of checkpoints that are quantized by gptq or awq"),
        ("fp8", None, r"weight_scale_inv' is one of checkpoints that are quantized by fp8"),
        ("nf4", None, r"is one of checkpoints that are quantized by bitsandbytes"),
        ("mxfp4", None, r"is one of checkpoints that are quantized by mxfp4"),
        ("compressed", None, r"is one of checkpoints that are quantized by compressed-tensors"),
        ("gptq", compressed_config(INT4), r"\(compressed-tensors, int4, .*\), but no tensor has"),
        ("gptq", AWQ, r"down_proj\.qweight' has 8 rows; the group size 16 must divide them"),
        ("awq", GPTQ, r"down_proj\.qweight' has 4 columns; 8 must divide them"),
        ("gptq", FP8, r"weights are quantized \(fp8, blocks of 24 x 20\), but no tensor has"),
        ("nf4", BNB8, r"weights are quantized \(bitsandbytes, int8\), but no tensor has"),
        ("int8", BNB, r"weights are quantized \(bitsandbytes, nf4\), but no tensor has"),
        (
            "nf4",
            BNB | {"bnb_4bit_quant_type": "fp4"},
            r"absmax' is in the file, and '.*bitsandbytes__fp4' is missing",
        ),
        ("gptq", GPTQ | {"group_size": 32}, r"scales' has shape \(4, 32\), and must have \(2, 32\): .* groups of 32"),
        ("gptq", GPTQ | {"bits": 8}, r"scales' has shape \(4, 32\), and must have \(2, 32\): .* of 8 bits"),
        ("fp8", FP8 | {"weight_block_size": [128, 128]}, r"weight_scale_inv' has shape .*must have \(1, 1\)"),
        ("fp8", FP8 | {"weight_block_size": None}, r"weight_scale_inv' has shape .*must be one number"),
        (
            "gptq",
            GPTQ | {"modules_to_not_convert": ["mlp.up_proj"]},
            r"is quantized; config.json says that 'mlp.up_proj'",
        ),
        (
            "int8",
            BNB8 | {"llm_int8_skip_modules": ["up_proj"]},
            r"is quantized; config.json says that 'up_proj' is not",
        ),
    ],
)
def test_configs_that_do_not_agree_with_the_tensors(name, quantization, message, quantized):
    directory = quantized(name)
    save(quantized.tensors[name], directory)
    try:
        with pytest.raises(CheckpointError, match=message):
            load_base(config_of(directory, quantization))
    finally:
        config_of(directory, PACKS[name][1])


def test_a_shape_that_the_config_does_not_have(quantized):
    directory = quantized("awq")
    save(quantized.tensors["awq"], directory)
    change_config(directory, intermediate_size=96)
    try:
        with pytest.raises(CheckpointError, match=r"_proj\.weight' .* has shape .*; the config asks for"):
            load_base(directory)
    finally:
        change_config(directory, intermediate_size=64)
