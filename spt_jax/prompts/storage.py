"""Saved prompts: a directory with `prompt.safetensors` (the arrays) and `prompt.json` (how to use them).

The JSON holds the id and fingerprint of the frozen base, the method, the template, package versions and the SHA-256 of
the tensor file, so that a prompt is never silently used with another base or another template.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import reprlib
import sys
import types
import typing
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from spt_jax.bases.base import FrozenBase, lasting_name
from spt_jax.bases.fingerprint import FINGERPRINT_VERSION, FOREIGN, Fingerprint, accepting_floats, quantization_note
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError, did_you_mean
from spt_jax.models.config import DecoderConfig
from spt_jax.models.decoder import decoder_layout
from spt_jax.models.encoder_decoder import encoder_decoder_layout
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.functional import functional_layout
from spt_jax.models.layout import SELF, Layout
from spt_jax.prompts.initializers import Initializer
from spt_jax.prompts.method import Method
from spt_jax.prompts.names import prompt_directory
from spt_jax.prompts.reading import (
    check_directory,
    check_finite,
    check_tensors,
    read_json,
    read_tensors,
    tensor_headers,
)
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.prompts.writing import write_directory
from spt_jax.runtime.files import nearest_path
from spt_jax.runtime.remote import url_of
from spt_jax.runtime.sharding import replicated

FORMAT = 1
PARAMS_FILE = "prompt.safetensors"
INFO_FILE = "prompt.json"

# The largest sizes of a base that a file may claim.
MAX_SIZE = 2**31 - 1
MAX_SIZES: Mapping[str, int] = dict.fromkeys(("layers", "encoder_layers", "decoder_layers"), 2**16)

_PACKAGES = ("spt_jax", "jax", "flax", "transformers")


@dataclasses.dataclass(frozen=True)
class SavedPrompt:
    """The content of a prompt directory.

    Attributes:
      method: the dataclass of the method.
      virtual: the soft prompt as the model sees it, float32.
      template: the template that the prompt was trained with.
      info: the content of `prompt.json`; additions of the caller of `save_prompt` are in "extra".
    """

    method: Method
    virtual: VirtualPrompt
    template: Template
    info: Mapping[str, Any]

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the base that the prompt was trained on."""
        return Fingerprint(**self.info["base"]["fingerprint"])

    @property
    def layout(self) -> Layout:
        """The layout of that base."""
        return _saved_layout(self.fingerprint, "base.fingerprint.config")


