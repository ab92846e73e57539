"""Reads directories of Hugging Face PEFT, `adapter_config.json` and `adapter_model.safetensors`, without PEFT.

    PROMPT_TUNING, P_TUNING, CPT   prompt_embeddings [P, D]
    PREFIX_TUNING, CARTRIDGE       prompt_embeddings [P, L * 2 * K * H], for each layer keys, then values
    MULTITASK_PROMPT_TUNING        prompt_embeddings [P, D], prefix_task_cols [S, P, r], prefix_task_rows [S, r, D]
    ADAPTION_PROMPT                adaption_prompt [1, P, D] and adaption_gate [1] for each of the last layers

A prefix may come with a head: score, classifier or qa_outputs, with weight [C, D] and usually bias [C]. PEFT saves
copies of the base's embeddings and output matrix if they may have changed; they are compared with the base's.
Files are not trusted: names, dtypes and shapes are checked against the base before any tensor is read.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spt_jax.bases.base import FrozenBase
from spt_jax.data.sequences import form_of
from spt_jax.data.task import TASKS
from spt_jax.data.tokenization import tokenization_of
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.interop.peft_decoder_prefixes import check_family, from_stored
from spt_jax.models.encoder_decoder_model import EncoderDecoderModel
from spt_jax.models.layout import SELF, Group
from spt_jax.models.linen_model import host_table
from spt_jax.models.memory import KeysValues
from spt_jax.models.quantized import TableArray
from spt_jax.prompts import DeepPrompts, LlamaAdapter, Method, PrefixTuning, PromptTuning, VirtualPrompt
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.reading import check_directory, check_tensors, read_json, read_tensors, tensor_headers
from spt_jax.prompts.storage import INFO_FILE
from spt_jax.prompts.virtual import Head, VirtualPrefix

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EMBEDDINGS = "prompt_embeddings"

TOKEN_TYPES = ("PROMPT_TUNING", "P_TUNING", "CPT")
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
# The prompts of which PEFT puts rows before the input of an encoder-decoder's encoder, and nowhere else.
ENCODER_TYPES = ("PROMPT_TUNING", "P_TUNING")
# The prompt that PEFT gives to the self-attention of an encoder-decoder's decoder.
DECODER_TYPE = "PREFIX_TUNING"
MULTITASK_TYPE = "MULTITASK_PROMPT_TUNING"
ADAPTER_TYPE = "ADAPTION_PROMPT"
KNOWN_TYPES = (*TOKEN_TYPES, *PREFIX_TYPES, MULTITASK_TYPE, ADAPTER_TYPE)
ADAPTER_PLACE = "base_model.model.model.layers.{}.self_attn.adaption_{}"
DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class PeftHead:
    """The head of a transformers model for one of PEFT's task types.

    Attributes:
      task: the name of the task.
      layer: the name of the linear map in PEFT's files.
      has_bias: whether it has a bias in transformers.
      layers: its name in families where it differs.
    """

    task: str
    layer: str = "base_model.score"
    has_bias: bool = True
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def name(self, family: str) -> str:
        """Returns the name of the linear map for a family of bases."""
        return self.layers.get(family, self.layer)


# The encoders whose token classifiers and question answerers in transformers are a linear map of hidden states.
LINEAR_HEADS = ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "deberta-v2")

HEADS = {
    "SEQ_CLS": PeftHead("classification", has_bias=False),
    "TOKEN_CLS": PeftHead("tagging", layers=dict.fromkeys(("gpt2", *LINEAR_HEADS), "base_model.classifier")),
    "QUESTION_ANS": PeftHead("span", "base_model.qa_outputs"),
}

# Families that scale the rows of the embedding table outside of the embedding module, which is all that PEFT calls.
UNSCALED = ("falcon_h1",)


def import_peft(directory: str | Path, base: FrozenBase, *, task: int | None = None) -> tuple[Method, VirtualPrompt]:
    """Reads a soft prompt that PEFT saved for this base.

    Token rows become a `PromptTuning` prompt, keys and values a `PrefixTuning` prompt (with a head, a `DeepPrompts`
    prompt), and gated rows a `LlamaAdapter` prompt. Of the 2P token rows of an encoder-decoder, PEFT uses the first P,
    before the encoder's input; the others get no gradient, and are not read. Its prefixes are for the decoder's
    self-attention (`peft_decoder_prefixes`).

    Args:
      directory: the PEFT directory, or the URL or hub id of one.
      base: the base that the prompt was trained on. PEFT does not record its fingerprint, so only sizes are checked.
      task: for a multitask prompt, the number of the task to read.

    Returns:
      The method and the prompt, as `save_prompt` takes them.

    Raises:
      CheckpointError: a file is missing or damaged, `peft_type` is not one of those above, or tensors are missing,
        unknown, of the wrong shape or not finite.
      ConfigError: `task` is missing or does not exist, the prompt is not a multitask prompt, PEFT's model of the base
        computes another function, or the base is an encoder-decoder and the prompt not one of PROMPT_TUNING, P_TUNING
        or PREFIX_TUNING.
    """
    directory = prompt_directory(directory)
    config = _read_config(directory)
    kind, where = config.get("peft_type"), directory / CONFIG_FILE
    if kind not in KNOWN_TYPES:
        advice = (
            "; other adapters change the base's weights: merge with PEFT's merge_and_unload, and use the result as base"
        )
        raise CheckpointError(
            f"{where}: peft_type is {reprlib.repr(kind)}; PEFT's soft prompts are {', '.join(KNOWN_TYPES)}"
            f"{advice if isinstance(kind, str) else ''}"
        )
    if task is not None and kind != MULTITASK_TYPE:
        raise ConfigError(f"{where}: peft_type is {kind!r}, so there is no task {task} to choose")
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{directory}: adapter_model.bin is a pickle, which can run code, and is not read; load it with PEFT"
            " and save it again with save_pretrained(safe_serialization=True)"
        )
    if kind == ADAPTER_TYPE:
        return _import_adapter(path, config, base)
    length = _count(config, "num_virtual_tokens", where, base.layout.max_positions)
    parts = _count(config, "num_transformer_submodules", where, 2, default=1)
    if base.layout.encodes:
        if kind == DECODER_TYPE:
            check_family(base)
            return _import_decoder_prefix(path, config, length, parts, base)
        return _import_encoder_rows(path, kind, length, parts, base)
    if parts != 1:
        raise CheckpointError(f"{where}: num_transformer_submodules is 2: the prompt is for an encoder-decoder model")
    if kind == MULTITASK_TYPE:
        check_tokens_agree(base)
        return PromptTuning(length=length), VirtualPrompt(tokens=_task_rows(path, config, base, length, task))
    head = HEADS.get(str(config.get("task_type")))
    if head is not None and not base.layout.causal:
        check_encoder_head(base, head.task, has_prefix=kind in PREFIX_TYPES)
    if kind in TOKEN_TYPES:
        check_tokens_agree(base)
        arrays = _read_arrays(path, {EMBEDDINGS: (length, base.layout.width), **_head_shapes(head, base)}, base)
        virtual, options = _with_head(VirtualPrompt(tokens=jnp.asarray(arrays[EMBEDDINGS])), head, arrays, path, base)
        return PromptTuning(length=length, **options), virtual
    group = plain_group(base)
    axes = len(group.layers), 2, group.kv_heads, group.key_size
    arrays = _read_arrays(path, {EMBEDDINGS: (length, math.prod(axes)), **_head_shapes(head, base)}, base)
    keys, values = arrays[EMBEDDINGS].reshape(length, *axes).transpose(2, 1, 0, 3, 4)
    prefix = VirtualPrefix({SELF: KeysValues(jnp.asarray(keys), jnp.asarray(values))})
    virtual, options = _with_head(VirtualPrompt(prefix=prefix), head, arrays, path, base)
    return (PrefixTuning if head is None else DeepPrompts)(length=length, **options), virtual


def check_encoder_head(base: FrozenBase, task: str, *, has_prefix: bool) -> None:
    """Checks that PEFT's model of an encoder with a head is the encoder with a linear map of its hidden states.

    Args:
      base: the encoder.
      task: the name of the head's task.
      has_prefix: whether the prompt has keys and values.

    Raises:
      ConfigError: it is not.
    """
    if task == "classification":
        raise ConfigError(
            f"{base.name}: where task_type is SEQ_CLS, transformers' classifiers of encoders have other layers before"
            " the head, and PEFT pools a virtual token; heads of TOKEN_CLS and QUESTION_ANS are exchanged"
        )
    if base.config.family not in LINEAR_HEADS:
        raise ConfigError(
            f"{base.name}: in {base.config.family}, transformers has other layers before the head; heads of"
            f" {', '.join(LINEAR_HEADS)} are exchanged with PEFT"
        )
    if has_prefix:
        raise ConfigError(
            f"{base.name} is an encoder, and PEFT's encoders with a head take no prefix (PEFT stops with an error); use"
            " token rows"
        )


def _head_shapes(head: PeftHead | None, base: FrozenBase) -> dict[str, tuple[int | None, ...]]:
    """Returns the names and shapes of a head's tensors."""
    if head is None:
        return {}
    name = head.name(base.config.family)
    weight: dict[str, tuple[int | None, ...]] = {f"{name}.weight": (None, base.config.width)}
    return {**weight, f"{name}.bias": (None,)} if head.has_bias else weight


