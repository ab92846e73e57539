"""Rotary position embeddings."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spt_jax.errors import ConfigError

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its context-extending scalings.

    Attributes:
      kind: `linear` divides positions by `factor`; `dynamic` raises `theta` for the run's static maximum length; `yarn`
        is Peng et al. 2023 (arXiv 2309.00071); `llama3` is the frequency-banded scaling of Llama 3.1; `longrope`
        divides each frequency by its own factor (Ding et al. 2024, arXiv 2402.13753); `proportional` rotates the first
        part of the pairs by the frequencies of the whole head, and the others not at all (Gemma 4).
      dynamic_length: the longest sequence of the run, for `dynamic` and `longrope`.
      fraction: the part of a head, from its start, that is rotated.
      interleaved: whether the pairs are (x[2i], x[2i + 1]) instead of (x[i], x[i + R / 2]).
      short_factors: for `longrope`, up to the original length; one factor per pair.
      long_factors: for `longrope`, if `dynamic_length` is beyond the original length.
      query_beta: queries are multiplied by 1 + query_beta log(1 + floor(position / original_max_positions)).
    """

    kind: RopeKind = "default"
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
    fraction: float = 1.0
    interleaved: bool = False
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_beta: float = 0.0

    def __post_init__(self) -> None:
        positive = ["theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"]
        for name in [*positive, "attention_factor"]:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"RoPE: {name} is {value}; it must be a finite number above 0")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"RoPE: the rotated fraction of a head is {self.fraction}; it must be in (0, 1]")
        if self.kind == "yarn" and self.theta == 1:
            raise ConfigError("RoPE scaling 'yarn' needs a theta other than 1")
        if self.kind == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ConfigError("RoPE scaling 'llama3' needs a high_freq_factor above low_freq_factor")
        needs_original = self.kind in ("dynamic", "yarn", "llama3", "longrope") or self.query_beta
        if needs_original and self.original_max_positions < 1:
            raise ConfigError(f"RoPE scaling {self.kind!r} needs a positive number of original positions")
        if not math.isfinite(self.query_beta) or any(not (math.isfinite(f) and f > 0) for f in self._all_factors):
            raise ConfigError("RoPE: the factors must be finite numbers above 0")

    @property
    def _all_factors(self) -> tuple[float, ...]:
        return (*self.short_factors, *self.long_factors)

    def check(self, head_size: int) -> None:
        """Raises ConfigError if heads of this size cannot be rotated."""
        size = self.rotated_size(head_size)
        if size % 2 or size < (4 if self.kind == "dynamic" else 2):
            raise ConfigError(f"heads of size {head_size} cannot be rotated (RoPE {self.kind!r}, {size} numbers)")
        if self.kind == "longrope" and {len(self.short_factors), len(self.long_factors)} != {size // 2}:
            raise ConfigError(
                f"RoPE scaling 'longrope' has {len(self.short_factors)} short and {len(self.long_factors)} long"
                f" factors; {size // 2} pairs of a head are rotated"
            )

    def rotated_size(self, head_size: int) -> int:
        """Returns how many numbers R of a head take part in the rotation."""
        return head_size if self.kind == "proportional" else int(head_size * self.fraction)

    def inverse_frequencies(self, head_size: int) -> np.ndarray:
        """Returns the angular step per position of each rotated pair, float32 [R / 2]."""
        size = self.rotated_size(head_size)
        exponents = np.arange(0, size, 2, dtype=np.float32) / size
        theta = self.theta
        if self.kind == "dynamic":
            length = max(self.dynamic_length, self.original_max_positions)
            stretch = self.factor * length / self.original_max_positions - (self.factor - 1)
            theta = theta * stretch ** (size / (size - 2))
        plain = 1.0 / theta**exponents
        if self.kind == "linear":
            plain = plain / self.factor
        elif self.kind == "llama3":
            plain = self._llama3(plain)
        elif self.kind == "yarn":
            plain = self._yarn(plain, size)
        elif self.kind == "longrope":
            beyond = self.dynamic_length > self.original_max_positions
            plain = plain / np.asarray(self.long_factors if beyond else self.short_factors, np.float32)
        elif self.kind == "proportional":
            rotated = np.arange(size // 2) < int(self.fraction * head_size // 2)
            plain = np.where(rotated, plain / self.factor, 0.0)
        return plain.astype(np.float32)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        wavelength = 2 * math.pi / plain
        ratio = self.original_max_positions / wavelength
        blend = (ratio - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * plain / self.factor + blend * plain

    def _yarn(self, plain: np.ndarray, size: int) -> np.ndarray:
        def dimension_of(rotations: float) -> float:
            turns = self.original_max_positions / (rotations * 2 * math.pi)
            return size * math.log(turns) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = (np.arange(size // 2, dtype=np.float32) - low) / (high - low or 0.001)
        interpolated = np.clip(ramp, 0.0, 1.0)
        return plain / self.factor * interpolated + plain * (1 - interpolated)


def rotation(rope: RopeConfig, head_size: int, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Returns cosines and sines of the angles, float32 [B, T, R / 2]."""
    frequencies = jnp.asarray(rope.inverse_frequencies(head_size))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "B T N H"], cos_sin: tuple[Array, Array], *, interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Rotates the pairs of the first R numbers of each head by their angles, in float32.

    The pairs are (x[i], x[i + R / 2]), or, if interleaved, (x[2i], x[2i + 1]), as in Hugging Face checkpoints.
    """
    cos, sin = (part[:, :, None] for part in cos_sin)
    size = 2 * cos.shape[-1]
    turned = x.astype(jnp.float32) if size == x.shape[-1] else x[..., :size].astype(jnp.float32)
    if interleaved:
        pairs = turned.reshape(*turned.shape[:-1], size // 2, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(turned.shape)
    else:
        first, second = jnp.split(turned, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if size == x.shape[-1] else jnp.concatenate([rotated, x[..., size:]], axis=-1)


def query_scale(rope: RopeConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T 1 1"] | None:
    """Returns the factor of the queries at each position; None if it is 1 everywhere (Ministral 3, Llama 4)."""
    if not rope.query_beta:
        return None
    turns = jnp.floor(positions.astype(jnp.float32) / rope.original_max_positions)
    return (1 + rope.query_beta * jnp.log1p(turns))[:, :, None, None]
