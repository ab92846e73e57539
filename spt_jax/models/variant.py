"""Layers of a model that differ from the others."""

import dataclasses

from spt_jax.models.convolution_config import ConvolutionConfig
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.mamba_config import MambaConfig
from spt_jax.models.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Layers that differ from the others. A field that is None is that of the other layers.

    Attributes:
      name: of the group of their keys and values, if these have other sizes than the other layers'.
      layers: indices of the layers. A layer may be in several variants.
      attention_norm, value_is_key, kv_source, convolution, experts, delta_net, mamba: see `DecoderConfig`.
    """

    name: str
    layers: tuple[int, ...]
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None
    mlp_width: int | None = None
    rope: RopeConfig | None = None
    attention_norm: bool | None = None
    value_is_key: bool | None = None
    kv_source: int | None = None
    convolution: ConvolutionConfig | None = None
    experts: ExpertsConfig | None = None
    delta_net: DeltaNetConfig | None = None
    mamba: MambaConfig | None = None

    def changes(self) -> dict[str, object]:
        """Returns the fields of `DecoderConfig` that differ."""
        fields = (field.name for field in dataclasses.fields(self) if field.name not in ("name", "layers"))
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