def _with_head(
    virtual: VirtualPrompt, head: PeftHead | None, arrays: Mapping[str, np.ndarray], path: Path, base: FrozenBase
) -> tuple[VirtualPrompt, dict[str, Any]]:
    """Returns a prompt with the head of these arrays, and the options of its method.

    Raises:
      CheckpointError: they are not such a head.
    """
    if head is None:
        return virtual, {}
    name = head.name(base.config.family)
    kernel = arrays[f"{name}.weight"].T
    bias = arrays.get(f"{name}.bias", np.zeros(kernel.shape[1], np.float32))
    outputs = TASKS[head.task].outputs
    if bias.shape != kernel.shape[1:] or outputs not in (None, len(bias)):
        raise CheckpointError(
            f"{path}: not a {head.task} head: the weight has {kernel.shape[1]} classes, the bias {len(bias)}"
        )
    classes = len(bias) if outputs is None else None
    options = {"head": head.task, "classes": classes, "head_bias": head.has_bias}
    return dataclasses.replace(virtual, head=Head(jnp.asarray(kernel), jnp.asarray(bias))), options


def _import_encoder_rows(
    path: Path, kind: str, length: int, parts: int, base: FrozenBase
) -> tuple[Method, VirtualPrompt]:
    """Reads the token rows of an encoder-decoder's encoder, the first of the `parts` that PEFT stores."""
    if kind not in ENCODER_TYPES:
        raise ConfigError(
            f"{path.with_name(CONFIG_FILE)}: peft_type is {kind!r}; of the prompts of an encoder-decoder, such as"
            f" {base.name}, {', '.join(ENCODER_TYPES)} and {DECODER_TYPE} can be imported"
        )
    rows = _read_arrays(path, {EMBEDDINGS: (parts * length, base.layout.width)}, base)[EMBEDDINGS][:length]
    return PromptTuning(length=length), VirtualPrompt(tokens=jnp.asarray(rows))


