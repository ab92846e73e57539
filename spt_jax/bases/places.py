"""Where the parameters of a model are stored in a checkpoint, by the table of its family."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from spt_jax.bases.families import ENCODER_DECODERS, FAMILIES, Origin
from spt_jax.bases.families.family import SeveralTables
from spt_jax.models.encoder_decoder_config import EncoderDecoderConfig
from spt_jax.models.model_config import ModelConfig

LeafPath = tuple[str, ...]


@runtime_checkable
class Indexed(Protocol):
    """A leaf, or host memory for one."""

    def __getitem__(self, index: tuple[int, ...], /) -> np.ndarray:
        """Returns a view of the part at an index of the leading axes."""
        ...


def origins(config: ModelConfig) -> dict[LeafPath, tuple[Origin, ...]]:
    """Returns the table of a model's family: every leaf of its parameters and its origins."""
    if isinstance(config, EncoderDecoderConfig):
        return _by_path(ENCODER_DECODERS[config.family].origins(config))
    return _by_path(FAMILIES[config.family].origins(config))


def _by_path(table: Mapping[str, Origin | tuple[Origin, ...]]) -> dict[LeafPath, tuple[Origin, ...]]:
    return {tuple(path.split("/")): (found,) if isinstance(found, Origin) else found for path, found in table.items()}


@dataclasses.dataclass(frozen=True)
class Place:
    """What a stored tensor or a part of one fills.

    Attributes:
      path: the leaf.
      origin: the rule.
      index: the place along the leaf's leading axes: of the layer, and of the expert, if the origin has them.
    """

    path: LeafPath
    origin: Origin
    index: tuple[int, ...]

    def stored(self, leaf: Indexed) -> np.ndarray:
        """Returns a view of the part of the leaf that the tensor fills, with its axes in their stored order."""
        return self.origin.filled(leaf[self.index])


def places(config: ModelConfig) -> dict[str, list[Place]]:
    """Returns what each key of a checkpoint fills."""
    return _places(config, origins(config))


def _places(config: ModelConfig, leaves: Mapping[LeafPath, tuple[Origin, ...]]) -> dict[str, list[Place]]:
    table: dict[str, list[Place]] = {}
    for path, leaf_origins in leaves.items():
        for origin in leaf_origins:
            by_layer = "{i}" in origin.key or origin.layers is not None
            layers = enumerate(origin.layers or range(config.layers)) if by_layer else [(None, None)]
            experts = range(origin.experts) if "{e}" in origin.key else [None]
            for (at, layer), expert in itertools.product(layers, experts):
                index = tuple(i for i in (at, expert) if i is not None)
                table.setdefault(origin.key.format(i=layer, e=expert), []).append(Place(path, origin, index))
    return table


def all_places(config: ModelConfig) -> list[dict[str, list[Place]]]:
    """Returns `places`, and the same for the other tables of families that have several."""
    if isinstance(config, EncoderDecoderConfig):
        return [places(config)]
    family = FAMILIES[config.family]
    others = family.alternatives(config) if isinstance(family, SeveralTables) else ()
    return [places(config), *(_places(config, _by_path(other)) for other in others)]


def stored_shape(fills: list[Place], shapes: Mapping[LeafPath, Any]) -> tuple[int, ...]:
    """Returns the shape of a stored tensor.

    Args:
      fills: all places that it fills.
      shapes: leaves, or their shapes, by path.
    """
    first = fills[0]
    if first.origin.shape is not None:
        return first.origin.shape
    shape = list(first.stored(np.broadcast_to(np.float32(0), shapes[first.path].shape)).shape)
    for place in fills:
        if place.origin.take is not None:
            shape[place.origin.take.axis] = max(p.origin.take.stop for p in fills if p.origin.take is not None)
    return tuple(shape)
