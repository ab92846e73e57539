"""Quantized checkpoints as transformers reads them, and the published torch code that unpacks GPTQ and AWQ."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import safetensors.torch
import transformers
from safetensors.torch import load_file

from spt_jax.bases.base import load_base
from spt_jax.bases.quantized_files import file_quantization
from spt_jax.bases.quantized_files.opened import QuantizedCheckpoint
from spt_jax.bases.quantized_files.stored import StoredTensors
from tests.bases.quantized_checkpoints import awq, fp8, gptq, mxfp4, write_quantized
from tests.bases.test_quantized_files import AWQ, FP8, GPTQ, MXFP4
from tests.layouts import row_logits

pytestmark = pytest.mark.parity
IDS = np.arange(3, 43)


def their_logits(directory, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS[None])).logits[0].numpy()


def our_weights(file, quantization, names):
    """Returns weights as they are read, before they are cast."""
    with StoredTensors([file]) as stored:
        checkpoint = QuantizedCheckpoint(stored, file_quantization(quantization))
        with checkpoint.open(file, []) as opened:
            return [opened.read(name) for name in names]


def test_mxfp4(tmp_path):
    sizes = {"intermediate_size": 32, "num_local_experts": 3, "hidden_size": 64}
    packed, _ = write_quantized(tmp_path, mxfp4(), MXFP4, "gpt_oss", **sizes)
    theirs = their_logits(packed, quantization_config=transformers.Mxfp4Config(dequantize=True))
    np.testing.assert_allclose(row_logits(load_base(packed, dtype="float32"), IDS), theirs, atol=1e-4, rtol=0)
    assert np.std(theirs) > 0.3


def test_all_codes_and_exponents_of_mxfp4(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 2, 16).repeat(16, 1, 1, 1)
    # The largest exponent gives infinity, which is refused where tensors are read.
    scales = torch.arange(254, -2, -1).clamp(min=0).to(torch.uint8).reshape(16, 8, 2)
    safetensors.torch.save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "a.safetensors")
    (ours,) = our_weights(tmp_path / "a.safetensors", MXFP4, ["w"])
    with np.errstate(over="ignore"):
        theirs = convert_moe_packed_tensors(blocks, scales)
    assert ours.shape == tuple(theirs.shape) == (16, 64, 8)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize("scale_type", ["float32", "bfloat16"])
def test_fp8(scale_type, tmp_path):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    config = FP8 | {"weight_block_size": [16, 16]}
    packed, _ = write_quantized(tmp_path, fp8((16, 16), scale_type), config, num_hidden_layers=1)
    tensors = load_file(packed / "model.safetensors")
    names = [name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")]
    assert len(names) == 7
    for name, ours in zip(names, our_weights(packed / "model.safetensors", config, names), strict=True):
        theirs = Fp8Dequantize(None)._dequantize_one(tensors[name], tensors[f"{name}_scale_inv"], torch.float32)
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_fp8_model(tmp_path):
    config = FP8 | {"weight_block_size": [16, 16]}
    packed, _ = write_quantized(tmp_path, fp8((16, 16)), config, num_hidden_layers=2)
    options = transformers.FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    theirs = their_logits(packed, quantization_config=options)
    np.testing.assert_allclose(row_logits(load_base(packed, dtype="float32"), IDS), theirs, atol=1e-4, rtol=0)


def auto_gptq(qweight, qzeros, scales, g_idx, bits):
    """Returns the weight [in, out] as `QuantLinear` of AutoGPTQ computes it (qlinear_cuda_old.py, 2, 4 and 8 bits)."""
    wf = torch.arange(0, 32, bits, dtype=torch.int32).unsqueeze(0)
    top = 2**bits - 1
    zeros = torch.bitwise_right_shift(qzeros.unsqueeze(2).expand(-1, -1, 32 // bits), wf.unsqueeze(0)) & top
    zeros = ((zeros + 1) & top).reshape(scales.shape)
    weight = torch.bitwise_right_shift(qweight.unsqueeze(1).expand(-1, 32 // bits, -1), wf.unsqueeze(-1)) & top
    weight = weight.reshape(-1, weight.shape[2])
    return scales[g_idx.long()] * (weight - zeros[g_idx.long()])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq(bits, tmp_path):
    """The values of AutoGPTQ are in float16: ours are those before they are rounded."""
    config = GPTQ | {"bits": bits}
    packed, _ = write_quantized(tmp_path, gptq(bits, 16, shuffled=True), config, num_hidden_layers=1)
    tensors = load_file(packed / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    ours = our_weights(packed / "model.safetensors", config, [f"{module}.weight" for module in modules])
    for module, weight in zip(modules, ours, strict=True):
        parts = [tensors[f"{module}.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")]
        np.testing.assert_array_equal(weight.astype(np.float16), auto_gptq(*parts, bits).T.numpy())


def auto_awq(qweight, qzeros, scales, group_size):
    """Returns the weight [in, out] as `dequantize_gemm` of AutoAWQ computes it (awq/utils/packing_utils.py)."""
    shifts = torch.arange(0, 32, 4)
    unpacked = [
        torch.bitwise_right_shift(packed[:, :, None], shifts[None, None, :]).to(torch.int8).view(len(packed), -1)
        for packed in (qweight, qzeros)
    ]
    order = torch.arange(unpacked[0].shape[-1]).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
    weight, zeros = (torch.bitwise_and(codes[:, order], 15) for codes in unpacked)
    scales, zeros = (part.repeat_interleave(group_size, dim=0) for part in (scales, zeros))
    return (weight - zeros) * scales


def test_awq(tmp_path):
    """The values of AutoAWQ are in float16: ours are those before they are rounded."""
    packed, _ = write_quantized(tmp_path, awq(16), AWQ, num_hidden_layers=1)
    tensors = load_file(packed / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    ours = our_weights(packed / "model.safetensors", AWQ, [f"{module}.weight" for module in modules])
    for module, weight in zip(modules, ours, strict=True):
        parts = [tensors[f"{module}.{name}"] for name in ("qweight", "qzeros", "scales")]
        np.testing.assert_array_equal(weight.astype(np.float16), auto_awq(*parts, 16).T.numpy())
