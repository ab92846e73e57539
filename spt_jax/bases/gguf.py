"""GGUF files as bases: config, tokenizer and tensors as Hugging Face's files would hold them.

llama.cpp's converter stores some tensors in another order or with another offset than transformers; what it changes is
undone per architecture. Source: `convert_hf_to_gguf.py` of https://github.com/ggml-org/llama.cpp.
"""

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spt_jax.bases.files import GGUF_LINK
from spt_jax.bases.gguf_header import GgufHeader, GgufTensor, read_header
from spt_jax.bases.gguf_tokenizer import write_tokenizer
from spt_jax.errors import CheckpointError
from spt_jax.runtime.extras import load_extra

FLOATS = ("F32", "F16", "BF16")
_LLAMA3_ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_POSITIONS = 8192


class _Facts:
    """Metadata of one architecture, with checked types."""

    def __init__(self, file: Path, header: GgufHeader) -> None:
        self.file, self.header = file, header
        self.architecture = str(header.metadata.get("general.architecture"))

    def get(self, name: str, kind: type[int] | type[float] | type[str], default: Any = None) -> Any:
        key = f"{self.architecture}.{name}"
        value = self.header.metadata.get(key, default)
        if value is None and default is None:
            raise CheckpointError(f"{self.file}: the metadata has no {key!r}; convert the model again")
        if type(value) is not kind and value is not default:
            raise CheckpointError(f"{self.file}: {key} is {value!r:.60}; it must be of type {kind.__name__}")
        return value

    def has(self, name: str) -> bool:
        return f"{self.architecture}.{name}" in self.header.metadata

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {what}, which is not supported for GGUF files; use the model's safetensors files"
        )


