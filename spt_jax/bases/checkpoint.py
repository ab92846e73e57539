"""Hugging Face checkpoints to stacked, sharded parameters, and back.

Each family has a table of where our leaves are stored in a checkpoint. Every tensor is read once, hashed as stored and
cast into its leaf, which is placed on the devices before the next leaf is read. A tensor that is missing, unknown,
duplicate, misshapen or not finite raises an error with its name.
"""

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from spt_jax.bases.families import ENCODER_DECODERS, FAMILIES
from spt_jax.bases.families.family import OUTPUT_BIAS_KEY, OUTPUT_KEY, RenamedFamily, with_prefix
from spt_jax.bases.files import checkpoint_files, listed
from spt_jax.bases.float_values import chunks, is_finite
from spt_jax.bases.leaf_buffers import (
    Fill,
    FloatBuffer,
    KernelBuffer,
    LeafBuffer,
    TableBuffer,
    kept_kernel,
    kept_table,
)
from spt_jax.bases.packed import Packed
from spt_jax.bases.places import LeafPath, Place, all_places, origins, stored_shape
from spt_jax.bases.quantized_files import FileQuantization, methods_of
from spt_jax.bases.tensors import Opener, form_of, opener_of, read_packed
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.attention import Stream
from spt_jax.models.decoder import Decoder
from spt_jax.models.encoder_decoder import EncoderDecoder
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.model import Params
from spt_jax.models.model_config import ModelConfig
from spt_jax.models.quantized import KernelArray, TableArray

_OUTPUT = ("output",)
Quantization = type[KernelArray] | Literal["keep"] | None


# Buffers that older libraries stored beside the weights; nothing is lost by passing over them.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")


def _canonical(name: str, config: ModelConfig) -> str | None:
    """Returns the name in the family's table of a stored tensor; None for one of another part of the model."""
    if isinstance(config, EncoderDecoderConfig):
        return ENCODER_DECODERS[config.family].canonical(name, config)
    family = FAMILIES[config.family]
    return family.canonical(name, config) if isinstance(family, RenamedFamily) else with_prefix(name, family.prefix)


