"""Device meshes and where arrays lie on them.

Axes are always ("data", "fsdp", "tensor", "sequence"), each 1 unless asked. Rows of a batch are split over data and
fsdp; frozen weights over fsdp and tensor by the regex rules below; the prompt and its optimizer state are everywhere.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from spt_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")

# First match wins; paths as in "layers/attention/query/kernel", stacked leaves have L in front. Of two ways, the one
# that leaves less on a device. A vocabulary is split over both axes: a device then multiplies the outputs of all rows
# with its part of the output matrix, which is never gathered.
RULES: tuple[tuple[str, tuple[P, ...]], ...] = (
    (r"embedding$", (P(("fsdp", "tensor")), P("tensor", "fsdp"))),
    (r"positions$", (P(None, "fsdp"),)),
    (r"output$", (P(None, ("fsdp", "tensor")), P("fsdp", "tensor"))),
    (r"(query|key|value|up|gate)/kernel$", (P(None, "fsdp", "tensor"),)),
    (r"(query|key|value|up|gate)/bias$", (P(None, "tensor"),)),
    (r"(attention/output|down)/kernel$", (P(None, "tensor", "fsdp"),)),
    (r"(norm/scale|norm/bias|(attention/output|down)/bias)$", (P(),)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has; their product is the number of devices used.

    Attributes:
      data: devices that split the rows of a batch, and hold all weights each.
      fsdp: devices that split rows and weights; a layer's weights come together for as long as it runs.
      tensor: devices that split heads, MLP columns and the vocabulary.
      sequence: devices that split every row, whose keys and values go round.

    One of them may be -1: as many devices as the others leave.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ConfigError(
                    f"mesh.{name} is {getattr(self, name)}; an axis has at least 1 device, or -1 for the rest"
                )
        rest = [name for name in AXES if getattr(self, name) == -1]
        if len(rest) > 1:
            raise ConfigError(f"mesh.{' and mesh.'.join(rest)} are -1; only one axis can take the rest of the devices")

    def shape(self, devices: int) -> tuple[int, ...]:
        """Devices along each axis, of so many in all.

        Raises:
          ConfigError: they are too few, or the rest cannot be shared out.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        needed = math.prod(size for size in sizes.values() if size != -1)
        if needed > devices:
            raise ConfigError(f"the mesh {sizes} needs {needed} devices; there are {devices}")
        if -1 in sizes.values() and devices % needed:
            near = max(n for n in range(1, needed) if devices % n == 0)
            raise ConfigError(
                f"the axes of the mesh {sizes} that are given have {needed} devices, which does not divide the"
                f" {devices} that there are; {near} works"
            )
        return tuple(devices // needed if size == -1 else size for size in sizes.values())


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with Auto axes over the first devices.

    Raises:
      ConfigError: more devices asked for than there are, or a rest that cannot be shared out.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config or MeshConfig()).shape(len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)])


def parameter_sharding(mesh: Mesh, path: Sequence[str], shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of the frozen leaf at `path`; an axis that does not divide its dimension is left out.

    Raises:
      ValueError: no rule names the leaf.
    """
    name = "/".join(path)
    specs = next((specs for pattern, specs in RULES if re.search(pattern, name)), None)
    if specs is None:
        raise ValueError(f"no sharding rule names the leaf {name}; RULES needs one")
    ways = [fitting(mesh, spec, shape) for spec in specs]
    return min(ways, key=lambda way: math.prod(way.shard_shape(shape)))


def sharded_shapes(mesh: Mesh, shapes: Any, dtype: Any) -> Any:
    """A tree of frozen leaves' shapes, such as `parameter_shapes` gives, in a precision and where they lie."""

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = parameter_sharding(mesh, [key.key for key in path], leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def fitting(mesh: Mesh, spec: P, shape: tuple[int, ...]) -> NamedSharding:
    """A sharding by the axes of `spec` that divide the dimensions they stand for."""
    kept = []
    for axes, size in zip(spec, shape, strict=False):
        names = [] if axes is None else [axes] if isinstance(axes, str) else list(axes)
        while size % math.prod(mesh.shape[name] for name in names):
            names.pop()
        kept.append(tuple(names) or None)
    return NamedSharding(mesh, P(*kept))


def constrain(mesh: Mesh | None, x: Float[Array, "..."], *spec: Any) -> Float[Array, "..."]:
    """x, laid out by the axes of `spec` that divide its dimensions; XLA, left alone, may split activations as weights.

    mesh: None for code that knows none.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, P(*spec), x.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """One copy on every device."""
    return NamedSharding(mesh, P())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension, rows, over data and fsdp."""
    return NamedSharding(mesh, P(ROWS))


def to_host(x: Array) -> np.ndarray:
    """A whole array, in every process of a run; all of them must ask."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError if the tensor axis does not divide the named sizes (heads, key/value heads, MLP width)."""
    tensor = mesh.shape["tensor"]
    for name, size in sizes.items():
        if size % tensor:
            near = max(n for n in range(1, tensor + 1) if all(s % n == 0 for s in sizes.values()))
            raise ConfigError(f"mesh.tensor={tensor} does not divide {size} {name}; {near} works")
