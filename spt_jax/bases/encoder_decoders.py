"""What differs for encoder-decoders when a base is loaded."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from spt_jax.bases.families import ENCODER_DECODERS
from spt_jax.bases.families.family import OUTPUT_KEY
from spt_jax.bases.files import CONFIG_BYTES, checkpoint_files, read_json
from spt_jax.bases.quantized_files import FileQuantization
from spt_jax.bases.tensors import opener_of
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.kernels import KernelChoice
from spt_jax.runtime.sharding import check_divides


def completed(
    config: EncoderDecoderConfig, directory: Path, quantization: FileQuantization | None
) -> EncoderDecoderConfig:
    """Returns the config with what other files than `config.json` tell.

    Those are the names of the stored tensors, and the token that every answer begins with (`forced_bos_token_id`).

    Args:
      config: the config, from `config.json`.
      directory: holds the files.
      quantization: how they are quantized.

    Raises:
      CheckpointError: there are no such files, or they are damaged.
      ConfigError: the model has a part that is not supported, or no such token.
    """
    files, names = checkpoint_files(directory), set()
    with opener_of(files, quantization) as opener:
        for file in files:
            with opener(file, [OUTPUT_KEY]) as tensors:
                names |= set(tensors.names())
    config = ENCODER_DECODERS[config.family].stored(config, names)
    return dataclasses.replace(config, forced_id=_forced_id(directory))


def _forced_id(directory: Path) -> int | None:
    """Returns `forced_bos_token_id` of generation_config.json, or else of config.json; None if neither has one."""
    for file in (directory / name for name in ("generation_config.json", "config.json")):
        id_ = read_json(file, CONFIG_BYTES).get("forced_bos_token_id") if file.is_file() else None
        if id_ is not None and type(id_) is not int:
            raise CheckpointError(f"{file}: forced_bos_token_id is {id_!r:.40}; it must be an integer")
        if id_ is not None:
            return id_
    return None


def check_options(config: EncoderDecoderConfig, mesh: Mesh, attention: KernelChoice, quantize: str | None) -> None:
    """Checks what an encoder-decoder supports of the options of `load_base`.

    Args:
      config: its config.
      mesh: the mesh of the weights.
      attention: the attention kernel.
      quantize: how the matrices are stored.

    Raises:
      ConfigError: an option that it does not support.
    """
    if attention not in ("auto", "xla"):
        raise ConfigError(f"attention {attention!r} is for decoders; use xla for {config.family}, an encoder-decoder")
    if quantize == "keep":
        raise ConfigError("base.quantize keep does not support encoder-decoders; set another, such as int8")
    if mesh.shape["sequence"] > 1:
        raise ConfigError("mesh.sequence > 1 does not work with encoder-decoders; use the axes data, fsdp and tensor")
    check_divides(
        mesh, {"heads": config.heads, "key/value heads": config.layer.kv_heads, "MLP columns": config.mlp_width}
    )