def _places_in(files: list[Path], config: ModelConfig, opener: Opener) -> dict[str, list[Place]]:
    """Returns what each key fills, by that of the family's tables whose tensors the files hold."""
    table, *others = tables = all_places(config)
    if not others:
        return table
    keys: set[str | None] = set()
    for file in files:
        with opener(file, list(table)) as tensors:
            keys |= {_canonical(name, config) for name in tensors.names()}
    return min(tables, key=lambda table: len(table.keys() - keys))


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its file, and its name there."""

    file: Path
    name: str

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


def _find_tensors(
    files: list[Path],
    config: ModelConfig,
    expected: Mapping[str, list[Place]],
    shapes: Mapping[LeafPath, Any],
    opener: Opener,
) -> dict[str, Stored]:
    """Returns where each key of the family's table is stored. Names and shapes are checked before any tensor is read.

    The output matrix of a tied checkpoint is among them, if it is stored.
    """
    found: dict[str, Stored] = {}
    unknown = []
    for file in files:
        with opener(file, [*expected, OUTPUT_KEY]) as tensors:
            keys = {name: _canonical(name, config) for name in tensors.names()}
            _check_not_quantized(file, [name for name, key in keys.items() if key and key not in expected])
            for name, key in keys.items():
                if key is None:
                    continue
                if key in found:
                    raise CheckpointError(f"tensor {name!r} is in both {found[key].file.name} and {file.name}")
                if key in expected or key == OUTPUT_KEY:
                    found[key] = Stored(file, name)
                elif not _BUFFERS.search(key):
                    unknown.append(f"{name!r} in {file.name}")
                if key in expected:
                    _check_shape(tensors.shape(name), found[key], expected[key], shapes)
    _check_complete(config, sorted(set(expected) - set(found)), files[0].parent)
    if unknown:
        raise CheckpointError(
            f"checkpoint holds {len(unknown)} tensors that a {config.family} model does not have: {listed(unknown)}"
        )
    return found


def _check_not_quantized(file: Path, names: list[str]) -> None:
    """Raises CheckpointError if unknown tensors of a file are of quantized weights that the config does not tell of."""
    if methods := methods_of(names):
        name = next(name for name in names if methods_of([name]))
        raise CheckpointError(
            f"{file}: tensor {name!r} is one of checkpoints that are quantized by {' or '.join(methods)}; the"
            " quantization_config of config.json is missing, or names another method"
        )


def _check_complete(config: ModelConfig, missing: list[str], directory: Path) -> None:
    if OUTPUT_KEY in missing and set(missing) <= {OUTPUT_KEY, OUTPUT_BIAS_KEY}:
        raise CheckpointError(
            f"{directory}: no output matrix ({OUTPUT_KEY!r}), and config.json does not tie it to the embedding. Save"
            " the model with its head (AutoModelForCausalLM), or set tie_word_embeddings true in config.json"
        )
    if missing:
        raise CheckpointError(
            f"{directory}: the checkpoint lacks {len(missing)} tensors of a {config.family} model with {config.layers}"
            f" layers: {listed(missing)}"
        )


def read_params(
    directory: Path,
    config: ModelConfig,
    dtype: Any,
    sharding_of: Callable[[LeafPath], Any],
    *,
    quantize: Quantization = None,
    quantization: FileQuantization | None = None,
) -> tuple[Params, str]:
    """Reads a checkpoint onto the devices.

    Host memory holds one leaf at a time, the largest first, and on CPU that memory becomes the leaf: the peak stays
    near the size of the parameters. Of leaves that are quantized, only one layer or expert is in memory as floats.

    Args:
      directory: holds the safetensors files.
      config: the model that the checkpoint is for.
      dtype: what every leaf is cast to.
      sharding_of: the sharding of each leaf, by its path.
      quantize: what kernels become, from the tensors as stored, except those of routers and of gates of shared MLPs;
        embeddings and the output matrix become `Int8Table`s. "keep" for what a GGUF file or a quantized checkpoint has
        packed.
      quantization: how the files are quantized; their weights are dequantized one at a time.

    Returns:
      The parameters of `Decoder(config)` or `EncoderDecoder(config)`, and the hexadecimal SHA-256 digest of the tensors
      as stored, of quantized weights of their values.

    Raises:
      CheckpointError: for a damaged file and for missing, unknown, duplicate or misshapen tensors, and for values
        that are not finite.
      ConfigError: "keep" does not support a type of blocks, or the order in which the base's tensors are stored.
    """
    stored_in = checkpoint_files(directory)
    shapes = _flat(parameter_shapes(config))
    leaves: dict[LeafPath, jax.Array | KernelArray | TableArray] = {}
    digests: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        hashing = stack.enter_context(ThreadPoolExecutor(1))
        opener = stack.enter_context(opener_of(stored_in, quantization))
        expected = _places_in(stored_in, config, opener)
        found = _find_tensors(stored_in, config, expected, shapes, opener)
        used = {at.file for at in found.values()}
        opened = {file: stack.enter_context(opener(file, list(found))) for file in used}
        forms = {key: form_of(opened[at.file], at.name) for key, at in found.items()}
        if quantize == "keep" and not any(forms.values()):
            raise ConfigError(
                f"base.quantize keep is for GGUF files and quantized checkpoints whose matrices can stay packed;"
                f" {directory} has none"
            )
        for paths, keys in _groups(expected, shapes):
            buffers: dict[LeafPath, LeafBuffer] = {}
            for path in paths:
                fills = [
                    Fill(place, forms[key], opened[found[key].file].shape(found[key].name))
                    for key in keys
                    for place in expected[key]
                    if place.path == path
                ]
                buffers[path] = _buffer(path, shapes[path].shape, dtype, quantize, fills)
            # By layer, so that few layers of a quantized kernel are incomplete.
            for key in sorted(keys, key=lambda key: min(place.index for place in expected[key])):
                at, targets = found[key], [buffers[place.path] for place in expected[key]]
                file = opened[at.file]
                packed = any(buffer.packed for buffer in targets)
                tensor = read_packed(file, at.name) if packed else Packed(file.read(at.name))
                hashed = hashing.submit(_digest, tensor.values, at)
                try:
                    for place, buffer in zip(expected[key], targets, strict=True):
                        buffer.fill(place, tensor, str(at))
                finally:  # A tensor that is not finite may not fit the leaf's dtype either.
                    digests[key] = hashed.result()
                del tensor, targets, buffer
            for path, buffer in buffers.items():
                sharding = sharding_of(path)
                packed_table = is_table(path) and not isinstance(buffer, FloatBuffer)
                leaves[path] = buffer.placed(table_sharding(path, sharding) if packed_table else sharding)
            del buffers, buffer
        if config.tied and OUTPUT_KEY in found:
            at = found[OUTPUT_KEY]
            _check_tied(_digest(opened[at.file].read(at.name), at), digests, directory, config)
    lines = "\n".join(f"{key} {digest}" for key, digest in sorted(digests.items()))
    return traverse_util.unflatten_dict(leaves), hashlib.sha256(lines.encode()).hexdigest()


def _buffer(
    path: LeafPath, shape: tuple[int, ...], dtype: Any, quantize: Quantization, fills: Sequence[Fill]
) -> LeafBuffer:
    """Returns host memory for a leaf, given what fills it."""
    forms = [fill.form for fill in fills]
    if quantize is None or not (is_table(path) or quantizable(path)) or (quantize == "keep" and not any(forms)):
        return FloatBuffer(shape, jnp.dtype(dtype))
    if quantize != "keep":
        if is_table(path):
            return TableBuffer(table_shape(path, shape), jnp.dtype(dtype))
        return KernelBuffer(quantize, shape, [fill.place.index for fill in fills])
    if is_table(path):
        return kept_table(table_shape(path, shape), jnp.dtype(dtype), fills)
    return kept_kernel(shape, jnp.dtype(dtype), fills)


def is_table(path: LeafPath) -> bool:
    """Returns whether a leaf has a row or column per token, and becomes a `TableArray` by any quantization."""
    return path[-1] == "embedding" or path == _OUTPUT


def table_shape(path: LeafPath, shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape [V, D] of a table, given that of the leaf."""
    rows, columns = shape
    return (columns, rows) if path == _OUTPUT else (rows, columns)


