"""Writes directories of Hugging Face PEFT, in the format that `peft.py` reads."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.data.encoder import encoder_for
from spt_jax.data.pairs import SEPARATOR
from spt_jax.data.sequences import form_of
from spt_jax.data.templates import DECODER, MESSAGES, Field, Template, parse
from spt_jax.errors import ConfigError, SptError
from spt_jax.interop.peft import (
    ADAPTER_PLACE,
    ADAPTER_TYPE,
    CONFIG_FILE,
    EMBEDDINGS,
    HEADS,
    MULTITASK_TYPE,
    WEIGHTS_FILE,
    PeftHead,
    check_encoder_head,
    check_tokens_agree,
    plain_group,
    template_front,
)
from spt_jax.interop.peft_decoder_prefixes import check_family, to_stored
from spt_jax.models.config import DecoderConfig
from spt_jax.models.encoder_decoder_model import EncoderDecoderModel
from spt_jax.models.layout import SELF, Group
from spt_jax.models.memory import keys_values, states
from spt_jax.models.model_config import ModelConfig
from spt_jax.prompts import Method, VirtualPrompt
from spt_jax.prompts.storage import SavedPrompt
from spt_jax.prompts.virtual import Head, parts_of, shape
from spt_jax.prompts.writing import write_directory


def export_peft(directory: str | Path, saved: SavedPrompt, base: FrozenBase) -> Path:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads.

    Args:
      directory: what to write, or its URL; replaced if it holds a prompt of PEFT.
      saved: the prompt.
      base: the base that it was trained on.

    Returns:
      The directory.

    Raises:
      ConfigError: PEFT has no such prompt. In PEFT, virtual tokens come before all other tokens, BOS included, and a
        prompt has only one part.
      CheckpointError: the directory has other files, or cannot be written.
    """
    check_exportable(base, saved.method, saved.template, saved.virtual)
    virtual, parts = saved.virtual, parts_of(saved.virtual)
    prompt_learning = _common(saved, base)
    if parts in (["tokens"], ["tokens", "head"]):
        assert virtual.tokens is not None
        length, width = virtual.tokens.shape
        heads = {"token_dim": width, "num_attention_heads": _sizes(base).heads}
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": length, **heads, **prompt_learning}
        tensors = {EMBEDDINGS: np.asarray(virtual.tokens)}
    elif parts in (["prefix"], ["prefix", "head"]):
        assert virtual.prefix is not None
        group, (own,) = prefix_group(base), keys_values(virtual.prefix.memory)
        both = np.stack([own.keys, own.values])
        if base.layout.encodes:
            both = np.stack([to_stored(part) for part in both])
            prompt_learning |= {"num_layers": len(group.layers), "num_transformer_submodules": 2}
        length = both.shape[2]
        heads = {"token_dim": group.kv_heads * group.key_size, "num_attention_heads": group.kv_heads}
        config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, **heads, **prompt_learning}
        tensors = {EMBEDDINGS: both.transpose(2, 1, 0, 3, 4).reshape(length, -1)}
    else:
        common = {k: v for k, v in prompt_learning.items() if not k.startswith("num_")}
        config, tensors = _adapter_files(virtual, base.config, common)
    if virtual.head is not None:
        task_type = _task_type(saved.template.head)
        tensors |= _head_tensors(virtual.head, HEADS[task_type], base.config)
        config |= {"task_type": task_type}
    return _write(directory, config, tensors)


def check_exportable(base: FrozenBase, method: Method, template: Template, virtual: VirtualPrompt) -> None:
    """Checks that PEFT has prompts like this one.

    Args:
      base: the frozen base.
      method: the method that trains or trained the prompt.
      template: its template.
      virtual: the prompt, or its shapes (`Method.spec`) before it is trained.

    Raises:
      ConfigError: PEFT has none.
    """
    if virtual.pinned:
        raise ConfigError("this prompt was trained with method.pin_prefix, and PEFT has no such option")
    if virtual.prefix is not None and states(virtual.prefix.memory):
        raise ConfigError(f"this {method.name} prompt has states of recurrent layers, which PEFT does not have")
    if template.new_tokens:
        raise ConfigError(f"this {method.name} prompt has new tokens in its template, which PEFT's prompts do not have")
    if DECODER in template.prompt:
        raise ConfigError(f"the template has {DECODER}, and PEFT has no prompts in the decoder's input")
    if virtual.replaced is not None:
        raise ConfigError(f"this {method.name} prompt has embeddings of real tokens, which PEFT's prompts do not have")
    if virtual.instance is not None:
        raise ConfigError(
            f"the virtual tokens of this {method.name} prompt depend on each input, and those of PEFT's prompts do not"
        )
    if virtual.linear is not None:
        raise ConfigError(f"this {method.name} prompt has maps outside the softmax, which PEFT does not have")
    if virtual.edits is not None:
        raise ConfigError(f"this {method.name} prompt edits hidden states, which PEFT's prompts do not do")
    _check_tokens(base, template, virtual)
    parts = parts_of(virtual)
    if base.layout.encodes and parts != ["tokens"] and not _is_of_decoder(virtual):
        raise ConfigError(
            "of the prompts of an encoder-decoder, only token rows and prefixes with method.sites=self can be exported"
            " to PEFT, which has no keys and values of the encoder and of cross-attention, and no heads"
        )
    if parts not in (["tokens"], ["tokens", "head"], ["prefix"], ["prefix", "head"], ["gated"]):
        raise ConfigError(f"PEFT has no prompts with this combination of parts: {', '.join(parts)}")
    if virtual.prefix is not None:
        group = prefix_group(base)
        if base.layout.encodes:
            check_family(base)
        if base.layout.encodes and _only_shapes(virtual) and len(group.layers) % 2 == 0:
            raise ConfigError(
                f"PEFT gives layers {len(group.layers) // 2} apart of this decoder the same keys and values of a prefix"
            )
    if virtual.head is not None and not base.layout.generates:
        check_encoder_head(base, template.head, has_prefix=virtual.prefix is not None)
    if virtual.head is not None:
        _check_head(method, virtual.head, HEADS[_task_type(template.head)])
    if virtual.gated is not None:
        if virtual.gated.rows is None:
            raise ConfigError("this gated prompt no longer has the rows that it was computed from, which PEFT saves")
        if base.config.family not in ("llama", "mistral"):
            raise ConfigError(
                f"for the family {base.config.family}, PEFT's adaption prompts differ from this library's"
            )


