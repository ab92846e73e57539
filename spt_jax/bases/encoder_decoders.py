"""What differs for encoder-decoders when a base is loaded."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from spt_jax.bases.families.family import OUTPUT_KEY
from spt_jax.bases.files import checkpoint_files
from spt_jax.bases.quantized_files import FileQuantization
from spt_jax.bases.tensors import opener_of
from spt_jax.errors import ConfigError
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.kernels import KernelChoice
from spt_jax.runtime.sharding import check_divides


def with_stored_head(
    config: EncoderDecoderConfig, directory: Path, quantization: FileQuantization | None
) -> EncoderDecoderConfig:
    """Returns the config with `tied` as the files say.

    `tie_word_embeddings` does not tell: transformers sets it for all T5 models, and original files have it false where
    they mean that hidden states are not scaled. A model has an output matrix of its own if its files hold one.

    Args:
      config: the config, from `config.json`.
      directory: holds the files.
      quantization: how they are quantized.

    Raises:
      CheckpointError: there are no such files, or they are damaged.
    """
    files = checkpoint_files(directory)
    with opener_of(files, quantization) as opener:
        for file in files:
            with opener(file, [OUTPUT_KEY]) as tensors:
                if OUTPUT_KEY in tensors.names():
                    return dataclasses.replace(config, tied=False)
    return dataclasses.replace(config, tied=True)


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
        raise ConfigError(
            f"attention {attention!r} does not compute relative position biases; use xla for {config.family}"
        )
    if quantize == "keep":
        raise ConfigError("quantize keep is for GGUF files, which encoder-decoders are not read from")
    if mesh.shape["sequence"] > 1:
        raise ConfigError("mesh.sequence > 1 does not work with encoder-decoders; use the axes data, fsdp and tensor")
    check_divides(mesh, {"heads": config.heads, "MLP columns": config.mlp_width})