def table_sharding(path: LeafPath, sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding of a float table [V, D], given that of the leaf."""
    if path != _OUTPUT:
        return sharding
    rows, columns = (*sharding.spec, None, None)[:2]
    return NamedSharding(sharding.mesh, PartitionSpec(columns, rows))


def quantizable(path: LeafPath) -> bool:
    """Returns whether a leaf is a kernel that loses little by quantization: rounded routers choose other experts."""
    return path[-1] == "kernel" and path[-2] not in ("router", "shared_gate")


def _groups(
    expected: Mapping[str, list[Place]], shapes: Mapping[LeafPath, Any]
) -> list[tuple[tuple[LeafPath, ...], list[str]]]:
    """Groups leaves that are filled from the same tensors, with the keys of the tensors; the largest group first."""
    groups: dict[LeafPath, tuple[dict[LeafPath, None], list[str]]] = {}
    for key, fills in expected.items():
        paths, keys = {place.path: None for place in fills}, [key]
        for other_paths, other_keys in {id(groups[path]): groups[path] for path in paths if path in groups}.values():
            paths, keys = other_paths | paths, other_keys + keys
        groups |= dict.fromkeys(paths, (paths, keys))
    found = {id(group): (tuple(group[0]), group[1]) for group in groups.values()}
    return sorted(found.values(), key=lambda group: -sum(shapes[path].size for path in group[0]))


def _flat(params: Params) -> dict[LeafPath, Any]:
    return dict(traverse_util.flatten_dict(params))


def _check_tied(output: str, digests: Mapping[str, str], directory: Path, config: ModelConfig) -> None:
    table = origins(config)
    key = table.get(("decoder", "embedding"), table["embedding",])[0].key
    if output != digests[key]:
        raise CheckpointError(
            f"{directory}: the config ties the output matrix to the embedding, but {OUTPUT_KEY!r} and {key!r} differ;"
            " set tie_word_embeddings to false in config.json to use both"
        )


def _check_shape(stored: tuple[int, ...], at: Stored, fills: list[Place], shapes: Mapping[LeafPath, Any]) -> None:
    """Checks that the leaves that a tensor fills cover it exactly."""
    shape = stored_shape(fills, shapes)
    if stored != shape:
        raise CheckpointError(f"tensor {at.name!r} in {at.file.name} has shape {stored}; the config asks for {shape}")


def _digest(tensor: np.ndarray, at: Stored) -> str:
    """Returns the SHA-256 of a tensor after checking that its values are finite."""
    digest, finite = hashlib.sha256(f"{tensor.dtype} {tensor.shape} ".encode()), True
    for chunk in chunks(tensor):
        digest.update(chunk.view(np.uint8).data)
        finite = finite and is_finite(chunk)
    if not finite:
        raise CheckpointError(
            f"{at} holds NaN or infinity; the file is damaged, or the model was saved after its training diverged"
        )
    return digest.hexdigest()


@functools.lru_cache(maxsize=128)
def parameter_shapes(config: ModelConfig) -> Params:
    """Returns the parameter tree of a model as `jax.ShapeDtypeStruct`s, without computing anything."""

    def init() -> Any:
        x, place = jnp.zeros((1, 1, config.input_width)), jnp.zeros((1, 1), jnp.int32)
        stream = Stream(place, place, place, ids=place)
        if isinstance(config, EncoderDecoderConfig):
            x, two = jnp.zeros((1, 2, config.width)), jnp.zeros((1, 2), jnp.int32)
            return EncoderDecoder(config).init(jax.random.key(0), x, Stream(two, two, two, ids=two, decoder=place))[
                "params"
            ]
        return Decoder(config).init(jax.random.key(0), x, stream, method=_whole)["params"]

    return jax.eval_shape(init)


def _whole(module: Decoder, x: jax.Array, stream: Stream) -> Any:
    """Runs all parts of a model that have parameters."""
    hidden, _ = module(x, stream)
    assert hidden is not None
    return hidden if module.config.output_head == "none" else module.before_output(hidden)
