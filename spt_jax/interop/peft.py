"""Directories of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`. Neither needs PEFT.

    PROMPT_TUNING, P_TUNING, CPT   prompt_embeddings [P, D]
    PREFIX_TUNING, CARTRIDGE       prompt_embeddings [P, L * 2 * K * H], of every layer keys, then values
    MULTITASK_PROMPT_TUNING        prompt_embeddings [P, D], prefix_task_cols [S, P, r], prefix_task_rows [S, r, D]
    ADAPTION_PROMPT                of each of the last layers adaption_prompt [1, P, D] and adaption_gate [1]

Beside a prefix there may be a head: score, classifier or qa_outputs, weight [C, D] and mostly bias [C].
Nothing of a file is trusted: names, dtypes and shapes are checked against the base before any tensor is read.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from spt_jax.base import FrozenBase
from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import MESSAGES, Field, HeadKind, parse
from spt_jax.data.tokenization import adds_bos, tokenization_of
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.prompts import DeepPrompts, LlamaAdapter, Method, PrefixTuning, PromptTuning, VirtualPrompt
from spt_jax.prompts.storage import SavedPrompt, write_directory
from spt_jax.prompts.virtual import Head, KeysValues

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
EMBEDDINGS = "prompt_embeddings"

TOKEN_TYPES = ("PROMPT_TUNING", "P_TUNING", "CPT")
PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")
MULTITASK_TYPE = "MULTITASK_PROMPT_TUNING"
ADAPTER_TYPE = "ADAPTION_PROMPT"
KNOWN_TYPES = (*TOKEN_TYPES, *PREFIX_TYPES, MULTITASK_TYPE, ADAPTER_TYPE)
ADAPTER_PLACE = "base_model.model.model.layers.{}.self_attn.adaption_{}"
# Kinds of head by what PEFT calls the task.
HEADS: dict[str, HeadKind] = {"SEQ_CLS": "classification", "TOKEN_CLS": "tagging", "QUESTION_ANS": "span"}


def import_peft(directory: str | Path, base: FrozenBase, *, task: int | None = None) -> tuple[Method, VirtualPrompt]:
    """Reads what PEFT saved for this base.

    Token rows become a `PromptTuning` prompt, keys and values a `PrefixTuning` one, or with a head beside them a
    `DeepPrompts` one, gated rows a `LlamaAdapter` one.

    Args:
      directory: PEFT's.
      base: the base that the prompt was trained on. PEFT records no fingerprint of it, so only sizes are checked.
      task: of a multitask prompt, the number of the task whose prompt is wanted.

    Raises:
      CheckpointError: a file is missing or damaged, the kind is not one of the above, tensors are missing, unknown,
        misshapen or not finite.
    """
    directory = Path(directory)
    config = _read_config(directory)
    kind, where = config.get("peft_type"), directory / CONFIG_FILE
    if kind not in KNOWN_TYPES:
        raise CheckpointError(f"{where}: peft_type is {kind!r}; this library reads {', '.join(KNOWN_TYPES)}")
    if task is not None and kind != MULTITASK_TYPE:
        raise ConfigError(f"{where}: peft_type is {kind!r}, so there is no task {task} to choose")
    path = directory / WEIGHTS_FILE
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{directory}: adapter_model.bin is a pickle, which can run anything, and is not read; load it with PEFT"
            " and save it again with save_pretrained(safe_serialization=True)"
        )
    if kind == ADAPTER_TYPE:
        return _import_adapter(path, config, base)
    length = _count(config, "num_virtual_tokens", where, base.config.max_positions)
    if _count(config, "num_transformer_submodules", where, 2, default=1) != 1:
        raise CheckpointError(f"{where}: num_transformer_submodules is 2: a prompt for an encoder-decoder")
    sizes = base.config
    if kind in TOKEN_TYPES:
        rows = _read_arrays(path, {EMBEDDINGS: (length, sizes.width)})[EMBEDDINGS]
        return PromptTuning(length=length), VirtualPrompt(tokens=jnp.asarray(rows))
    if kind == MULTITASK_TYPE:
        return PromptTuning(length=length), VirtualPrompt(tokens=_task_rows(path, config, base, length, task))
    head = HEADS.get(str(config.get("task_type")))
    shapes: dict[str, tuple[int | None, ...]] = {
        EMBEDDINGS: (length, sizes.layers * 2 * sizes.kv_heads * sizes.head_size)
    }
    name = _head_name(head, sizes)
    if head is not None:
        # A classifier's linear map has no bias in transformers.
        shapes |= {f"{name}.weight": (None, sizes.width)}
        shapes |= {} if head == "classification" else {f"{name}.bias": (None,)}
    arrays = _read_arrays(path, shapes)
    flat = arrays[EMBEDDINGS]
    keys, values = flat.reshape(length, sizes.layers, 2, sizes.kv_heads, sizes.head_size).transpose(2, 1, 0, 3, 4)
    prefix = KeysValues(jnp.asarray(keys), jnp.asarray(values))
    if head is None:
        return PrefixTuning(length=length), VirtualPrompt(prefix=prefix)
    kernel = arrays[f"{name}.weight"].T
    bias = arrays.get(f"{name}.bias", np.zeros(kernel.shape[1], np.float32))
    if bias.shape != kernel.shape[1:] or (head == "span" and len(bias) != 2):
        raise CheckpointError(f"{path}: no {head} head: a weight for {kernel.shape[1]} classes, a bias for {len(bias)}")
    classes = None if head == "span" else len(bias)
    method = DeepPrompts(length=length, head=head, classes=classes, head_bias=head != "classification")
    return method, VirtualPrompt(prefix=prefix, head=Head(jnp.asarray(kernel), jnp.asarray(bias)))


def _head_name(head: HeadKind | None, sizes: DecoderConfig) -> str:
    """Where transformers' model of this family for the task has its head, in PEFT's names."""
    if head == "span":
        return "base_model.qa_outputs"
    return "base_model.classifier" if head == "tagging" and sizes.family == "gpt2" else "base_model.score"


def _task_rows(
    path: Path, config: Mapping[str, Any], base: FrozenBase, length: int, task: int | None
) -> Float[Array, "P D"]:
    where, width = path.with_name(CONFIG_FILE), base.config.width
    tasks = _count(config, "num_tasks", where, 100_000)
    rank = _count(config, "num_ranks", where, max(length, width))
    if task is None or not 0 <= task < tasks:
        raise ConfigError(f"{where}: holds the prompts of {tasks} tasks; choose one, from 0 to {tasks - 1}")
    cols, rows = {"prefix_task_cols": (tasks, length, rank)}, {"prefix_task_rows": (tasks, rank, width)}
    arrays = _read_arrays(path, {EMBEDDINGS: (length, width), **cols, **rows})
    return jnp.asarray(arrays[EMBEDDINGS] * (arrays["prefix_task_cols"][task] @ arrays["prefix_task_rows"][task]))


def _import_adapter(path: Path, config: Mapping[str, Any], base: FrozenBase) -> tuple[Method, VirtualPrompt]:
    where = path.with_name(CONFIG_FILE)
    length = _count(config, "adapter_len", where, base.config.max_positions)
    layers = _count(config, "adapter_layers", where, base.config.layers)
    places = range(base.config.layers - layers, base.config.layers)
    shapes: dict[str, tuple[int | None, ...]] = {}
    for i in places:
        shapes[ADAPTER_PLACE.format(i, "prompt")] = (1, length, base.config.width)
        shapes[ADAPTER_PLACE.format(i, "gate")] = (1,)
    arrays = _read_arrays(path, shapes)
    params = {
        "rows": jnp.concatenate([arrays[ADAPTER_PLACE.format(i, "prompt")] for i in places]),
        "gates": jnp.concatenate([arrays[ADAPTER_PLACE.format(i, "gate")] for i in places]),
    }
    method = LlamaAdapter(length=length, layers=layers)
    return method, method.materialize(base.module, base.params, params)


def export_peft(directory: str | Path, saved: SavedPrompt, base: FrozenBase) -> Path:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads.

    Raises:
      ConfigError: PEFT cannot express the prompt: it puts virtual tokens before everything, BOS included, and has no
        prompts of several parts.
      CheckpointError: the directory holds other things, or cannot be written.
    """
    _check_tokens(saved, base)
    virtual, sizes = saved.virtual, base.config
    parts = [name for name in ("tokens", "shift", "prefix", "gated", "head") if getattr(virtual, name) is not None]
    prompt_learning = _common(saved, base)
    if parts == ["tokens"]:
        assert virtual.tokens is not None
        length, width = virtual.tokens.shape
        heads = {"token_dim": width, "num_attention_heads": sizes.heads}
        config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": length, **heads, **prompt_learning}
        tensors = {EMBEDDINGS: np.asarray(virtual.tokens)}
    elif parts in (["prefix"], ["prefix", "head"]):
        assert virtual.prefix is not None
        both = np.stack([virtual.prefix.keys, virtual.prefix.values])
        length = both.shape[2]
        heads = {"token_dim": sizes.kv_heads * sizes.head_size, "num_attention_heads": sizes.kv_heads}
        config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, **heads, **prompt_learning}
        tensors = {EMBEDDINGS: both.transpose(2, 1, 0, 3, 4).reshape(length, -1)}
        if virtual.head is not None:
            tensors |= _head_tensors(virtual.head, saved.template.head, sizes)
            config |= {"task_type": next(name for name, head in HEADS.items() if head == saved.template.head)}
    elif parts == ["gated"]:
        common = {k: v for k, v in prompt_learning.items() if not k.startswith("num_")}
        config, tensors = _adapter_files(virtual, sizes, common)
    else:
        raise ConfigError(f"PEFT has no prompt of these parts together: {', '.join(parts)}")
    return _write(directory, config, tensors)


