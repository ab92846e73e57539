"""Parameters to Hugging Face checkpoints: the inverse of `spt_jax.bases.checkpoint`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from flax import traverse_util

from spt_jax.bases.places import places, stored_shape
from spt_jax.models.model import Params
from spt_jax.models.model_config import ModelConfig


def write_checkpoint(directory: Path, config: ModelConfig, params: Params, dtype: Any, *, shards: int = 1) -> None:
    """Writes a checkpoint with Hugging Face's names and layouts: the inverse of `read_params`.

    One file is `model.safetensors`; several, with equal numbers of tensors, come with `model.safetensors.index.json`.
    Each file is written under a temporary name first.
    """
    leaves = dict(traverse_util.flatten_dict(params))
    tensors = {}
    for key, fills in places(config).items():
        tensor = np.zeros(stored_shape(fills, leaves), dtype)
        for place in fills:
            target = place.origin.taken(tensor)
            target[...] = place.stored(np.asarray(leaves[place.path])).reshape(target.shape)
        tensors[key] = tensor
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        _save(tensors, directory / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        _save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    temporary = directory / "model.safetensors.index.json.tmp"
    temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, directory / "model.safetensors.index.json")


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    temporary = file.with_name(file.name + ".tmp")
    try:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