def _import_decoder_prefix(
    path: Path, config: Mapping[str, Any], length: int, parts: int, base: FrozenBase
) -> tuple[Method, VirtualPrompt]:
    """Reads the keys and values of the self-attention of an encoder-decoder's decoder."""
    where, group = path.with_name(CONFIG_FILE), base.layout.attention_groups[SELF]
    if parts != 2:
        raise ConfigError(f"{where}: num_transformer_submodules is {parts}; a prefix of an encoder-decoder has 2")
    count = _count(config, "num_layers", where, len(base.layout.attention_layers))
    if count < len(group.layers):
        raise ConfigError(f"{where}: num_layers is {count}, but the decoder of {base.name} has {len(group.layers)}")
    axes = count, 2, group.kv_heads, group.key_size
    stored = _read_arrays(path, {EMBEDDINGS: (length, math.prod(axes))}, base)[EMBEDDINGS].reshape(length, *axes)
    parts_of_layers = stored.transpose(2, 1, 0, 3, 4)
    keys, values = (jnp.asarray(from_stored(part, len(group.layers))) for part in parts_of_layers)
    prefix = VirtualPrefix({SELF: KeysValues(keys, values)})
    return PrefixTuning(length=length, sites=(SELF,)), VirtualPrompt(prefix=prefix)


