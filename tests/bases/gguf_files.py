"""GGUF files of tiny models, written with the gguf package as llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spt_jax.bases.base import read_config
from spt_jax.bases.files import read_json
from spt_jax.bases.places import places
from spt_jax.bases.tensors import open_tensors
from spt_jax.testing import write_tiny_checkpoint

# Sizes that blocks of 32 values fit.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
ARCHITECTURES = ("falcon", "gemma", "gemma2", "gemma3", "gpt2", "llama", "olmo2", "phi3", "qwen2", "qwen3")
MODEL_TYPES = {"gemma3": "gemma3_text"}
# What the files do not hold, or only for the sizes of published models.
OVERRIDES = {
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "ffn_hidden_size": 96, "bias": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96},
    "phi3": {
        "num_attention_heads": 4,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.125, 1.25, 1.5, 2.0, 2.5],
            "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
        },
    },
}
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]


def side_by_side(weight: np.ndarray, heads: int) -> np.ndarray:
    """Moves the numbers that are rotated together next to each other, as llama.cpp stores them."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _stored(architecture: str, name: str, weight: np.ndarray, config) -> np.ndarray:
    """Returns a tensor of transformers as llama.cpp's converter stores it."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        return side_by_side(weight, config.heads if ".attn_q." in name else config.kv_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + np.float32(1)
    if architecture == "falcon" and name.endswith("attn_qkv.weight"):
        groups = weight.reshape(config.kv_heads, config.heads // config.kv_heads + 2, -1, weight.shape[1])
        parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
        return np.concatenate([part.reshape(-1, weight.shape[1]) for part in parts])
    if architecture == "gpt2" and name.startswith("blk.") and weight.ndim == 2:
        return np.ascontiguousarray(weight.T)
    return weight


def _restored(architecture: str, name: str, weight: np.ndarray, config) -> np.ndarray:
    """The inverse of `_stored`."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config.heads if ".attn_q." in name else config.kv_heads
        return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight - np.float32(1)
    if architecture == "falcon" and name.endswith("attn_qkv.weight"):
        places = _stored(architecture, name, np.arange(len(weight))[:, None], config)[:, 0]
        return weight[np.argsort(places)]
    return _stored(architecture, name, weight, config)


def _add_decoder(writer: gguf.GGUFWriter, architecture: str, hf: dict) -> None:
    head_size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    if architecture not in ("olmo2", "phi3"):
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
    rope = hf["rope_parameters"]
    if architecture == "gemma3":
        rope = rope["full_attention"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture == "phi3":
        writer.add_rope_dimension_count(int(head_size * rope["partial_rotary_factor"]))
        writer.add_rope_scaling_orig_ctx_len(hf["original_max_position_embeddings"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(hf["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])


def _add_gpt2(writer: gguf.GGUFWriter, hf: dict) -> None:
    writer.add_context_length(hf["n_positions"])
    writer.add_embedding_length(hf["n_embd"])
    writer.add_block_count(hf["n_layer"])
    writer.add_feed_forward_length(hf["n_inner"])
    writer.add_head_count(hf["n_head"])
    writer.add_layer_norm_eps(hf["layer_norm_epsilon"])


def _add_falcon(writer: gguf.GGUFWriter, hf: dict) -> None:
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["ffn_hidden_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_kv_heads"] if hf["new_decoder_architecture"] else 1)
    writer.add_layer_norm_eps(hf["layer_norm_epsilon"])


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
    sizes = {**({} if architecture in ("falcon", "gpt2") else SIZES), **OVERRIDES.get(architecture, {}), **overrides}
    directory = write_tiny_checkpoint(folder / "hf", MODEL_TYPES.get(architecture, architecture), **sizes)
    hf, config = read_json(directory / "config.json", 1 << 20), read_config(directory)
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    if architecture == "gpt2":
        _add_gpt2(writer, hf)
    elif architecture == "falcon":
        _add_falcon(writer, hf)
    else:
        _add_decoder(writer, architecture, hf)
    write_vocabulary(writer, config.vocab_size)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.layers)
    if architecture == "phi3":
        for name in ("short", "long"):
            factors = np.asarray(hf["rope_parameters"][f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    tensors = {}
    weights = directory / "model.safetensors"
    with open_tensors(weights, list(places(config))) as stored:
        for key in stored.names():
            weight = stored.read(key).astype(np.float32)
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert name is not None, key
            weight = _stored(architecture, name, weight, config)
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
        weight = _restored(architecture, name, weight, config)
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
