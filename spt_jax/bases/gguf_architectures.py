"""Architectures of GGUF files: their config as Hugging Face's files would hold it, and what is restored in tensors.

llama.cpp's converter stores some tensors in another order or with another offset than transformers; what it changes is
undone per architecture. Source: `convert_hf_to_gguf.py` of https://github.com/ggml-org/llama.cpp.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.bases.gguf_header import GgufHeader, read_tensor
from spt_jax.errors import CheckpointError

# Tensors that are facts about RoPE.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_POSITIONS = 8192


class Facts:
    """Metadata of one architecture, with checked types."""

    def __init__(self, file: Path, header: GgufHeader) -> None:
        """Prepares for a file's header."""
        self.file, self.header = file, header
        self.architecture = str(header.metadata.get("general.architecture"))

    def get(self, name: str, kind: type[int] | type[float] | type[str], default: Any = None) -> Any:
        """Returns a field of the architecture.

        Raises:
          CheckpointError: it is missing and has no default, or is of another type.
        """
        key = f"{self.architecture}.{name}"
        value = self.header.metadata.get(key, default)
        if value is None and default is None:
            raise CheckpointError(f"{self.file}: the metadata has no {key!r}; convert the model again")
        if type(value) is not kind and value is not default:
            raise CheckpointError(f"{self.file}: {key} is {value!r:.60}; it must be of type {kind.__name__}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """Returns a field that is a size, which no allocation before the tensors are found depends on.

        Raises:
          CheckpointError: it is not positive, or so large that no file holds such a model.
        """
        found = self.get(name, int, default)
        if not 0 < found < 1 << 31:
            raise CheckpointError(
                f"{self.file}: {self.architecture}.{name} is {found}, which is not the size of a model"
            )
        return found

    def layers(self) -> int:
        """Returns the number of layers.

        Raises:
          CheckpointError: there are more than tensors.
        """
        count, tensors = self.size("block_count"), len(self.header.tensors)
        if count > tensors:
            raise CheckpointError(
                f"{self.file}: {self.architecture}.block_count is {count}, but it has {tensors} tensors"
            )
        return count

    def has(self, name: str) -> bool:
        """Returns whether there is such a field."""
        return f"{self.architecture}.{name}" in self.header.metadata

    def refuse(self, what: str) -> CheckpointError:
        """Returns an error about something that is not supported."""
        return CheckpointError(
            f"{self.file}: {what}, which is not supported for GGUF files; use the model's safetensors files"
        )


def _decoder(
    facts: Facts, model_type: str, rope: Callable[[Facts, int], dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Returns the fields of config.json that all decoders with RMSNorm and RoPE share.

    Args:
      facts: the metadata.
      model_type: of transformers.
      rope: returns `rope_parameters`, from the metadata and the size of a head; default `_rope`.
    """
    heads = facts.size("attention.head_count")
    width = facts.size("embedding_length")
    head_size = facts.size("attention.key_length", width // heads)
    if facts.get("attention.value_length", int, head_size) != head_size:
        raise facts.refuse("keys and values have different sizes")
    if facts.get("expert_count", int, 0):
        raise facts.refuse("the model has experts")
    return {
        "model_type": model_type,
        "vocab_size": _vocabulary(facts),
        "hidden_size": width,
        "num_hidden_layers": facts.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.size("attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": facts.size("feed_forward_length"),
        "max_position_embeddings": facts.size("context_length"),
        "rms_norm_eps": facts.get("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": (rope or _rope)(facts, head_size),
        "tie_word_embeddings": "output.weight" not in facts.header.tensors,
    }


def _vocabulary(facts: Facts) -> int:
    if "token_embd.weight" not in facts.header.tensors:
        raise CheckpointError(f"{facts.file}: no tensor 'token_embd.weight'")
    return facts.header.tensors["token_embd.weight"].shape[0]


def _rope(facts: Facts, head_size: int) -> dict[str, Any]:
    if facts.size("rope.dimension_count", head_size) != head_size:
        raise facts.refuse("only a part of each head is rotated")
    theta = {"rope_theta": facts.get("rope.freq_base", float, 10_000.0)}
    kind = facts.get("rope.scaling.type", str, "none")
    if "rope_freqs.weight" in facts.header.tensors:
        if kind != "none":
            raise facts.refuse(f"RoPE is scaled by {kind!r} and by rope_freqs.weight")
        return theta | _llama3_rope(facts, theta["rope_theta"])
    if kind == "none":
        return theta | {"rope_type": "default"}
    if kind == "linear":
        return theta | {"rope_type": "linear", "factor": facts.get("rope.scaling.factor", float)}
    if kind == "yarn":
        return theta | _yarn(facts)
    raise facts.refuse(f"rope.scaling.type is {kind!r}")


def _yarn(facts: Facts) -> dict[str, Any]:
    """Returns the parameters of YaRN (arXiv 2309.00071), with the attention factor of the paper."""
    if facts.get("rope.scaling.attn_factor", float, 1.0) != 1.0:
        raise facts.refuse("YaRN has an attention factor of its own")
    found = {
        "rope_type": "yarn",
        "factor": facts.get("rope.scaling.factor", float),
        "original_max_position_embeddings": facts.get("rope.scaling.original_context_length", int),
    }
    betas = {name: f"rope.scaling.yarn_{name}" for name in ("beta_fast", "beta_slow")}
    return found | {name: facts.get(key, float) for name, key in betas.items() if facts.has(key)}


def _llama3_rope(facts: Facts, theta: float) -> dict[str, Any]:
    """Returns the parameters of Llama 3's RoPE that give the stored divisors of the frequencies.

    The converter stores only the divisors. All released models have the same parameters but for the factor, which is
    the largest divisor.
    """
    stored = read_tensor(facts.header.tensors["rope_freqs.weight"]).astype(np.float64).reshape(-1)
    if not stored.size or not (np.isfinite(stored).all() and (stored > 0).all()):
        raise CheckpointError(f"{facts.file}: rope_freqs.weight must hold positive numbers")
    found = _LLAMA3_ROPE | {"factor": float(stored.max()), "original_max_position_embeddings": _LLAMA3_POSITIONS}
    waves = 2 * np.pi * theta ** (np.arange(stored.size) / stored.size)
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    smooth = np.clip((_LLAMA3_POSITIONS / waves - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / found["factor"] + smooth), rtol=1e-4):
        raise facts.refuse("the frequencies of RoPE are not those of Llama 3")
    return found


def _llama(facts: Facts) -> dict[str, Any]:
    biases = "blk.0.attn_q.bias" in facts.header.tensors
    return _decoder(facts, "llama") | {"hidden_act": "silu", "attention_bias": biases, "mlp_bias": False}


def _qwen2(facts: Facts) -> dict[str, Any]:
    return _decoder(facts, "qwen2") | {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(facts: Facts) -> dict[str, Any]:
    return _decoder(facts, "qwen3") | {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}


def _gemma(facts: Facts) -> dict[str, Any]:
    return _decoder(facts, "gemma") | {"hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(facts: Facts) -> dict[str, Any]:
    found = _decoder(facts, "gemma2")
    # The scale of queries is not stored. Only the model of 27 B parameters divides by its width per head.
    largest = found["num_hidden_layers"] == 46
    scalar = found["hidden_size"] // found["num_attention_heads"] if largest else found["head_dim"]
    return found | {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": facts.get("attention.sliding_window", int),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping", float),
        "final_logit_softcapping": facts.get("final_logit_softcapping", float),
        "query_pre_attn_scalar": scalar,
    }


def _gemma3(facts: Facts) -> dict[str, Any]:
    found = _decoder(facts, "gemma3_text")
    layers, pattern = found["num_hidden_layers"], facts.get("attention.sliding_window_pattern", int, 6)
    if pattern < 1:
        raise facts.refuse(f"attention.sliding_window_pattern is {pattern}")
    # As for Gemma 2; the largest model has 62 layers.
    largest = layers == 62
    scalar = found["hidden_size"] // found["num_attention_heads"] if largest else found["head_dim"]
    local = {"rope_type": "default", "rope_theta": facts.get("rope.freq_base_swa", float, 10_000.0)}
    return found | {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": facts.get("attention.sliding_window", int),
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)
        ],
        "rope_parameters": {"full_attention": found["rope_parameters"], "sliding_attention": local},
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _olmo2(facts: Facts) -> dict[str, Any]:
    if facts.has("attention.sliding_window"):
        raise facts.refuse("the model is OLMo 3")
    return _decoder(facts, "olmo2") | {"hidden_act": "silu", "attention_bias": False}


def _phi3(facts: Facts) -> dict[str, Any]:
    found = _decoder(facts, "phi3", rope=_phi3_rope)
    return found | {
        "hidden_act": "silu",
        # 0 is stored for models without a window.
        "sliding_window": facts.get("attention.sliding_window", int, 0) or None,
        "original_max_position_embeddings": facts.get(
            "rope.scaling.original_context_length", int, found["max_position_embeddings"]
        ),
    }


def _phi3_rope(facts: Facts, head_size: int) -> dict[str, Any]:
    rotated = facts.size("rope.dimension_count", head_size)
    found = {
        "rope_theta": facts.get("rope.freq_base", float, 10_000.0),
        "partial_rotary_factor": rotated / head_size,
    }
    names = {name: f"rope_factors_{name}.weight" for name in ("short", "long")}
    stored = {name: facts.header.tensors[key] for name, key in names.items() if key in facts.header.tensors}
    if not stored:
        if facts.get("rope.scaling.type", str, "none") != "none":
            raise facts.refuse("RoPE is scaled without the factors of LongRoPE")
        return found | {"rope_type": "default"}
    factors = {name: read_tensor(tensor).reshape(-1) for name, tensor in stored.items()}
    if len(stored) == 1 or any(values.size != rotated // 2 for values in factors.values()):
        raise CheckpointError(
            f"{facts.file}: LongRoPE needs {rotated // 2} numbers in each of {' and '.join(names.values())}"
        )
    lists = {f"{name}_factor": [float(value) for value in values] for name, values in factors.items()}
    return found | {"rope_type": "longrope"} | lists


def _gpt2(facts: Facts) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": _vocabulary(facts),
        "n_positions": facts.size("context_length"),
        "n_embd": facts.size("embedding_length"),
        "n_layer": facts.layers(),
        "n_head": facts.size("attention.head_count"),
        "n_inner": facts.size("feed_forward_length"),
        "layer_norm_epsilon": facts.get("attention.layer_norm_epsilon", float),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in facts.header.tensors,
    }


def _falcon(facts: Facts) -> dict[str, Any]:
    heads = facts.size("attention.head_count")
    groups = facts.size("attention.head_count_kv", heads)
    two_norms = "blk.0.attn_norm_2.weight" in facts.header.tensors
    return {
        "model_type": "falcon",
        "vocab_size": _vocabulary(facts),
        "max_position_embeddings": facts.size("context_length"),
        "hidden_size": facts.size("embedding_length"),
        "ffn_hidden_size": facts.size("feed_forward_length"),
        "num_hidden_layers": facts.layers(),
        "num_attention_heads": heads,
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": groups > 1 or two_norms,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "layer_norm_epsilon": facts.get("attention.layer_norm_epsilon", float),
        "rope_parameters": _rope(facts, facts.size("embedding_length") // heads),
        "tie_word_embeddings": "output.weight" not in facts.header.tensors,
    }


def _as_stored(tensor: np.ndarray, name: str, facts: Facts) -> np.ndarray:
    return tensor


def _halves(tensor: np.ndarray, name: str, facts: Facts) -> np.ndarray:
    """Moves the two numbers that are rotated together, which llama.cpp stores side by side, half a head apart."""
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return tensor
    heads = facts.size("attention.head_count")
    count = heads if part == "attn_q" else facts.size("attention.head_count_kv", heads)
    if not count or tensor.shape[0] % (2 * count):
        raise CheckpointError(f"{facts.file}: tensor {name!r} of shape {tensor.shape} does not have {count} heads")
    rows = tensor.reshape(count, tensor.shape[0] // count // 2, 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def _grouped_heads(tensor: np.ndarray, name: str, facts: Facts) -> np.ndarray:
    """Falcon has the query heads of each group, then its key and value; llama.cpp stores all queries, keys and values.

    Returns the rows in Falcon's order.
    """
    if not name.endswith("attn_qkv.weight"):
        return tensor
    heads = facts.size("attention.head_count")
    groups = facts.size("attention.head_count_kv", heads)
    count = heads + 2 * groups
    if heads % groups or tensor.shape[0] % count:
        raise CheckpointError(
            f"{facts.file}: tensor {name!r} of shape {tensor.shape} does not have {heads} heads in {groups} groups"
        )
    parts = tensor.reshape(count, tensor.shape[0] // count, *tensor.shape[1:])
    queries, keys, values = np.split(parts, [heads, heads + groups])
    queries = queries.reshape(groups, heads // groups, *queries.shape[1:])
    return np.concatenate([queries, keys[:, None], values[:, None]], axis=1).reshape(tensor.shape)


def _minus_one(tensor: np.ndarray, name: str, facts: Facts) -> np.ndarray:
    """Gemma's norms scale by 1 + weight, and llama.cpp stores the sum."""
    return tensor - np.float32(1) if name.endswith("norm.weight") else tensor


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How models of a `general.architecture` are read.

    Attributes:
      config: returns the fields of config.json.
      restored: returns a tensor as transformers has it, from the tensor as stored, its name and the metadata.
      transposed: whether transformers stores matrices of layers as [in, out].
    """

    config: Callable[[Facts], dict[str, Any]]
    restored: Callable[[np.ndarray, str, Facts], np.ndarray] = _as_stored
    transposed: bool = False

    def exchanges(self, name: str) -> bool:
        """Returns whether the axes of a tensor are exchanged."""
        return self.transposed and name.startswith("blk.") and name.endswith(".weight") and "_norm" not in name


ARCHITECTURES: Mapping[str, Architecture] = {
    "falcon": Architecture(_falcon, _grouped_heads),
    "gemma": Architecture(_gemma, _minus_one),
    "gemma2": Architecture(_gemma2, _minus_one),
    "gemma3": Architecture(_gemma3, _minus_one),
    "gpt2": Architecture(_gpt2, transposed=True),
    "llama": Architecture(_llama, _halves),
    "olmo2": Architecture(_olmo2),
    "phi3": Architecture(_phi3),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
}


def architecture_of(facts: Facts) -> Architecture:
    """Returns how a file's model is read.

    Raises:
      CheckpointError: its architecture is not supported.
    """
    found = ARCHITECTURES.get(facts.architecture)
    if found is None:
        raise CheckpointError(
            f"{facts.file}: the architecture {facts.architecture[:100]!r} is not supported for GGUF files; supported"
            f" are {', '.join(ARCHITECTURES)}"
        )
    return found