def export_peft_tasks(directory: str | Path, prompts: Sequence[SavedPrompt], base: FrozenBase) -> Path:
    """Writes prompts of token rows, all of one length, as the tasks 0, 1, ... of one multitask prompt of PEFT's.

    PEFT multiplies shared rows with a matrix per task of rank r: here ones, and each task's own rows (r = P).

    Raises:
      ConfigError: a prompt is not token rows alone, lengths differ, or PEFT does not have the template's order.
      CheckpointError: as `export_peft`.
    """
    rows = []
    for saved in prompts:
        if saved.virtual.tokens is None or len(jax.tree.leaves(saved.virtual)) > 1:
            raise ConfigError(f"a {saved.method.name} prompt is not token rows alone, so it is no task of PEFT's")
        _check_tokens(saved, base)
        rows.append(np.asarray(saved.virtual.tokens))
    if len({own.shape for own in rows}) > 1:
        raise ConfigError(f"tasks of PEFT's have prompts of one length; these have {[len(own) for own in rows]}")
    stacked = np.stack(rows)
    tasks, length, width = stacked.shape
    config = {
        "peft_type": MULTITASK_TYPE,
        "num_tasks": tasks,
        "num_ranks": length,
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_attention_heads": base.config.heads,
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
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_layers": base.config.layers,
    }


