"""What families with experts in place of the MLP share."""

from collections.abc import Iterable
from typing import Any, ClassVar

from spt_jax.bases.families.family import Origin, activation, projections
from spt_jax.bases.families.llama import LlamaLike
from spt_jax.errors import ConfigError
from spt_jax.models.config import DecoderConfig
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.variant import Variant


class WithExperts(LlamaLike):
    """Base class of families whose layers, or some of them, are Llama's with experts in place of the MLP.

    Attributes:
      router: name of the router's module in a layer.
      experts: what the names of the experts' modules start with, before the number of the expert.
      projections: names of the modules of an expert, in the order gate, up, down.
      shared: name of the shared MLP, whose modules are named as those of Llama's MLP.
      shared_gate: name of the module of its gate.
    """

    router: ClassVar[str] = "mlp.gate"
    experts: ClassVar[str] = "mlp.experts."
    projections: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    shared: ClassVar[str] = "mlp.shared_expert"
    shared_gate: ClassVar[str] = "mlp.shared_expert_gate"

    def layer_origins(self, config: DecoderConfig) -> dict[str, Origin]:
        table = super().layer_origins(config)
        if config.experts is None:
            return table
        kept = {path: origin for path, origin in table.items() if not path.startswith("mlp/")}
        return kept | self.experts_origins(config.experts, "model.layers.{i}.")

    def experts_origins(self, experts: ExpertsConfig, layer: str) -> dict[str, Origin]:
        """Returns where the parameters of the experts of a layer are stored, one tensor per expert and projection."""
        ours = ("gate", "up", "down")
        modules = [("mlp/router", self.router, experts.router_bias)]
        if experts.shared_width:
            modules += [(f"mlp/shared/{name}", f"{self.shared}.{name}_proj", False) for name in ours]
        if experts.shared_gate:
            modules.append(("mlp/shared_gate", self.shared_gate, False))
        table = projections(modules, layer)
        for name, theirs in zip(ours, self.projections, strict=True):
            key = f"{layer}{self.experts}{{e}}.{theirs}.weight"
            table[f"mlp/experts/{name}/kernel"] = Origin(key, transpose=True, experts=experts.experts)
        if experts.correction:
            table["mlp/correction"] = Origin(f"{layer}{self.router}.e_score_correction_bias")
        return table


def experts_in(layers: Iterable[int], count: int, experts: ExpertsConfig | None) -> dict[str, Any]:
    """Returns the fields of a decoder with `count` layers, of which `layers` have experts in place of the MLP."""
    sparse = tuple(layers)
    if experts is None or not sparse:
        return {}
    if len(sparse) == count:
        return {"experts": experts}
    return {"variants": (Variant(name="sparse", layers=sparse, experts=experts),)}


def check_swiglu(hf: Any) -> None:
    """Checks that the experts have the activation function that the decoder has for them.

    Raises:
      ConfigError: `hidden_act` is another one.
    """
    if activation(hf.hidden_act) != "silu":
        raise ConfigError(f"hidden_act {hf.hidden_act!r} is not supported for {hf.model_type}; experts have 'silu'")
