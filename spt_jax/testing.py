"""Tiny models with random weights, and tokenizers built in code, for tests and notebooks. No network, no torch.

All tensors of a tiny checkpoint are random, including biases and norm scales, so that a forgotten bias or scale
changes the logits.
"""

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.bases.checkpoint import parameter_shapes, write_checkpoint
from spt_jax.bases.config import decoder_config
from spt_jax.bases.families import FAMILIES
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.models.config import DecoderConfig
from spt_jax.models.decoder import Remat
from spt_jax.models.model import Params

TokenizerKind = Literal["byte", "sentencepiece"]

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
_SIZES: dict[str, int] = {"byte": 320, "sentencepiece": 384}

# Common words, and letters that have one token at the start of a text and another after a space. There are enough
# of them to fill both vocabularies.
_WORDS = (
    "▁the", "▁of", "Hello", "▁H", "▁L", "▁N", "▁E", "▁D", "▁A", "▁question", "▁and", "▁spam", "▁world", "▁text",
    "▁label", "▁good", "▁bad", "Question", "▁kind", "▁answer", "▁in", "▁is", "▁positive", "▁negative", "▁message",
)  # fmt: skip


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """Returns a transformers config for a model with about 30,000 parameters.

    Args:
      family: a `model_type` that `spt_jax.bases.families` registers. Mistral has a sliding window of 7; Qwen3 has
        heads larger than width / heads; SmolLM3 has no RoPE in every second layer; Gemma 2 has soft caps low enough to
        matter.
      **overrides: fields of the family's transformers config, such as `rope_parameters` or `tie_word_embeddings`.

    Raises:
      ConfigError: for an unknown family.
    """
    import transformers

    if family not in FAMILIES:
        raise ConfigError(f"no tiny model of the family {family!r}; {did_you_mean(family, FAMILIES)}")
    tokens = {"vocab_size": _SIZES["byte"], "pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    return transformers.AutoConfig.for_model(family, **{**tokens, **FAMILIES[family].tiny(), **overrides})


def tiny_tokenizer(kind: TokenizerKind = "byte", *, add_bos: bool = True) -> Any:
    """Returns a fast tokenizer built in code: all bytes, a few merged words, and three special tokens.

    Args:
      kind: "byte" is byte-level BPE as in Llama 3 and GPT-2 (320 entries; `<pad>` 0, `<bos>` 1, `<eos>` 2);
        "sentencepiece" prepends a space to the text and falls back to bytes, as Llama 2 does (384 entries;
        `<unk>` 0, `<s>` 1, `</s>` 2, and no padding token).
      add_bos: whether `add_special_tokens=True` prepends the BOS token.
    """
    import transformers

    names = ["<unk>", "<s>", "</s>"] if kind == "sentencepiece" else ["<pad>", "<bos>", "<eos>"]
    tokenizer = _sentencepiece_like(names) if kind == "sentencepiece" else _byte_level(names)
    if add_bos:
        from tokenizers import processors

        bos = names[BOS_ID]
        opening = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, BOS_ID)]
        )
        byte_level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = opening if kind == "sentencepiece" else processors.Sequence([byte_level, opening])
    special = {"bos_token": names[BOS_ID], "eos_token": names[EOS_ID]}
    if kind == "sentencepiece":
        special["unk_token"] = names[0]
    else:  # Never needed for bytes, but without one transformers adds its own to a Qwen2 tokenizer.
        special |= {"pad_token": names[0], "unk_token": names[EOS_ID]}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=128, **special
    )


def _byte_level(special: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace("▁", "Ġ") for word in _WORDS]
    vocabulary, merges = _merged([*special, *alphabet], words, _SIZES["byte"])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _sentencepiece_like(special: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    characters = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    alphabet = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary, merges = _merged(alphabet, _WORDS, _SIZES["sentencepiece"])
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=special[0], fuse_unk=False, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _merged(alphabet: Sequence[str], words: Sequence[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns a vocabulary of exactly `size` entries (the alphabet, then prefixes of the words), and its merges."""
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    merges = []
    for word in words:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary and len(vocabulary) < size:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))
    assert len(vocabulary) == size, f"too few words: {len(vocabulary)} of {size} entries"
    return vocabulary, merges


def random_params(config: DecoderConfig, seed: int = 0, dtype: Any = np.float32) -> Params:
    """Returns random host arrays for `Decoder(config)`: normal, deviation 0.2, mean 1 for norm scales, else 0."""
    generator = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in sorted(traverse_util.flatten_dict(parameter_shapes(config)).items()):
        values = 0.2 * generator.standard_normal(leaf.shape)
        leaves[path] = (values + (path[-1] == "scale")).astype(dtype)
    return traverse_util.unflatten_dict(leaves)


def write_tiny_checkpoint(
    directory: str | Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    shards: int = 1,
    tokenizer: TokenizerKind = "byte",
    add_bos: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a tiny model in Hugging Face format. The same arguments give the same bytes.

    Args:
      directory: where to write; created if missing.
      family: as for `tiny_config`.
      seed: seed of the random tensors.
      dtype: dtype of the stored tensors, for example `np.float32` or `ml_dtypes.bfloat16`.
      shards: number of safetensors files; for more than one, `model.safetensors.index.json` is written too.
      tokenizer: as for `tiny_tokenizer`; sets the vocabulary size of the model.
      add_bos: as for `tiny_tokenizer`.
      **overrides: as for `tiny_config`.

    Returns:
      The directory.

    Raises:
      ConfigError: for an unknown family, options that the library's decoder does not support, or a SentencePiece-like
        tokenizer for Qwen2 (transformers reads the tokenizer of any Qwen2 model as byte-level BPE).
    """
    if family == "qwen2" and tokenizer != "byte":
        raise ConfigError("transformers reads the tokenizer of any qwen2 model as byte-level BPE; use another family")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf = tiny_config(family, **{"vocab_size": _SIZES[tokenizer], **overrides})
    config = decoder_config(hf)
    stored = {**hf.to_dict(), "architectures": [FAMILIES[family].architecture], "dtype": np.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    tiny_tokenizer(tokenizer, add_bos=add_bos).save_pretrained(directory)
    write_checkpoint(directory, config, random_params(config, seed, dtype), dtype, shards=shards)
    return directory


def tiny_base(
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    max_length: int | None = None,
    remat: Remat = "dots",
    tokenizer: TokenizerKind = "byte",
    add_bos: bool = True,
    quantize: Literal["int8"] | None = None,
    **overrides: Any,
) -> FrozenBase:
    """Returns a tiny frozen base, written to a temporary directory and read back with `load_base`.

    The arguments are those of `write_tiny_checkpoint` and `load_base`. The base is named "tiny-" plus its family.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_checkpoint(directory, family, seed=seed, tokenizer=tokenizer, add_bos=add_bos, **overrides)
        base = load_base(directory, dtype=dtype, mesh=mesh, max_length=max_length, remat=remat, quantize=quantize)
        jax.block_until_ready(base.params)
    return dataclasses.replace(base, name=f"tiny-{family}")
