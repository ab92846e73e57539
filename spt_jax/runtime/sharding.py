"""Device meshes and the sharding of arrays over them.

The axes are always ("data", "fsdp", "tensor", "sequence"), each of size 1 by default. Rows of a batch are split over
data and fsdp; frozen weights over fsdp and tensor by the regex rules below; the soft prompt and its optimizer state are
replicated.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from spt_jax.errors import ConfigError
from spt_jax.runtime.mesh_config import AXES, MeshConfig

ROWS = ("data", "fsdp")

# The first match wins. Paths look like "layers/attention/query/kernel"; stacked leaves have a leading L axis. Of two
# specs, the one with the smaller shard is used. The vocabulary is split over both axes: each device multiplies the
# hidden states of all rows by its part of the output matrix, which is never gathered. Kernels of experts have the axes
# L and E; "tensor" splits E, or the hidden width if it does not divide E.
RULES: tuple[tuple[str, tuple[P, ...]], ...] = (
    (r"embedding$", (P(("fsdp", "tensor")), P("tensor", "fsdp"))),
    (r"(positions|token_types|distances)$", (P(None, "fsdp"),)),
    (r"output$", (P(None, ("fsdp", "tensor")), P("fsdp", "tensor"))),
    (r"experts/(up|gate)/kernel$", (P(None, "tensor", "fsdp"), P(None, None, "fsdp", "tensor"))),
    (r"experts/down/kernel$", (P(None, "tensor", None, "fsdp"), P(None, None, "tensor", "fsdp"))),
    (r"experts/(up|gate)/bias$", (P(None, "tensor"), P(None, None, "tensor"))),
    (r"experts/down/bias$", (P(None, "tensor"),)),
    (r"(router/kernel|router/bias|correction|shared_gate/kernel)$", (P(),)),
    (r"(latent|rotated_key)/kernel$", (P(None, "fsdp"),)),
    (r"(latent|rotated_key)/bias$", (P(),)),
    (r"(query|key|value|up|gate|decay|beta|step)/kernel$", (P(None, "fsdp", "tensor"),)),
    (r"tap_\d+/kernel$", (P(None, "fsdp", "tensor"),)),
    (r"(query|key|value|up|gate|step)/bias$", (P(None, "tensor"),)),
    (r"((attention|delta_net|mamba)/output|down)/kernel$", (P(None, "tensor", "fsdp"),)),
    (r"_convolution$", (P(None, None, "tensor"),)),
    (r"(a_log|dt_bias|skip|_convolution_bias)$", (P(None, "tensor"),)),
    (r"(input_map|output_map|head_map)/kernel$", (P("fsdp"),)),
    (r"per_layer/projection/kernel$", (P("fsdp", "tensor"),)),
    (r"logit_bias$", (P(("fsdp", "tensor")),)),
    (
        r"(scale|norm/bias|own_row|relative_bias|sinks"
        r"|((attention|mamba)/output|down|input_map|head_map|convolution)/bias)$",
        (P(),),
    ),
)


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with Auto axes over the first devices.

    Args:
      config: number of devices along each axis; default 1 for all.
      devices: to choose from; default all.

    Returns:
      The mesh, with the axes of `MeshConfig`.

    Raises:
      ConfigError: there are too few devices, or the given axes do not divide them.
    """
    devices = jax.devices() if devices is None else devices
    shape = (config or MeshConfig()).shape(len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(shape)])


def parameter_sharding(mesh: Mesh | AbstractMesh, path: Sequence[str], shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of the frozen leaf at `path`. Axes that do not divide their dimension are left out.

    Raises:
      ValueError: no rule matches the leaf.
    """
    name = "/".join(path)
    specs = next((specs for pattern, specs in RULES if re.search(pattern, name)), None)
    if specs is None:
        raise ValueError(f"no sharding rule matches the leaf {name}; add one to RULES")
    shardings = [fitting(mesh, spec, shape) for spec in specs]
    return min(shardings, key=lambda sharding: math.prod(sharding.shard_shape(shape)))


def sharded_shapes(mesh: Mesh | AbstractMesh, shapes: Any, dtype: Any) -> Any:
    """Adds a dtype and shardings to a tree of shapes of frozen leaves, as `parameter_shapes` returns it."""

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = parameter_sharding(mesh, [key.key for key in path], leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


def fitting(mesh: Mesh | AbstractMesh, spec: P, shape: tuple[int, ...]) -> NamedSharding:
    """Returns a sharding by those axes of `spec` that divide their dimensions."""
    kept = []
    for axes, size in zip(spec, shape, strict=False):
        names = [] if axes is None else [axes] if isinstance(axes, str) else list(axes)
        while size % math.prod(mesh.shape[name] for name in names):
            names.pop()
        kept.append(tuple(names) or None)
    return NamedSharding(mesh, P(*kept))


def constrain(mesh: Mesh | None, x: Float[Array, "..."], *spec: Any) -> Float[Array, "..."]:
    """Constrains the sharding of x to those axes of `spec` that divide its dimensions.

    Without it, XLA may shard activations like weights. If `mesh` is None, x is returned as it is.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, P(*spec), x.shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with one copy on every device."""
    return NamedSharding(mesh, P())


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the first dimension, the rows, over data and fsdp."""
    return NamedSharding(mesh, P(ROWS))


def to_host(x: Array) -> np.ndarray:
    """Returns the full array on the host. In a run of several processes, all of them must call this."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def row_shards(mesh: Mesh) -> int:
    """Returns the number of shards that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(mesh: Mesh, sizes: Mapping[str, int]) -> None:
    """Raises ConfigError if the tensor axis does not divide the named sizes (heads, key/value heads, MLP width)."""
    tensor = mesh.shape["tensor"]
    for name, size in sizes.items():
        if size % tensor:
            near = max(n for n in range(1, tensor + 1) if all(s % n == 0 for s in sizes.values()))
            raise ConfigError(f"mesh.tensor={tensor} does not divide {size} {name}; {near} works")