def _decoder(facts: _Facts, model_type: str) -> dict[str, Any]:
    """Returns the fields of config.json that all decoders with RMSNorm and RoPE share."""
    heads = facts.get("attention.head_count", int)
    width, tensors = facts.get("embedding_length", int), facts.header.tensors
    head_size = facts.get("attention.key_length", int, width // heads if heads else 0)
    if facts.get("attention.value_length", int, head_size) != head_size:
        raise facts.refuse("keys and values have different sizes")
    if facts.get("rope.dimension_count", int, head_size) != head_size:
        raise facts.refuse("only a part of each head is rotated")
    if facts.get("expert_count", int, 0):
        raise facts.refuse("the model has experts")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{facts.file}: no tensor 'token_embd.weight'")
    return {
        "model_type": model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": facts.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("attention.head_count_kv", int, heads),
        "head_dim": head_size,
        "intermediate_size": facts.get("feed_forward_length", int),
        "max_position_embeddings": facts.get("context_length", int),
        "rms_norm_eps": facts.get("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(facts),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _rope(facts: _Facts) -> dict[str, Any]:
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
    raise facts.refuse(f"rope.scaling.type is {kind!r}")


def _llama3_rope(facts: _Facts, theta: float) -> dict[str, Any]:
    """Returns the parameters of Llama 3's RoPE that give the stored divisors of the frequencies.

    The converter stores only the divisors. All released models have the same parameters but for the factor, which is
    the largest divisor.
    """
    stored = read_tensor(facts.file, facts.header.tensors["rope_freqs.weight"]).astype(np.float64).reshape(-1)
    found = _LLAMA3_ROPE | {"factor": float(stored.max()), "original_max_position_embeddings": _LLAMA3_POSITIONS}
    waves = 2 * np.pi * theta ** (np.arange(stored.size) / stored.size)
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    smooth = np.clip((_LLAMA3_POSITIONS / waves - low) / (high - low), 0, 1)
    if not np.allclose(stored, 1 / ((1 - smooth) / found["factor"] + smooth), rtol=1e-4):
        raise facts.refuse("the frequencies of RoPE are not those of Llama 3")
    return found


def _llama(facts: _Facts) -> dict[str, Any]:
    biases = "blk.0.attn_q.bias" in facts.header.tensors
    return _decoder(facts, "llama") | {"hidden_act": "silu", "attention_bias": biases, "mlp_bias": False}


def _qwen2(facts: _Facts) -> dict[str, Any]:
    return _decoder(facts, "qwen2") | {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(facts: _Facts) -> dict[str, Any]:
    return _decoder(facts, "qwen3") | {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}


def _gemma(facts: _Facts) -> dict[str, Any]:
    return _decoder(facts, "gemma") | {"hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(facts: _Facts) -> dict[str, Any]:
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


def _as_stored(tensor: np.ndarray, name: str, facts: _Facts) -> np.ndarray:
    return tensor


def _halves(tensor: np.ndarray, name: str, facts: _Facts) -> np.ndarray:
    """Moves the two numbers that are rotated together, which llama.cpp stores side by side, half a head apart."""
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return tensor
    heads = facts.get("attention.head_count", int)
    count = heads if part == "attn_q" else facts.get("attention.head_count_kv", int, heads)
    if not count or tensor.shape[0] % (2 * count):
        raise CheckpointError(f"{facts.file}: tensor {name!r} of shape {tensor.shape} does not have {count} heads")
    rows = tensor.reshape(count, tensor.shape[0] // count // 2, 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


def _minus_one(tensor: np.ndarray, name: str, facts: _Facts) -> np.ndarray:
    """Gemma's norms scale by 1 + weight, and llama.cpp stores the sum."""
    return tensor - np.float32(1) if name.endswith("norm.weight") else tensor


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How models of a `general.architecture` are read.

    Attributes:
      config: returns the fields of config.json.
      restored: returns a tensor as transformers has it, from the tensor as stored, its name and the metadata.
    """

    config: Callable[[_Facts], dict[str, Any]]
    restored: Callable[[np.ndarray, str, _Facts], np.ndarray] = _as_stored


ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma": Architecture(_gemma, _minus_one),
    "gemma2": Architecture(_gemma2, _minus_one),
    "llama": Architecture(_llama, _halves),
    "qwen2": Architecture(_qwen2),
    "qwen3": Architecture(_qwen3),
}


def _architecture(facts: _Facts) -> Architecture:
    found = ARCHITECTURES.get(facts.architecture)
    if found is None:
        raise CheckpointError(
            f"{facts.file}: the architecture {facts.architecture[:100]!r} is not supported for GGUF files; supported"
            f" are {', '.join(ARCHITECTURES)}"
        )
    return found


def gguf_directory(file: Path) -> Path:
    """Returns a directory with the file's config and tokenizer in Hugging Face format and a link to the file.

    It is a temporary directory, made once per file and process, and removed at the end of the process.

    Args:
      file: the GGUF file.

    Raises:
      CheckpointError: the file is damaged, or its architecture, tokenizer or a type of its tensors is not supported.
      ConfigError: the package gguf is not installed.
    """
    load_extra("gguf", f"reading {file.name}")
    file = file.resolve()
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return _directory(file, status.st_size, status.st_mtime_ns)


@functools.cache
def _directory(file: Path, size: int, changed: int) -> Path:
    """`size` and `changed` tell versions of a file apart."""
    facts = _Facts(file, read_header(file))
    parts = facts.header.metadata.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            f"{file}: one of {parts!r:.20} parts of a model; merge them: llama-gguf-split --merge FIRST-PART NEW-FILE"
        )
    config = _architecture(facts).config(facts)
    directory = Path(tempfile.mkdtemp(prefix="spt_jax-gguf-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    config |= write_tokenizer(directory, file, facts.architecture, facts.header.metadata)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / GGUF_LINK).symlink_to(file)
    return directory


def read_bytes(file: Path, tensor: GgufTensor) -> np.ndarray:
    """Returns a tensor as stored."""
    stored = np.fromfile(file, np.uint8, count=tensor.size, offset=tensor.start)
    if stored.size != tensor.size:
        raise CheckpointError(f"{file}: the file became shorter while it was read")
    return stored


def read_tensor(file: Path, tensor: GgufTensor) -> np.ndarray:
    """Returns the values of a tensor: float16 or float32 as stored, float32 for all other types.

    Args:
      file: the GGUF file.
      tensor: from its header.
    """
    stored = read_bytes(file, tensor)
    if tensor.kind in ("F32", "F16"):
        return stored.view("<f4" if tensor.kind == "F32" else "<f2").reshape(tensor.shape)
    gguf = load_extra("gguf.quants", "reading GGUF files")
    rows = stored.reshape(*tensor.shape[:-1], -1)
    return gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind]).reshape(tensor.shape)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix in the blocks of a GGUF file.

    Attributes:
      kind: name of the type.
      rows: the blocks of each row, uint8 [F, bytes].
    """

    kind: str
    rows: np.ndarray

    def values(self) -> np.ndarray:
        """Returns the values, float32 [F, D]."""
        gguf = load_extra("gguf.quants", "reading GGUF files")
        return gguf.dequantize(self.rows, gguf.GGMLQuantizationType[self.kind])


class GgufTensors:
    """Implements `TensorFile`: tensors by the keys of a family's table, with the shapes and values of transformers."""

    def __init__(self, file: Path, keys: Sequence[str]) -> None:
        self._facts = _Facts(file, read_header(file))
        self._architecture = _architecture(self._facts)
        stored = [name for name in self._facts.header.tensors if name != "rope_freqs.weight"]
        known = _stored_names(self._facts, keys)
        self._stored = {known.get(name, name): name for name in stored}

    def names(self) -> Iterable[str]:
        return self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self._facts.header.tensors[self._stored[name]].shape

    def block_type(self, name: str) -> str | None:
        kind = self._facts.header.tensors[self._stored[name]].kind
        return None if kind in FLOATS else kind

    def read_blocks(self, name: str) -> Blocks:
        stored = self._stored[name]
        tensor = self._facts.header.tensors[stored]
        rows = read_bytes(self._facts.file, tensor).reshape(tensor.shape[0], -1)
        # All that an architecture restores in a matrix is the order of its rows.
        return Blocks(tensor.kind, self._architecture.restored(rows, stored, self._facts))

    def read(self, name: str) -> np.ndarray:
        stored = self._stored[name]
        tensor = read_tensor(self._facts.file, self._facts.header.tensors[stored])
        return self._architecture.restored(tensor, stored, self._facts)


def _stored_names(facts: _Facts, keys: Sequence[str]) -> dict[str, str]:
    """Returns the key of each tensor's name, by the table of the gguf package."""
    gguf = load_extra("gguf", "reading GGUF files")
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[facts.architecture], facts.get("block_count", int))
    names = {table.get_name(key, try_suffixes=(".weight", ".bias")): key for key in keys}
    return {name: key for name, key in names.items() if name is not None}
