"""How a base is split over a mesh."""

from typing import Any

from jax.sharding import Mesh, NamedSharding

from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig, layer_configs
from spt_jax.models.model import Params
from spt_jax.runtime.sharding import check_divides, parameter_sharding


def check_mesh(mesh: Mesh, config: DecoderConfig) -> None:
    """Checks that the layers can be split over a mesh.

    Raises:
      ConfigError: they cannot.
    """
    if mesh.shape["sequence"] > 1 and not config.causal:
        raise ConfigError("mesh.sequence > 1 does not work with encoders, whose tokens see all others")
    for own in layer_configs(config):
        sizes = {"heads": own.heads, "key/value heads": own.kv_heads}
        if own.latent is not None:
            sizes = {"heads of latents": 1}
        if not own.attends:
            sizes = {}
        if own.mamba is not None:
            sizes |= {"recurrent heads": own.mamba.heads, "numbers of a recurrent key": own.mamba.key_width}
        if own.delta_net is not None:
            sizes |= {
                "recurrent key heads": own.delta_net.key_heads,
                "recurrent value heads": own.delta_net.value_heads,
            }
        if own.experts is None or own.experts_beside_mlp:
            sizes |= {"MLP columns": own.mlp_width}
        check_divides(mesh, sizes)
        if mesh.shape["sequence"] > 1 and (own.sinks or own.biased or own.recurrent is not None):
            raise ConfigError(
                "mesh.sequence > 1 does not work with ALiBi, sinks or recurrent layers: this base has some"
            )


def leaf_sharding(mesh: Mesh, shapes: Params, path: tuple[str, ...]) -> NamedSharding:
    """Returns the sharding of the parameter at a path, given the shapes of all parameters."""
    leaf: Any = shapes
    for key in path:
        leaf = leaf[key]
    return parameter_sharding(mesh, path, leaf.shape)