def save_prompt(
    directory: str | Path,
    base: FrozenBase,
    method: Method,
    virtual: VirtualPrompt,
    template: Template,
    *,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a prompt directory. A crash leaves the previous prompt or none, but never a half-written one.

    In a run of several processes, only one of them calls this.

    Args:
      directory: a path or a URL; created, or replaced if it holds a prompt; `.NAME.new` and `.NAME.old` next to it are
        used temporarily.
      base: the base that the prompt was trained on.
      method: the dataclass of the method. The rows of an array initializer are not stored.
      virtual: the result of `method.materialize` for the trained parameters, float32 and finite.
      template: the template that the prompt was trained with.
      extra: any JSON to store with it, such as metrics and the training command.

    Returns:
      The directory.

    Raises:
      CheckpointError: the files cannot be written, the directory holds something else, or the arrays are not finite
        float32 arrays of the shapes that the method declares, or `pinned` is not as it declares.
    """
    directory = url_of(directory) or Path(directory)
    return write_directory(directory, prompt_files(directory, base, method, virtual, template, extra=extra))


def prompt_files(
    directory: str | Path,
    base: FrozenBase,
    method: Method,
    virtual: VirtualPrompt,
    template: Template,
    *,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Returns the content of the files that `save_prompt` writes, by name. Takes its arguments.

    Raises:
      CheckpointError: the arrays are not as the method declares, or `extra` is not JSON; the message names `directory`.
    """
    if virtual.pinned is not method.pins:
        raise CheckpointError(
            f"{directory}: `pinned` of the prompt is {virtual.pinned}, that of its method {method.pins}"
        )
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(virtual).items()}
    found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    _check_tensors(directory, found, method, template, base.layout)
    for name, array in arrays.items():
        check_finite(array, f"{directory}: {name!r}")
    content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    info = {
        "format": FORMAT,
        "method": _method_to_json(method),
        "template": dataclasses.asdict(template),
        "base": {
            "id": lasting_name(base.name),
            "revision": base.revision,
            "dtype": str(np.dtype(base.dtype)),
            "fingerprint": base.fingerprint.as_json(),
        },
        "versions": {name: _version(name) for name in _PACKAGES},
        "sha256": hashlib.sha256(content).hexdigest(),
        "extra": dict(extra or {}),
    }
    try:
        text = (json.dumps(info, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{directory}: half of a surrogate pair is not a character ({error})") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory}: `extra` must be JSON with finite numbers ({error})") from error
    return {PARAMS_FILE: content, INFO_FILE: text}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _method_to_json(method: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(method)
    init = fields.get("init")
    if isinstance(init, dict):
        init.pop("rows", None)  # An in-memory array that the prompt started from; it is not stored.
    return fields


def read_prompt(directory: str | Path) -> SavedPrompt:
    """Reads a prompt without its base, to inspect or convert it. All content is validated.

    Args:
      directory: a directory, a URL or a hub id, as in `prompt_directory`.

    Raises:
      ConfigError, RemoteError: as in `prompt_directory`.
      CheckpointError: a file is missing, damaged, of an unknown format, or has invalid content.
    """
    directory = prompt_directory(directory)
    return _with_arrays(directory, *_read_frame(directory))


def _read_frame(directory: Path) -> tuple[dict[str, Any], Method, Template]:
    """Reads everything but the arrays: `prompt.json`, and the method and the template in it."""
    info = _read_info(directory)
    where = str(directory / INFO_FILE)
    try:
        method = _build(_method_class(info["method"], where), info["method"], f"{where}: method")
        template = _build(Template, info["template"], f"{where}: template")
    except CheckpointError:
        raise
    except ValueError as error:  # raised by a dataclass; its message may repeat a value of any length
        raise CheckpointError(f"{where}: {str(error)[:1000]}") from error
    return info, method, template


def _with_arrays(directory: Path, info: dict[str, Any], method: Method, template: Template) -> SavedPrompt:
    """Reads the arrays, after a check of their header against the shapes that the method and base sizes imply."""
    path = directory / PARAMS_FILE
    found = tensor_headers(path)
    fingerprint = Fingerprint(**info["base"]["fingerprint"])
    layout = _saved_layout(fingerprint, f"{directory / INFO_FILE}: base.fingerprint.config")
    _check_tensors(directory, found, method, template, layout)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if digest != info["sha256"]:
        raise CheckpointError(f"{path}: damaged, or not the file that {INFO_FILE} was written with (SHA-256 differs)")
    spec = method.spec(layout)
    arrays = read_tensors(path, list(found))
    virtual = jax.tree.unflatten(jax.tree.structure(spec), [jnp.asarray(arrays[name]) for name in named_leaves(spec)])
    return SavedPrompt(method, virtual, template, info)


def load_prompt(directory: str | Path, base: FrozenBase, *, force: bool = False) -> SavedPrompt:
    """Reads a prompt for use with a base, and replicates its arrays over the mesh of the base.

    Args:
      directory: a directory written by `save_prompt`, or the URL or hub id of one, as in `prompt_directory`.
      base: must have the fingerprint of the base that the prompt was trained on. Its dtype and path do not matter. A
        prompt that was trained on a base without quantization can be used on a quantized one, with a warning.
      force: accept, with a warning, another base of the same width and vocabulary size.

    Raises:
      ConfigError, RemoteError: as in `prompt_directory`.
      CheckpointError: the directory cannot be read, or the base is another one; the message names all fields that
        differ.
    """
    directory = prompt_directory(directory)
    info, method, template = _read_frame(directory)
    fingerprint = Fingerprint(**info["base"]["fingerprint"])
    differences = [
        difference[:500] for difference in base.fingerprint.differences(accepting_floats(fingerprint, base.fingerprint))
    ]
    if differences:
        trained_on = info["base"]["id"]
        message = f"{directory}: trained on another base, {trained_on!r}, not {base.name!r}: {'; '.join(differences)}"
        sizes = ("width", "vocab_size")
        unequal = [name for name in sizes if fingerprint.config[name] != base.fingerprint.config[name]]
        if unequal:
            raise CheckpointError(f"{message}. force=True does not help: the {' and '.join(unequal)} must be the same")
        kernels = f" with quantize={fingerprint.quantize!r}" if fingerprint.quantize else ""
        if not force:
            advice = f"Load {trained_on!r}{kernels}, or pass force=True (--force) to use the prompt anyway"
            raise CheckpointError(f"{message}. {advice}")
        warnings.warn(f"{message}. Using it anyway (force=True)", stacklevel=2)
    note = quantization_note(fingerprint, base.fingerprint)
    if note:
        warnings.warn(f"{directory}: {note}", stacklevel=2)
    prompt = _with_arrays(directory, info, method, template)
    return dataclasses.replace(prompt, virtual=jax.device_put(prompt.virtual, replicated(base.mesh)))


def _read_info(directory: Path) -> dict[str, Any]:
    """Reads `prompt.json`, and checks that it has exactly the known keys, with values of the right types."""
    path = directory / INFO_FILE
    check_directory(directory)
    if not path.exists():
        missing = f"{path}: no such file, so this is not a prompt directory"
        raise CheckpointError(
            (missing if directory.exists() else f"{directory}: no such directory") + _instead(directory)
        )
    info = read_json(path)
    version = info.get("format")
    if type(version) is not int or version != FORMAT:
        raise CheckpointError(f"{path}: format version {version!r} is unknown; this library knows {FORMAT}")
    frame: dict[str, Any] = dict.fromkeys(("method", "template", "base", "extra"), dict)
    frame |= {"format": int, "versions": Mapping[str, str | None], "sha256": str}
    _check_keys(info, frame, str(path))
    base = {"id": str, "revision": str | None, "dtype": str, "fingerprint": dict}
    _check_keys(info["base"], base, f"{path}: base")
    fingerprint = info["base"]["fingerprint"]
    # Version 0.1 of the library wrote the fingerprint without a version.
    known: dict[str, Any] = {"config": dict, "weights": str, "tokenizer": str, "version": int, "quantize": str | None}
    _check_keys({"version": 1, "quantize": None, **fingerprint}, known, f"{path}: base.fingerprint")
    if not 1 <= fingerprint.get("version", 1) <= FINGERPRINT_VERSION:
        raise CheckpointError(
            f"{path}: base.fingerprint.version is {fingerprint['version']}; this library knows {FINGERPRINT_VERSION}:"
            " a newer spt_jax wrote it"
        )
    names = ["width", "vocab_size", "layers", "kv_heads", "head_size"]
    if fingerprint["config"].get("family") == FOREIGN:
        names = ["width", "vocab_size", "max_positions"]
    elif "encoder_layers" in fingerprint["config"]:
        names = ["width", "vocab_size", "encoder_layers", "decoder_layers", "heads", "head_size"]
    if fingerprint["config"].get("embedding_width") is not None:
        names.append("embedding_width")
    for name in names:
        where = f"{path}: base.fingerprint.config.{name}"
        size = _converted(int, fingerprint["config"].get(name), where)
        if size < 1:
            raise CheckpointError(f"{where} is {size}; it must be at least 1")
        if size > MAX_SIZES.get(name, MAX_SIZE):
            raise CheckpointError(f"{where} is {size}; it must be at most {MAX_SIZES.get(name, MAX_SIZE)}")
    return info


def _saved_layout(fingerprint: Fingerprint, where: str) -> Layout:
    """Returns the layout of the base of a saved prompt, which need not be loaded. Only the sizes matter."""
    if fingerprint.is_foreign:
        config = fingerprint.config
        return functional_layout(config["vocab_size"], config["width"], config["max_positions"])
    kind = fingerprint.kind or DecoderConfig
    sizes = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if kind is EncoderDecoderConfig:
        sizes |= {"kv_heads"}
        try:
            given = {name: value for name, value in fingerprint.config.items() if name in sizes}
            return encoder_decoder_layout(_build(EncoderDecoderConfig, given, where))
        except ConfigError as error:
            raise CheckpointError(f"{where}: {str(error)[:1000]}") from error
    sizes |= {"embedding_width", "window", "window_layers", "delta_net", "mamba", "latent", "rope", "variants"}
    sizes |= {"causal", "pooling", "output_head"}
    config = fingerprint.current.config
    try:
        return decoder_layout(_build(DecoderConfig, {k: v for k, v in config.items() if k in sizes}, where))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {str(error)[:1000]}") from error


def _instead(directory: Path) -> str:
    """Returns the end of the message for a missing `prompt.json`: a hint based on what the directory holds."""
    interrupted = directory.resolve().with_name(f".{directory.name}.old")
    if interrupted.exists():
        return f"; a save was interrupted, the previous prompt is {interrupted}"
    if not directory.exists():
        return nearest_path(directory)
    if (directory / "adapter_config.json").exists():
        return "; it is a PEFT adapter: convert it with `spt-jax import --source`"
    inner = sorted(str(path.parent) for path in directory.glob(f"*/{INFO_FILE}"))
    if len(inner) == 1:
        return f"; did you mean {inner[0]!r}?"
    return f"; name one of the prompts in it: {', '.join(inner[:5])}" if inner else ""


def _check_keys(fields: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    _refuse_unknown(fields, known, where)
    for name, kind in known.items():
        if name not in fields:
            raise CheckpointError(f"{where}: {name!r} is missing")
        _converted(kind, fields[name], f"{where}: {name}")


def _refuse_unknown(fields: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in sorted(set(fields) - set(known)):
        raise CheckpointError(f"{where}: unknown key {name!r}; {did_you_mean(name, known)}")


def _method_class(fields: Mapping[str, Any], where: str) -> Any:
    from spt_jax.prompts import METHODS

    name = fields.get("name")
    if not isinstance(name, str) or name not in METHODS:
        raise CheckpointError(f"{where}: unknown method {name!r}; {did_you_mean(str(name), METHODS)}")
    return METHODS[name]


def _build(cls: Any, fields: Mapping[str, Any], where: str) -> Any:
    """Builds a dataclass from its JSON. Missing keys take the defaults of the class."""
    hints = typing.get_type_hints(cls)
    if cls is Initializer:
        del hints["rows"]
    _refuse_unknown(fields, hints, where)
    values = {name: _converted(hints[name], value, f"{where}.{name}") for name, value in fields.items()}
    if cls is Initializer and values.get("name") == "array":
        values["rows"] = ()  # The rows were not stored.
    for field in dataclasses.fields(cls):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise CheckpointError(f"{where}: {field.name!r} is missing")
    return cls(**values)


def _converted(kind: Any, value: Any, where: str) -> Any:
    """Converts a JSON value to the type of a field. Only tuples, dataclasses and integers for floats are converted."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (kind,) = (option for option in options if option is not type(None))
        return _converted(kind, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_converted(options[0], item, where) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: _converted(options[1], item, f"{where}.{key[:60]}") for key, item in value.items()}
    if origin is Literal and value in options:
        return value
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not kind:
        raise CheckpointError(f"{where} is {reprlib.repr(value)}; expected {getattr(kind, '__name__', kind)}")
    return value


def named_leaves(virtual: VirtualPrompt) -> dict[str, Any]:
    """Returns the leaves of a prompt, in the order of `jax.tree.leaves`, by names such as "tokens" or "prefix/keys".

    The name of a group of layers is part of the name, as in "prefix/cross/keys", unless it is "self".
    """

    def name_of(path: Sequence[Any]) -> str:
        name = "/".join(str(getattr(key, "name", None) or key.key) for key in path)
        return name.replace(f"/memory/{SELF}/", "/").replace("/memory/", "/")

    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(virtual)}


def _check_tensors(
    directory: str | Path,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    method: Method,
    template: Template,
    layout: Layout,
) -> None:
    """Checks that tensors are as the method declares, and that method and template have equally many virtual tokens."""
    expected = {name: tuple(leaf.shape) for name, leaf in named_leaves(method.spec(layout)).items()}
    _refuse_unknown(found, expected, f"{directory}: tensors")
    check_tensors(directory, found, expected, ("float32",))
    if template.new_tokens != getattr(method, "new_tokens", ()):
        raise CheckpointError(f"{directory}: the new tokens of the template are not those of the method")
    if template.per_input != method.per_input:
        raise CheckpointError(
            f"{directory}: `per_input` of the template is {template.per_input}, that of its method {method.per_input}"
        )
    placed = template.virtual_tokens
    if placed != method.token_count:
        raise CheckpointError(
            f"{directory}: the template places {placed} virtual tokens, the method has {method.token_count}"
        )
