"""GGUF files of tiny models, written with the gguf package as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spt_jax.bases.base import read_config
from spt_jax.bases.checkpoint import places
from spt_jax.bases.files import read_json
from spt_jax.bases.tensors import open_tensors
from spt_jax.testing import write_tiny_checkpoint

# Sizes that blocks of 32 values fit.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
ARCHITECTURES = ("gemma", "gemma2", "llama", "qwen2", "qwen3")
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]


def side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """Moves the numbers that are rotated together next to each other, as llama.cpp stores them."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    folder: Path,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, object] | None = None,
    **overrides: object,
) -> tuple[Path, Path]:
    """Writes the same model as a Hugging Face directory and as a GGUF file, and returns both.

    Matrices of the directory are rounded as those of the file.
    """
    sizes: dict[str, object] = {**SIZES, **overrides}
    if architecture == "gemma2":  # the file does not hold the scale of queries
        sizes["query_pre_attn_scalar"] = sizes["head_dim"]
    directory = write_tiny_checkpoint(folder / "hf", architecture, **sizes)
    hf, config = read_json(directory / "config.json", 1 << 20), read_config(directory)
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_parameters"]["rope_theta"])
    if architecture == "gemma2":
        writer.add_sliding_window(hf["sliding_window"])
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
    write_vocabulary(writer, config.vocab_size)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.layers)
    tensors = {}
    weights = directory / "model.safetensors"
    with open_tensors(weights, list(places(config))) as stored:
        for key in stored.names():
            weight = stored.read(key).astype(np.float32)
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert name is not None, key
            if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
                weight = side_by_side(weight, config.heads if ".attn_q." in name else config.kv_heads)
            if architecture.startswith("gemma") and name.endswith("norm.weight"):
                weight = weight + np.float32(1)
            own = kind if weight.ndim > 1 else GGMLQuantizationType.F32
            blocks = gguf.quants.quantize(weight, own)
            writer.add_tensor(name, blocks, raw_dtype=own)
            tensors[key] = (gguf.quants.dequantize(blocks, own), name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _round(directory, architecture, tensors, config)
    return directory, file


def _round(directory: Path, architecture: str, tensors: dict, config) -> None:
    import safetensors.numpy

    rounded = {}
    for key, (weight, name) in tensors.items():
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.heads if ".attn_q." in name else config.kv_heads
            weight = weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            weight = weight - np.float32(1)
        rounded[key] = np.ascontiguousarray(weight)
    safetensors.numpy.save_file(rounded, directory / "model.safetensors", metadata={"format": "pt"})


def write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A byte-level vocabulary with two control tokens, a few merges, and a chat template."""
    alphabet = sorted(bytes_to_unicode().values())
    tokens = ["<s>", "</s>", *alphabet, *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2)
    unused = size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + [f"Aunused{i}" for i in range(unused)])
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * unused)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}")
