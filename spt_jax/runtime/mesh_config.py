"""The sizes of a device mesh, as options. No device is needed to read them."""

import dataclasses
import math

from spt_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis; their product is the number of devices used.

    One of them may be -1: all remaining devices.

    Attributes:
      data: devices that split the rows of a batch; each holds all weights.
      fsdp: devices that split rows and weights; the weights of a layer are gathered while it runs.
      tensor: devices that split heads, MLP columns and the vocabulary.
      sequence: devices that split the tokens of every row (ring attention).
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise ConfigError(
                    f"mesh.{name} is {getattr(self, name)}; an axis has at least 1 device, or -1 for all remaining"
                )
        rest = [name for name in AXES if getattr(self, name) == -1]
        if len(rest) > 1:
            raise ConfigError(f"mesh.{' and mesh.'.join(rest)} are -1; only one axis can take the remaining devices")

    def shape(self, devices: int) -> tuple[int, ...]:
        """Returns the number of devices along each axis, given the number of available devices.

        Args:
          devices: the number of available devices.

        Raises:
          ConfigError: there are too few devices, or the given axes do not divide them.
        """
        sizes = {name: getattr(self, name) for name in AXES}
        needed = math.prod(size for size in sizes.values() if size != -1)
        if needed > devices:
            raise ConfigError(f"the mesh {sizes} needs {needed} devices; there are {devices}")
        if -1 in sizes.values() and devices % needed:
            near = max(n for n in range(1, needed) if devices % n == 0)
            raise ConfigError(
                f"the given axes of the mesh {sizes} have {needed} devices, which does not divide the {devices}"
                f" available; {near} works"
            )
        return tuple(devices // needed if size == -1 else size for size in sizes.values())
