"""Tiny models with random weights, tokenizers built in code, and a check of models. No network, no torch.

All tensors of a tiny checkpoint are random, including biases and norm scales, so that a forgotten bias or scale
changes the logits.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase, load_base
from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.checkpoint_writing import write_checkpoint
from spt_jax.bases.config import model_config
from spt_jax.bases.families import ENCODER_DECODERS, FAMILIES, family_of
from spt_jax.bases.places import places as filled
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.errors import ConfigError, did_you_mean
from spt_jax.models.attention import Cache, Prefix, Stream
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.memory import Memory, to_cache
from spt_jax.models.model import Model, Params
from spt_jax.models.model_config import ModelConfig
from spt_jax.models.stacks import Remat

TokenizerKind = Literal["byte", "sentencepiece"]

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
# Model types whose tokenizers transformers builds itself from the stored vocabulary, as byte-level BPE.
OWN_TOKENIZERS = ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text")
_SIZES: dict[str, int] = {"byte": 320, "sentencepiece": 384}

# Common words, and letters that have one token at the start of a text and another after a space. There are enough
# of them to fill both vocabularies.
_WORDS = (
    "▁the", "▁of", "Hello", "▁H", "▁L", "▁N", "▁E", "▁D", "▁A", "▁question", "▁and", "▁spam", "▁world", "▁text",
    "▁label", "▁good", "▁bad", "Question", "▁kind", "▁answer", "▁in", "▁is", "▁positive", "▁negative", "▁message",
)  # fmt: skip

# The configs of T5Gemma's sides, and the fields that it has beside them.
_SIDES = {"encoder", "decoder"}
_OF_BOTH = ("tie_word_embeddings", "decoder_start_token_id", "is_encoder_decoder")


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """Returns a transformers config for a model with about 30,000 parameters.

    Args:
      family: a `model_type` that `spt_jax.bases.families` registers. Mistral has a sliding window of 7; Qwen3 has
        heads larger than width / heads; SmolLM3 has no RoPE in every second layer; Gemma 2 has soft caps low enough to
        matter.
      **overrides: fields of the family's transformers config, such as `rope_parameters` or `tie_word_embeddings`; if
        the language model, or each side, has a config of its own in it, they are fields of that.

    Returns:
      The config object of transformers.

    Raises:
      ConfigError: for an unknown family.
    """
    import transformers

    families = {**FAMILIES, **ENCODER_DECODERS}
    if family not in families:
        raise ConfigError(f"no tiny model of the family {family!r}; {did_you_mean(family, families)}")
    tokens = {"vocab_size": _SIZES["byte"], "pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    fields = families[family].tiny()
    if fields.keys() >= _SIDES:
        outer = {name: value for name, value in overrides.items() if name in _OF_BOTH}
        inner = {name: value for name, value in overrides.items() if name not in _OF_BOTH}
        encoder, decoder = fields["encoder"], {**tokens, **fields["decoder"], **inner}
        if "text_config" in encoder:
            encoder = {**encoder, "text_config": {**tokens, **encoder["text_config"], **inner}}
        else:
            encoder = {**tokens, **encoder, **inner}
        ids = {name: decoder[name] for name in tokens}
        return transformers.AutoConfig.for_model(family, **{**ids, **outer, "encoder": encoder, "decoder": decoder})
    if "text_config" in fields:
        outer = {name: value for name, value in overrides.items() if name in fields}
        text = {**tokens, **fields["text_config"], **overrides}
        return transformers.AutoConfig.for_model(family, **{**fields, **outer, "text_config": text})
    return transformers.AutoConfig.for_model(family, **{**tokens, **fields, **overrides})


def tiny_tokenizer(
    kind: TokenizerKind = "byte", *, add_bos: bool = True, add_eos: bool = False, add_mask: bool = False
) -> Tokenizer:
    """Returns a fast tokenizer built in code: all bytes, a few merged words, and three special tokens.

    Args:
      kind: "byte" is byte-level BPE as in Llama 3 and GPT-2 (320 entries; `<pad>` 0, `<bos>` 1, `<eos>` 2);
        "sentencepiece" prepends a space to the text and falls back to bytes, as Llama 2 does (384 entries;
        `<unk>` 0, `<s>` 1, `</s>` 2, and no padding token).
      add_bos: whether `add_special_tokens=True` prepends the BOS token.
      add_eos: whether it appends the EOS token, as the tokenizers of T5 and BERT do.
      add_mask: whether there is a fourth special token, `<mask>` 3, as in the tokenizers of encoders.

    Returns:
      The tokenizer.
    """
    import transformers

    names = ["<unk>", "<s>", "</s>"] if kind == "sentencepiece" else ["<pad>", "<bos>", "<eos>"]
    names += ["<mask>"] if add_mask else []
    tokenizer = _sentencepiece_like(names) if kind == "sentencepiece" else _byte_level(names)
    if add_bos or add_eos:
        from tokenizers import processors

        bos, eos = names[BOS_ID] if add_bos else "", names[EOS_ID] if add_eos else ""
        first, second = f"{bos} $A {eos}".split(), f"{bos}:1 $B:1 {eos}:1".split()
        opening = processors.TemplateProcessing(
            single=first,
            pair=first + [piece for piece in second if piece != ":1"],
            special_tokens=[(names[id_], id_) for id_ in (BOS_ID, EOS_ID) if names[id_] in (bos, eos)],
        )
        byte_level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = opening if kind == "sentencepiece" else processors.Sequence([byte_level, opening])
    special = {"bos_token": names[BOS_ID], "eos_token": names[EOS_ID]}
    special |= {"mask_token": names[-1]} if add_mask else {}
    if kind == "sentencepiece":
        special["unk_token"] = names[0]
    else:  # Never needed for bytes, but without one transformers adds its own to a Qwen2 tokenizer.
        special |= {"pad_token": names[0], "unk_token": names[EOS_ID]}
    fast: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=128, **special
    )
    return fast


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


def random_params(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> Params:
    """Returns random host arrays for a model: normal, deviation 0.2, mean 1 for norm scales, else 0.

    Args:
      config: the model's config.
      seed: the seed of the arrays.
      dtype: their dtype.

    Returns:
      The arrays, by path.
    """
    generator = np.random.default_rng(seed)
    leaves = {}
    for path, leaf in sorted(traverse_util.flatten_dict(parameter_shapes(config)).items()):
        values = 0.2 * generator.standard_normal(leaf.shape)
        leaves[path] = (values + (path[-1] == "scale")).astype(dtype)
    for first, *others in filled(config).values():
        for place in others:  # Layers that share a tensor.
            if place.path == first.path and place.origin == first.origin:
                leaves[place.path][place.index] = leaves[first.path][first.index]
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
      add_bos: as for `tiny_tokenizer`. The tokenizer of an encoder also adds EOS and has a mask token; that of an
        encoder-decoder adds only EOS.
      **overrides: as for `tiny_config`.

    Returns:
      The directory.

    Raises:
      ConfigError: for an unknown family, options that the library's decoder does not support, or a SentencePiece-like
        tokenizer for a family of `OWN_TOKENIZERS`.
    """
    if family in OWN_TOKENIZERS and tokenizer != "byte":
        raise ConfigError(
            f"transformers reads the tokenizer of any {family} model as byte-level BPE; use another family"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hf = tiny_config(family, **{"vocab_size": _SIZES[tokenizer], **overrides})
    config = model_config(hf)
    names = hf.architectures or [family_of(family).architecture]
    stored = {**hf.to_dict(), "architectures": names, "dtype": np.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    has_decoder = isinstance(config, EncoderDecoderConfig)
    has_encoder = has_decoder or not config.causal
    added = {
        "add_bos": add_bos and not has_decoder,
        "add_eos": has_encoder,
        "add_mask": has_encoder and not has_decoder,
    }
    tiny_tokenizer(tokenizer, **added).save_pretrained(directory)
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
    quantize: str | None = None,
    **overrides: Any,
) -> FrozenBase:
    """Returns a tiny frozen base, written to a temporary directory and read back with `load_base`.

    The arguments are those of `write_tiny_checkpoint` and `load_base`. The base is named "tiny-" plus its family.

    Args:
      family: as for `tiny_config`.
      seed: as for `write_tiny_checkpoint`.
      dtype: as for `load_base`.
      mesh: as for `load_base`.
      max_length: as for `load_base`.
      remat: as for `load_base`.
      tokenizer: as for `tiny_tokenizer`.
      add_bos: as for `tiny_tokenizer`.
      quantize: as for `load_base`.
      **overrides: as for `tiny_config`.

    Returns:
      The base.

    Raises:
      ConfigError: as in `write_tiny_checkpoint` and `load_base`.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_checkpoint(directory, family, seed=seed, tokenizer=tokenizer, add_bos=add_bos, **overrides)
        base = load_base(directory, dtype=dtype, mesh=mesh, max_length=max_length, remat=remat, quantize=quantize)
        jax.block_until_ready(base.params)
    return dataclasses.replace(base, name=f"tiny-{family}")


def check_model(model: Model, *, seed: int = 0, tolerance: float = 1e-4) -> None:
    """Checks that a float32 model keeps the rules that the rest of the library relies on.

    A sequence has the same logits alone, beside padding, in a row with other sequences, as the continuation of a
    context that it shares with another, after a prefix and after a cache. The scores of targets are those of the
    logits. The gradient for the input embeddings is that of finite differences. An encoder, whose tokens see later
    ones, has no contexts, prefixes and caches that it could continue.

    Args:
      model: the model.
      seed: seed of the token ids.
      tolerance: the largest difference of logits and scores, relative to the largest of them, or to 1.

    Raises:
      AssertionError: a rule is broken; the message names it.
    """
    ids = np.random.default_rng(seed).integers(0, model.layout.vocab_size, (2, 24)).astype(np.int32)
    (first, second), places = ids, np.arange(24, dtype=np.int32)

    @jax.jit
    def run(
        model: Model, ids: Array, stream: Stream, prefix: Prefix | None = None, cache: Cache | None = None
    ) -> Array:
        hidden, _ = model.run(model.embed(ids), dataclasses.replace(stream, ids=ids), prefix, cache)
        assert hidden is not None
        return model.logits(hidden)

    targets, at = jnp.asarray(ids[:1, 1:, None]), jnp.arange(23)[None]

    # One program for all that is asked of a row of 24 tokens.
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def total(
        model: Model, x: Float[Array, "1 T D"], stream: Stream
    ) -> tuple[Float[Array, ""], tuple[Float[Array, " M"], Float[Array, "T V"], Memory]]:
        hidden, memory = model.run(x, stream, return_memory=True)
        assert hidden is not None and memory is not None
        found = model.scores(hidden, at, targets).log_probabilities[0, :, 0]
        return found.sum(), (found, model.logits(hidden)[0], memory)

    def laid_out(*runs: tuple[np.ndarray, np.ndarray, int, int], length: int = 24) -> Stream:
        """Returns one row of runs, each with its ids, positions, segment and parent."""
        parts = [(own, at, np.full_like(own, segment), np.full_like(own, parent)) for own, at, segment, parent in runs]
        row = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        row = [jnp.asarray(np.pad(array, (0, length - len(array))))[None] for array in row]
        return Stream(*row[1:], ids=row[0])

    def alone(own: np.ndarray) -> Stream:
        return laid_out((own, places, 1, 0))

    def logits(*runs: tuple[np.ndarray, np.ndarray, int, int]) -> np.ndarray:
        """Returns the logits of a row with padding behind the runs."""
        row = laid_out(*runs, length=64)
        return np.asarray(run(model, row.ids, row)[0])

    def check(rule: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        off = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
        assert off <= tolerance, f"{rule}: the largest difference is {off:.1e}, above {tolerance:.0e}"

    def check_continuations() -> None:
        joined = logits((np.concatenate([first[:9], second[:6]]), places[:15], 1, 0))
        shared = logits((first[:9], places[:9], 1, 0), (first[9:], places[9:], 2, 1), (second[:6], places[9:15], 3, 1))
        check("a continuation sees the context that it shares", shared[9:24], whole[9:])
        check("continuations of one context do not see each other", shared[24:30], joined[9:15])

        both = logits((ids.reshape(48), np.arange(48, dtype=np.int32), 1, 0))[24:48]
        after = dataclasses.replace(before, positions=before.positions + 24)
        prefix = Prefix(jax.tree.map(lambda array: array[:, 0], memory), before.positions[0])
        found = run(model, jnp.asarray(ids[1:]), after, prefix)
        check("a prefix is the context that it was computed from", np.asarray(found[0]), both)
        cache = Cache(to_cache(memory), before.positions, before.segments)
        found = run(model, jnp.asarray(ids[1:]), after, None, cache)
        check("a cache is the context that it was computed from", np.asarray(found[0]), both)

    x, before = model.embed(jnp.asarray(ids[:1])), alone(first)
    (_, (log_probabilities, whole, memory)), gradient = total(model, x, before)
    whole = np.asarray(whole)
    assert whole.shape == (24, model.layout.vocab_size), f"logits have the shape {whole.shape}, not [T, V]"
    other = np.asarray(total(model, model.embed(jnp.asarray(ids[1:])), alone(second))[0][1][1])
    padded = logits((first[:9], places[:9], 1, 0))
    causal = model.layout.causal
    alone_9 = laid_out((first[:9], places[:9], 1, 0), length=9)
    short = whole[:9] if causal else np.asarray(run(model, jnp.asarray(ids[:1, :9]), alone_9)[0])
    rule = "a token sees only earlier tokens, and padding changes nothing" if causal else "padding changes nothing"
    check(rule, padded[:9], short)
    packed = logits((first, places, 1, 0), (second, places, 2, 0))
    check("packed sequences do not see each other", packed[:48], np.concatenate([whole, other]))
    if causal:
        check_continuations()
    else:
        assert np.abs(whole[:9] - short).max() > tolerance, "a token of an encoder sees later tokens"

    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(whole[:-1])), first[1:, None], axis=1)[:, 0]
    check("scores are log-probabilities of the logits", np.asarray(log_probabilities), expected)

    # One random direction per position, so that a position without a gradient shows. A step may cross a point where the
    # function jumps, such as the choice of another expert, and smaller ones then do not.
    noise = jax.random.normal(jax.random.key(seed), x.shape)
    errors = []
    for size in (3e-3, 6e-4):
        steps = size * jnp.linalg.norm(x) / jnp.linalg.norm(noise) * jnp.eye(24)[:, None, :, None] * noise[None]
        slopes = np.asarray((gradient[None] * steps).sum(axis=(1, 2, 3)))
        ends = [[total(model, x + sign * step, before)[0][0] for sign in (1, -1)] for step in steps]
        differences = np.asarray([(above - below) / 2 for above, below in ends])
        errors.append(np.abs(slopes - differences) / np.abs(differences).max())
        off = np.min(errors, axis=0).max()
        if off <= 0.02:
            break
    assert off <= 0.02, f"the gradient for the embeddings is off finite differences by {off:.1%}"
