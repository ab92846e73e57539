"""The shape of a decoder, read from a Hugging Face config."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

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


ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
FAMILIES = ("gemma2", "gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3")


# Fields of config.json that sizes are made of, and the least and largest values that any decoder has. transformers and
# this library make lists as long as the model has layers, so that these are checked before either reads the rest.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 10_000)),
    **dict.fromkeys(("hidden_size", "n_embd"), (1, 1 << 20)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), (1, 1 << 16)),
    **dict.fromkeys(("head_dim", "query_pre_attn_scalar"), (1, 1 << 16)),
    **dict.fromkeys(("intermediate_size", "n_inner"), (1, 1 << 24)),
    "vocab_size": (1, 1 << 28),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "original_max_position_embeddings"), (1, 1 << 30)),
    **dict.fromkeys(("sliding_window", "max_window_layers"), (0, 1 << 30)),
    "no_rope_layer_interval": (1, 10_000),
}
# What transformers builds for classifiers (a name for each of `num_labels`), and code that it would ask to run.
_UNREAD = ("num_labels", "id2label", "label2id", "auto_map")


def hf_config(fields: Mapping[str, Any]) -> Any:
    """The transformers config object of a `config.json`, whose sizes are checked first.

    Raises:
      ConfigError: the architecture is not supported, or a size is not an integer in its range.
      Exception: whatever transformers raises for other fields that are wrong.
    """
    import transformers

    family = str(fields.get("model_type"))
    check_family(family)
    for name, (least, most) in _SIZES.items():
        value = fields.get(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise ConfigError(f"{name!r} is {value!r:.40}; it must be an integer from {least} to {most:,}")
    return transformers.CONFIG_MAPPING[family].from_dict({k: v for k, v in fields.items() if k not in _UNREAD})


def check_family(family: str | None) -> None:
    """Raises ConfigError for a `model_type` that this library has no decoder for."""
    if family not in FAMILIES:
        raise ConfigError(f"architecture {family!r:.60} is not supported; supported are {', '.join(FAMILIES)}")


def decoder_config(hf: Any, *, max_length: int | None = None) -> DecoderConfig:
    """Reads a transformers config object.

    Args:
      hf: what `transformers.AutoConfig.from_pretrained` returned.
      max_length: the longest sequence of the run; only `dynamic` RoPE depends on it (transformers itself changes its
        frequencies with the longest sequence seen so far, which a compiled program cannot).

    Raises:
      ConfigError: for an architecture or an option of one that this library does not have.
    """
    family = hf.model_type
    check_family(family)
    if getattr(hf, "quantization_config", None):
        raise ConfigError("quantized checkpoints are not supported; use the model's unquantized one")
    if family == "gpt2":
        return _gpt2(hf)
    return _gemma2(hf, max_length) if family == "gemma2" else _llama_like(hf, max_length)


def _activation(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gpt2(hf: Any) -> DecoderConfig:
    for option in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if getattr(hf, option, False):
            raise ConfigError(f"GPT-2 with {option} is not supported")
    if not getattr(hf, "scale_attn_weights", True):
        raise ConfigError("GPT-2 without scale_attn_weights is not supported")
    return DecoderConfig(
        family="gpt2",
        vocab_size=hf.vocab_size,
        width=hf.n_embd,
        layers=hf.n_layer,
        heads=hf.n_head,
        kv_heads=hf.n_head,
        head_size=hf.n_embd // hf.n_head,
        mlp_width=hf.n_inner or 4 * hf.n_embd,
        max_positions=hf.n_positions,
        norm="layer",
        norm_epsilon=float(hf.layer_norm_epsilon),
        activation=_activation(hf.activation_function),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=hf.tie_word_embeddings,
    )


def _llama_like(hf: Any, max_length: int | None) -> DecoderConfig:
    family = hf.model_type
    # Options are read where transformers' model of the family reads them: elsewhere the field is a leftover.
    bias = family in ("llama", "qwen3", "smollm3", "gemma2") and bool(hf.attention_bias)
    window = 0 if family == "llama" else hf.sliding_window or 0
    rope = _rope(hf, max_length)
    return DecoderConfig(
        family=family,
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_size=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        mlp_width=hf.intermediate_size,
        max_positions=max(hf.max_position_embeddings, rope.dynamic_length),
        norm_epsilon=float(hf.rms_norm_eps),
        activation=_activation(hf.hidden_activation if family == "gemma2" else hf.hidden_act),
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        mlp_bias=family in ("llama", "smollm3") and bool(hf.mlp_bias),
        qk_norm=family == "qwen3",
        tied=bool(hf.tie_word_embeddings),
        rope=rope,
        no_rope_layers=_no_rope_layers(hf),
        window=window,
        window_layers=_window_layers(hf, window),
    )


def _gemma2(hf: Any, max_length: int | None) -> DecoderConfig:
    if getattr(hf, "use_bidirectional_attention", None):
        raise ConfigError("Gemma 2 with use_bidirectional_attention is not supported")
    return dataclasses.replace(
        _llama_like(hf, max_length),
        norm="rms_around",
        embedding_scale=hf.hidden_size**0.5,
        score_scale=hf.query_pre_attn_scalar**-0.5,
        score_cap=hf.attn_logit_softcapping,
        logit_cap=hf.final_logit_softcapping,
    )


def _no_rope_layers(hf: Any) -> tuple[int, ...]:
    if hf.model_type != "smollm3":
        return ()
    return tuple(i for i in range(hf.num_hidden_layers) if not hf.no_rope_layers[i])  # 1 where a layer does rotate


def _window_layers(hf: Any, window: int) -> tuple[int, ...]:
    if not window:
        return ()
    if hf.model_type == "mistral":
        return tuple(range(hf.num_hidden_layers))
    unknown = set(hf.layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ConfigError(f"layer types {sorted(unknown)} are not supported")
    return tuple(i for i, kind in enumerate(hf.layer_types) if kind == "sliding_attention")


_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def _rope(hf: Any, max_length: int | None) -> RopeConfig:
    rope = dict(hf.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise ConfigError(f"RoPE scaling {kind!r} is not supported; supported: default, linear, dynamic, yarn, llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial rotary embeddings are not supported")
    for name in _ROPE_NEEDS.get(kind, ()):
        if rope.get(name) is None:
            raise ConfigError(f"rope_parameters: RoPE scaling {kind!r} needs {name!r}")
    original = hf.max_position_embeddings
    if kind in ("yarn", "llama3"):
        original = rope.get("original_max_position_embeddings") or original
    factor = float(rope.get("factor") or (hf.max_position_embeddings / original if kind == "yarn" else 1.0))
    return RopeConfig(
        kind=kind,
        theta=float(rope["rope_theta"]),
        factor=factor,
        original_max_positions=original,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_yarn_attention_factor(rope, factor) if kind == "yarn" else 1.0,
        dynamic_length=max(max_length or 0, original) if kind == "dynamic" else 0,
    )


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)