def _head_tensors(head: Head, kind: HeadKind, sizes: DecoderConfig) -> dict[str, np.ndarray]:
    name, bias = _head_name(kind, sizes), np.asarray(head.bias)
    weight = {f"{name}.weight": np.asarray(head.kernel).T}
    if kind != "classification":
        return {**weight, f"{name}.bias": bias}
    if np.any(bias):
        raise ConfigError("transformers' classifiers have a head without a bias; train with --method.no-head-bias")
    return weight


def _write(directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    content = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return write_directory(Path(directory), {WEIGHTS_FILE: content, CONFIG_FILE: text.encode()})


def _adapter_files(
    virtual: VirtualPrompt, sizes: DecoderConfig, common: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    gated = virtual.gated
    if gated is None or gated.rows is None:
        raise ConfigError("this gated prompt has lost the rows it was made from, which PEFT's files hold")
    if sizes.family not in ("llama", "mistral"):
        raise ConfigError(f"PEFT's adaption prompts are not what this library's are for the family {sizes.family}")
    layers, length, _ = gated.rows.shape
    tensors = {}
    for i, place in enumerate(range(sizes.layers - layers, sizes.layers)):
        tensors[ADAPTER_PLACE.format(place, "prompt")] = np.asarray(gated.rows[i])[None]
        tensors[ADAPTER_PLACE.format(place, "gate")] = np.asarray(gated.gates[i])[None]
    config = {"peft_type": ADAPTER_TYPE, "adapter_len": length, "adapter_layers": layers, "target_modules": "self_attn"}
    return {**config, **common}, tensors


def _check_tokens(saved: SavedPrompt, base: FrozenBase) -> None:
    """Refuses a template whose ids PEFT does not have: all virtual tokens, then `tokenizer(text)`.

    Around a chat only the order is compared: the ids of its turns come from the chat template on both sides.
    """
    template, tokenizer, vocab_size = saved.template, base.tokenizer, base.config.vocab_size
    chat = template.chat or template.is_conversation
    record: dict[str, Any] = dict.fromkeys(template.prompt_fields, "a")
    if template.is_conversation:
        record[MESSAGES] = [{"role": "user", "content": "a"}]
    encoder = Encoder(template, tokenizer, vocab_size, base.config.max_positions)
    ids = encoder.prompt_ids(record).tolist()
    virtual = list(range(vocab_size, vocab_size + template.virtual_tokens))
    front, ours = ids[: len(virtual)], ids[len(virtual) :]
    text = "".join("a" if isinstance(piece, Field) else getattr(piece, "text", "") for piece in parse(template.prompt))
    theirs = [tokenizer(words)["input_ids"] for words in (text, text.removeprefix(" "))]
    cause = f"the template {template.prompt!r} cannot be exported: PEFT puts"
    if front != virtual or any(id_ in ours for id_ in virtual):
        where = " inside the chat template" if chat else ""
        raise ConfigError(
            f"{cause} all virtual tokens before everything, and here they stand elsewhere{where}; train with a prompt"
            f" that begins with {_front(tokenizer)!r}"
        )
    if not chat and ours not in theirs:
        raise ConfigError(
            f"{cause} the virtual tokens before the tokens of the whole text, {_tokens(tokenizer, theirs[0])}, and this"
            f" template has {_tokens(tokenizer, ours)} there; train with a prompt that begins with"
            f" {_front(tokenizer) if virtual else '{text}'!r}"
        )


def _tokens(tokenizer: Any, ids: Sequence[int]) -> str:
    return f"{' '.join(tokenizer.convert_ids_to_tokens(list(ids[:8])))}{' ...' if len(ids) > 8 else ''}"


def _front(tokenizer: Any) -> str:
    """How a template begins that has PEFT's ids. Without a BOS, a literal space stands for the dummy space."""
    if adds_bos(tokenizer):
        return "<soft><bos>"
    return "<soft> " if tokenization_of(tokenizer).adds_dummy_space else "<soft>"


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file, so this is no directory of PEFT's") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no object")
    return config


def _read_arrays(path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, np.ndarray]:
    """Exactly the named tensors, float32; None is any size. The header is checked before a tensor is read."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            for name in sorted(names ^ set(shapes)):
                raise CheckpointError(f"{path}: the tensor {name!r} is {'unknown' if name in names else 'missing'}")
            for name, shape in shapes.items():
                found = file.get_slice(name)
                sizes = tuple(found.get_shape())
                fits = len(sizes) == len(shape) and all(b in (None, a) for a, b in zip(sizes, shape, strict=True))
                if not fits or found.get_dtype() not in ("F32", "F16", "BF16"):
                    raise CheckpointError(
                        f"{path}: {name!r} is {found.get_dtype()} {sizes}; the config and this base make it {shape},"
                        " of floats"
                    )
            arrays = {name: np.asarray(file.get_tensor(name), np.float32) for name in shapes}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: missing, truncated or damaged ({error})") from error
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: {name!r} holds values that are not finite")
    return arrays


def _count(config: Mapping[str, Any], name: str, where: Path, most: int, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(f"{where}: {name} is {value!r}; for this base it is a whole number from 1 to {most}")
    return value


def default_template(base: FrozenBase, method: Method) -> str:
    """The prompt side of a template with the ids that PEFT has: virtual tokens, then `tokenizer(text)`."""
    return f"{_front(base.tokenizer) if method.token_count else ''}{{text}}"