def check_tokens_agree(base: FrozenBase) -> None:
    """Checks that PEFT's model of a base with virtual tokens is the base with these embeddings before the text.

    Raises:
      ConfigError: it is not.
    """
    if base.layout.encodes:
        return
    if base.config.per_layer is not None:
        raise ConfigError(f"{base.name} has embeddings by layer, for which PEFT has no virtual tokens")
    if base.config.family in UNSCALED and base.config.embedding_scale not in (None, 1.0):
        raise ConfigError(
            f"{base.name}: with virtual tokens, PEFT leaves out the factor {base.config.embedding_scale:g} of the"
            f" text's embeddings that {base.config.family} has, so that its prompts do not fit this base"
        )


def plain_group(base: FrozenBase) -> Group:
    """Returns the only group of layers of a base that PEFT has prefixes for.

    Raises:
      ConfigError: layers differ, or keys and values differ in size.
    """
    group = base.layout.attention_groups.get(SELF)
    equal = group is not None and len(group.layers) == base.config.layers and group.key_size == group.value_size
    if group is None or not equal:
        raise ConfigError(f"{base.name}: PEFT has prefixes only for models whose layers all have the same attention")
    return group


def _task_rows(
    path: Path, config: Mapping[str, Any], base: FrozenBase, length: int, task: int | None
) -> Float[Array, "P D"]:
    where, width = path.with_name(CONFIG_FILE), base.layout.width
    tasks = _count(config, "num_tasks", where, 100_000)
    rank = _count(config, "num_ranks", where, max(length, width))
    if task is None or not 0 <= task < tasks:
        raise ConfigError(f"{where}: there are prompts of {tasks} tasks; choose one, from 0 to {tasks - 1}")
    cols, rows = {"prefix_task_cols": (tasks, length, rank)}, {"prefix_task_rows": (tasks, rank, width)}
    arrays = _read_arrays(path, {EMBEDDINGS: (length, width), **cols, **rows}, base)
    return jnp.asarray(arrays[EMBEDDINGS] * (arrays["prefix_task_cols"][task] @ arrays["prefix_task_rows"][task]))


def _import_adapter(path: Path, config: Mapping[str, Any], base: FrozenBase) -> tuple[Method, VirtualPrompt]:
    where = path.with_name(CONFIG_FILE)
    length = _count(config, "adapter_len", where, base.layout.max_positions)
    layers = _count(config, "adapter_layers", where, base.config.layers)
    places = range(base.config.layers - layers, base.config.layers)
    shapes: dict[str, tuple[int | None, ...]] = {}
    for i in places:
        shapes[ADAPTER_PLACE.format(i, "prompt")] = (1, length, base.config.width)
        shapes[ADAPTER_PLACE.format(i, "gate")] = (1,)
    arrays = _read_arrays(path, shapes, base)
    params = {
        "rows": jnp.concatenate([arrays[ADAPTER_PLACE.format(i, "prompt")] for i in places]),
        "gates": jnp.concatenate([arrays[ADAPTER_PLACE.format(i, "gate")] for i in places]),
    }
    method = LlamaAdapter(length=length, layers=layers)
    return method, method.materialize(params, base.model)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    check_directory(directory)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file, so this is not a PEFT directory{_instead(directory)}")
    return read_json(path)


