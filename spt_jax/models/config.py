"""The shape of a decoder."""

import dataclasses
import math
from typing import Literal

import numpy as np

from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its context-extending scalings.

    `linear` divides positions by `factor`; `dynamic` raises `theta` for the run's static maximum length; `yarn` is
    Peng et al. 2023 (arXiv 2309.00071); `llama3` is the frequency-banded scaling of Llama 3.1.
    """

    kind: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    dynamic_length: int = 0

    def __post_init__(self) -> None:
        positive = ["theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"]
        for name in [*positive, "attention_factor"]:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"RoPE: {name} is {value}; it must be a finite number above 0")
        if self.kind == "yarn" and self.theta == 1:
            raise ConfigError("RoPE scaling 'yarn' needs a theta other than 1")
        if self.kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ConfigError("RoPE scaling 'llama3' needs a high_freq_factor above low_freq_factor")
        if self.kind in ("dynamic", "yarn", "llama3") and self.original_max_positions < 1:
            raise ConfigError(f"RoPE scaling {self.kind!r} needs a positive number of original positions")

    def inverse_frequencies(self, head_size: int) -> np.ndarray:
        """Angular step per position of each rotated pair, float32 [head_size / 2]."""
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / head_size
        theta = self.theta
        if self.kind == "dynamic":
            length = max(self.dynamic_length, self.original_max_positions)
            stretch = self.factor * length / self.original_max_positions - (self.factor - 1)
            theta = theta * stretch ** (head_size / (head_size - 2))
        plain = 1.0 / theta**exponents
        if self.kind == "linear":
            plain = plain / self.factor
        elif self.kind == "llama3":
            plain = self._llama3(plain)
        elif self.kind == "yarn":
            plain = self._yarn(plain, head_size)
        return plain.astype(np.float32)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        wavelength = 2 * math.pi / plain
        ratio = self.original_max_positions / wavelength
        blend = (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * plain / self.factor + blend * plain

    def _yarn(self, plain: np.ndarray, head_size: int) -> np.ndarray:
        def dimension_of(rotations: float) -> float:
            turns = self.original_max_positions / (rotations * 2 * math.pi)
            return head_size * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        ramp = (np.arange(head_size // 2, dtype=np.float32) - low) / (high - low or 0.001)
        interpolated = np.clip(ramp, 0.0, 1.0)
        return plain / self.factor * interpolated + plain * (1 - interpolated)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What defines a decoder's function. Sizes follow the letters of the array dimensions:

    V `vocab_size`, D `width`, L `layers`, N `heads`, K `kv_heads`, H `head_size`. Norms are "rms", "layer", or, as in
    Gemma 2, "rms_around": before and behind each half of a layer, with scales stored less 1.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    max_positions: int
    norm: Literal["rms", "layer", "rms_around"] = "rms"
    norm_epsilon: float = 1e-5
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    rope: RopeConfig | None = None
    no_rope_layers: tuple[int, ...] = ()
    window: int = 0
    window_layers: tuple[int, ...] = ()
    embedding_scale: float | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.window_layers and self.window < 1:
            raise ConfigError("layers with a sliding window need window >= 1")
        if any(not 0 <= layer < self.layers for layer in (*self.window_layers, *self.no_rope_layers)):
            raise ConfigError(f"the lists of layers name more than the {self.layers} layers of the model")
        if self.head_size < 1:
            raise ConfigError(f"a width of {self.width} cannot be shared by {self.heads} heads")
        if self.rope and (self.head_size % 2 or (self.rope.kind == "dynamic" and self.head_size < 4)):
            raise ConfigError(f"heads of size {self.head_size} cannot be rotated (RoPE {self.rope.kind!r})")
        for name in ("norm_epsilon", "embedding_scale", "score_scale", "score_cap", "logit_cap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} is {value}; it must be a finite number above 0")

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with, without the output matrix."""
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        mlp = self.width * self.mlp_width * (3 if self.gated_mlp else 2)
        return self.layers * (attention + mlp)