def prefix_group(base: FrozenBase) -> Group:
    """Returns the group of layers that PEFT has prefixes for.

    Raises:
      ConfigError: as in `plain_group`.
    """
    return base.layout.attention_groups[SELF] if base.layout.encodes else plain_group(base)


def _is_of_decoder(virtual: VirtualPrompt) -> bool:
    """Whether a prompt consists of keys and values of the decoder's self-attention."""
    return parts_of(virtual) == ["prefix"] and virtual.prefix is not None and set(virtual.prefix.memory) == {SELF}


def _only_shapes(virtual: VirtualPrompt) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(virtual))


def peft_note(base: FrozenBase, method: Method, template: Template) -> str:
    """Returns the line that training prints: whether its prompt can be exported to PEFT or, if not, why.

    Args:
      base: the frozen base.
      method: the method, with all its options.
      template: the template.

    Returns:
      The line, without a newline.
    """
    virtual = method.spec(base.layout)
    if virtual.tokens is not None and len(virtual.tokens.shape) > 2:  # of several tasks, each of which has a prompt
        virtual = dataclasses.replace(virtual, tokens=shape(*virtual.tokens.shape[-2:]))
    try:
        check_exportable(base, method, dataclasses.replace(template, task=None, tasks=()), virtual)
    except SptError as error:
        return f"note: this prompt cannot be exported to PEFT: {error}"
    quantize = base.fingerprint.quantize
    weights = (
        f", where the base has other weights than the {quantize} kernels that it is trained on" if quantize else ""
    )
    return f"this prompt can be exported to PEFT{weights}"


def export_peft_tasks(directory: str | Path, prompts: Sequence[SavedPrompt], base: FrozenBase) -> Path:
    """Writes prompts of token rows, all of one length, as the tasks 0, 1, ... of a PEFT multitask prompt.

    PEFT multiplies shared rows with a matrix of rank r per task. Here, the shared rows are ones, and the matrix is the
    task's rows (r = P).

    Args:
      directory: as in `export_peft`.
      prompts: the prompts.
      base: the base that they were trained on.

    Returns:
      The directory.

    Raises:
      ConfigError: a prompt does not consist only of token rows, lengths differ, or the template's order is not PEFT's.
      CheckpointError: as in `export_peft`.
    """
    rows = []
    for saved in prompts:
        if saved.virtual.tokens is None or len(jax.tree.leaves(saved.virtual)) > 1:
            raise ConfigError(
                f"a {saved.method.name} prompt does not consist only of token rows, as a PEFT multitask prompt requires"
            )
        if base.layout.encodes:
            raise ConfigError("PEFT puts multitask prompts of an encoder-decoder before the decoder's input, too")
        _check_tokens(base, saved.template, saved.virtual)
        rows.append(np.asarray(saved.virtual.tokens))
    if len({array.shape for array in rows}) > 1:
        lengths = [len(array) for array in rows]
        raise ConfigError(f"the tasks of a PEFT multitask prompt have one length; these prompts have {lengths}")
    stacked = np.stack(rows)
    tasks, length, width = stacked.shape
    config = {
        "peft_type": MULTITASK_TYPE,
        "num_tasks": tasks,
        "num_ranks": length,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_attention_heads": _sizes(base).heads,
        **_common(prompts[0], base),
    }
    tensors = {
        EMBEDDINGS: np.ones((length, width), np.float32),
        "prefix_task_cols": np.broadcast_to(np.eye(length, dtype=np.float32), (tasks, length, length)),
        "prefix_task_rows": stacked,
    }
    return _write(directory, config, tensors)