def _instead(directory: Path) -> str:
    """Returns advice for a directory without the config, depending on its contents."""
    named = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if named:
        return f"; it has the named adapters {', '.join(named[:5])}: give {directory / named[0]} or another of them"
    if (directory / INFO_FILE).exists():
        return "; it is a prompt of this library, which needs no import"
    if (directory / "config.json").exists():
        return "; it is a model: use it as the base, and the adapter's directory as the source"
    return ""


def _read_arrays(path: Path, shapes: Mapping[str, tuple[int | None, ...]], base: FrozenBase) -> dict[str, np.ndarray]:
    """Returns the named tensors as float32. In a shape, None is any size. Checks the header before reading tensors."""
    found = tensor_headers(path)
    for name in sorted(set(found) - set(shapes)):
        _check_extra(path, name, found[name], base)
    check_tensors(path, {name: found[name] for name in found if name in shapes}, shapes, DTYPES)
    return read_tensors(path, list(shapes))


def _same_table(stored: np.ndarray, dtype: str, own: Array | TableArray) -> bool:
    """Returns whether a stored table, of a dtype, is the base's, up to the rounding of either."""
    ours = host_table(own)
    if isinstance(own, TableArray):
        return bool((np.abs(stored - ours) <= 0.01 * np.abs(ours).max(axis=1, keepdims=True)).all())
    coarser = dtype if dtype in ("float16", "bfloat16") else own.dtype
    return np.array_equal(stored.astype(coarser), ours.astype(coarser))


def _check_extra(path: Path, name: str, found: tuple[str, tuple[int, ...]], base: FrozenBase) -> None:
    """Refuses a tensor outside the prompt, unless it is a copy of the base's embeddings or output matrix."""
    leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    where = f"{path}: {name[:200]!r}"
    if leaf in ("embed_tokens", "wte", "shared", "lm_head"):
        model = base.model if isinstance(base.model, EncoderDecoderModel) else base.decoder
        own = model.output_matrix if leaf == "lm_head" else model.input_matrix
        dtype, shape = found
        if shape != own.shape:
            raise CheckpointError(
                f"{where} has the shape {shape}, but the base's has {own.shape}: the vocabulary was resized for the"
                " prompt. Save the resized model, and import the prompt for it"
            )
        if not _same_table(read_tensors(path, [name])[name], dtype, own):
            raise CheckpointError(
                f"{where} is not the base's: it was trained with the prompt, but is not part of a soft prompt. Save a"
                " model with these weights, and import the prompt for it"
            )
        return
    if leaf in ("score", "classifier", "qa_outputs"):
        raise CheckpointError(
            f"{where} is a task head of a model for {sorted(HEADS)}; this library imports heads only with prefixes"
            " (PREFIX_TUNING) for such a task, with the tensors that transformers has there"
        )
    if ".lora_" in name:
        raise CheckpointError(f"{where} belongs to LoRA, which changes the base's weights and is not a soft prompt")
    raise CheckpointError(f"{where} is unknown: a soft prompt of this kind has no such tensor")


def _count(config: Mapping[str, Any], name: str, where: Path, most: int, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(
            f"{where}: {name} is {reprlib.repr(value)}; for this base it must be an integer from 1 to {most}"
        )
    return value


def template_front(base: FrozenBase) -> str:
    """Returns the beginning of a template with PEFT's ids. Without BOS, a literal space replaces the dummy space."""
    if form_of(base.tokenizer, base.layout).opens:
        return "<soft><bos>"
    return "<soft> " if tokenization_of(base.tokenizer).adds_dummy_space else "<soft>"


def default_template(base: FrozenBase, method: Method) -> str:
    """Returns a template's prompt that gives the same ids as PEFT: virtual tokens, then `tokenizer(text)`."""
    return f"{template_front(base) if method.token_count else ''}{{text}}"