def _common(saved: SavedPrompt, base: FrozenBase) -> dict[str, Any]:
    return {
        "base_model_name_or_path": saved.info["base"]["id"],
        "revision": saved.info["base"]["revision"],
        "task_type": _base_type(base),
        "inference_mode": True,
        # With 2, PEFT stores as many rows again for the decoder, which it never uses.
        "num_transformer_submodules": 1,
        "num_layers": _sizes(base).layers,
    }


def _base_type(base: FrozenBase) -> str:
    """Returns PEFT's task type of a prompt without a head."""
    if base.layout.encodes:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if base.layout.causal else "FEATURE_EXTRACTION"


def _sizes(base: FrozenBase) -> ModelConfig:
    return base.model.config if isinstance(base.model, EncoderDecoderModel) else base.config


def _task_type(task: str) -> str:
    """Returns PEFT's task type of a head.

    Raises:
      ConfigError: PEFT has none.
    """
    types = {head.task: name for name, head in HEADS.items()}
    if task not in types:
        raise ConfigError(f"PEFT has no task type for a {task} head; it has heads for {', '.join(types)}")
    return types[task]


def _check_head(method: Method, head: Head, kind: PeftHead) -> None:
    only_shapes = isinstance(head.bias, jax.ShapeDtypeStruct)
    has_bias = getattr(method, "head_bias", True) if only_shapes else np.any(np.asarray(head.bias))
    if has_bias and not kind.has_bias:
        raise ConfigError("transformers' classifiers have heads without a bias; train with --method.no-head-bias")


def _head_tensors(head: Head, kind: PeftHead, sizes: DecoderConfig) -> dict[str, np.ndarray]:
    name = kind.name(sizes.family)
    weight = {f"{name}.weight": np.asarray(head.kernel).T}
    return {**weight, f"{name}.bias": np.asarray(head.bias)} if kind.has_bias else weight


def _write(directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    content = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return write_directory(Path(directory), {WEIGHTS_FILE: content, CONFIG_FILE: text.encode()})


def _adapter_files(
    virtual: VirtualPrompt, sizes: DecoderConfig, common: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    gated = virtual.gated
    assert gated is not None and gated.rows is not None
    layers, length, _ = gated.rows.shape
    tensors = {}
    for i, place in enumerate(range(sizes.layers - layers, sizes.layers)):
        tensors[ADAPTER_PLACE.format(place, "prompt")] = np.asarray(gated.rows[i])[None]
        tensors[ADAPTER_PLACE.format(place, "gate")] = np.asarray(gated.gates[i])[None]
    config = {"peft_type": ADAPTER_TYPE, "adapter_len": length, "adapter_layers": layers, "target_modules": "self_attn"}
    return {**config, **common}, tensors


def _check_tokens(base: FrozenBase, template: Template, virtual: VirtualPrompt) -> None:
    """Refuses a template whose ids differ from PEFT's: all virtual tokens, then `tokenizer(text)`.

    For a chat, only the order is compared, because the ids of the turns come from the chat template on both sides. The
    same holds for a template that continues what the prefix holds, whose text is tokenized without BOS.
    """
    if virtual.tokens is not None:
        check_tokens_agree(base)
    tokenizer, vocab_size = base.tokenizer, base.layout.vocab_size
    pairs = form_of(tokenizer, base.layout).pairs
    if SEPARATOR in template.prompt and pairs is not None and pairs.first_type is not None:
        raise ConfigError("the template has a <sep>, and PEFT gives all tokens after its prompts the first token type")
    chat = template.chat or template.is_conversation
    record: dict[str, Any] = dict.fromkeys(template.prompt_fields, "a")
    if template.is_conversation:
        record[MESSAGES] = [{"role": "user", "content": "a"}]
    encoder = encoder_for(base, template)
    ids = encoder.prompt_ids(record).tolist()
    ids = ids[:-1] if base.layout.encodes else ids  # without the decoder's first token
    own = list(range(vocab_size, vocab_size + template.virtual_tokens))
    front, ours = ids[: len(own)], ids[len(own) :]
    pieces = parse(encoder.form.marked(template.prompt))
    text = "".join("a" if isinstance(piece, Field) else getattr(piece, "text", "") for piece in pieces)
    theirs = [tokenizer(*words.split(SEPARATOR))["input_ids"] for words in (text, text.removeprefix(" "))]
    if front != own or any(id_ in ours for id_ in own):
        where = "they are elsewhere"
        if ids[: len(own) + 1] == [tokenizer.bos_token_id, *own]:
            where = "BOS comes before them"
        elif chat:
            where = "they are inside the chat template"
        raise ConfigError(
            f"PEFT puts all virtual tokens first, but with the template {template.prompt!r} {where}; train with a"
            f" prompt that begins with {template_front(base)!r}"
        )
    if not chat and not template.continues and ours not in theirs:
        raise ConfigError(
            f"PEFT puts the virtual tokens before the tokens of the whole text, {_tokens(tokenizer, theirs[0])}, but"
            f" the template {template.prompt!r} has {_tokens(tokenizer, ours)} there; train with a prompt that begins"
            f" with {template_front(base) if own else '{text}'!r}"
        )


def _tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return f"{' '.join(tokenizer.convert_ids_to_tokens(list(ids[:8])))}{' ...' if len(ids) > 8 else ''}"
