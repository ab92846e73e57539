"""The shape of a decoder, or of an encoder, whose tokens see all others."""

import collections
import dataclasses
import functools
import itertools
import math
from typing import Literal

from spt_jax.errors import ConfigError
from spt_jax.models.convolution_config import ConvolutionConfig
from spt_jax.models.delta_net_config import DeltaNetConfig
from spt_jax.models.disentangled_config import DisentangledConfig
from spt_jax.models.experts_config import ExpertsConfig
from spt_jax.models.latent_config import LatentConfig
from spt_jax.models.layout import RECURRENT, SELF, Group, StateGroup
from spt_jax.models.mamba_config import MambaConfig
from spt_jax.models.per_layer_config import PerLayerConfig
from spt_jax.models.repetition import longest_repetition
from spt_jax.models.rope import RopeConfig
from spt_jax.models.variant import Variant


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What defines the function of a decoder or an encoder. Sizes follow the letters of the array dimensions:

    V `vocab_size`, D `width`, L `layers`, N `heads`, K `kv_heads`, H `head_size`.

    Attributes:
      causal: whether a token sees only itself and earlier tokens. Otherwise the model is an encoder.
      pooling: the hidden state that a class head reads: that of the last token, that of the first, which the tokenizer
        adds, or the mean of those of all real tokens.
      output_head: what follows the last layer in a language model: the output matrix ("matrix"), a linear map, the
        activation function and a norm before that matrix ("masked", as in BERT), or nothing ("none").
      token_types: number of embeddings of token types, the first of which is added to all inputs; 0 for none.
      norm: RMSNorm (Zhang & Sennrich 2019) or LayerNorm.
      norm_offset: added to the stored scales of norms.
      norm_scale: whether norms have a scale.
      norm_bias: whether LayerNorms have a bias.
      norm_place: where a layer normalizes: the input of attention and MLP ("before"), their output before the
        residual addition ("after"), both ("around"), or the sum after the residual addition ("sum").
      attention_norm: whether attention reads a normalized input, where `norm_place` says so.
      final_norm: whether the output of the last layer is normalized.
      embedding_norm: whether inputs, virtual tokens among them, are normalized before the first layer.
      parallel: whether attention and MLP read the same input, and their outputs are added together.
      shared_norm: with `parallel`, whether both read the output of one norm.
      qk_norm: normalizes queries and keys: each head, with one scale [H] for all ("head") or one for each ("heads"),
        or the whole projection ("whole").
      qk_norm_after_rope: whether that is after RoPE.
      value_norm: whether values are normalized, without a scale.
      value_is_key: whether values are the keys before their norm and RoPE.
      kv_source: the earlier layer whose keys and values a layer reads; None if it has its own.
      clip_qkv: queries, keys and values are clipped to [-clip_qkv, clip_qkv], after the norm of the whole projection.
      attention_gate: whether the output of attention is multiplied by the sigmoid of a linear map of its input.
      sinks: whether each head has a learned score in the denominator of the softmax.
      mlp_bias, qkv_bias, output_bias, logit_bias: whether these linear maps have a bias.
      rope: rotary embedding; None for none.
      local_rope: that of layers with a sliding window, if it differs.
      no_rope_layers: layers without RoPE.
      positions: how a model without RoPE knows positions: a learned table that is added to the inputs, ALiBi (Press et
        al. 2022, arXiv 2108.12409), or not at all.
      disentangled: terms of attention scores between tokens and embeddings of distances, in an encoder.
      convolution: whose result, of a layer's input, is added to its output before another norm, in an encoder.
      alibi_scale: factor of the ALiBi bias.
      alibi_rounded: whether slopes, positions and their products are rounded to bfloat16, whatever the precision of the
        model (Falcon).
      window: the sliding window's width in tokens, with the token itself, for `window_layers`; in an encoder, on both
        sides of a token.
      embedding_width: width of the embedding table, if maps to and from `width` follow; None if it is `width`. With
        `embedding_norm`, positions and token types are added, and the sum is normalized, before the first map.
      input_map_bias: whether the map from the width of the embedding table has a bias.
      embedding_scale: factor of the rows of the embedding table, not of virtual tokens.
      input_scale: factor of all inputs, virtual tokens among them.
      residual_scale: factor of the outputs of attention and MLP.
      attention_input_scale, attention_output_scale: factors of the input of the queries, keys and values, and of the
        output of attention.
      key_scale: factor of keys, those that are remembered among them.
      mlp_gate_scale, mlp_output_scale: factors of the MLP's gate before its activation function, and of its output.
      layer_scale: whether each layer's output is multiplied by a stored number.
      score_scale: factor of attention scores; None for H^-0.5.
      score_cap, logit_cap: soft caps of attention scores and logits.
      logit_scale: factor of the logits.
      experts: mixture of experts in place of the MLP.
      experts_beside_mlp: whether the experts are beside the MLP, and not in its place: their outputs are added, each
        after a norm of its own, and the experts' input has another norm.
      delta_net: recurrent layer in place of attention.
      mamba: recurrent layer in place of attention, or beside it.
      latent: attention whose heads share one latent per token; `head_size` is the size of its rotated part.
      per_layer: embeddings of the tokens for each layer, beside those of the first layer's input.
      variants: layers of other kinds.
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
    causal: bool = True
    pooling: Literal["last", "first", "mean"] = "last"
    output_head: Literal["matrix", "masked", "none"] = "matrix"
    token_types: int = 0
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    norm_scale: bool = True
    norm_bias: bool = True
    norm_place: Literal["before", "after", "around", "sum"] = "before"
    attention_norm: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    parallel: bool = False
    shared_norm: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    logit_bias: bool = False
    qk_norm: Literal["none", "head", "heads", "whole"] = "none"
    qk_norm_after_rope: bool = False
    value_norm: bool = False
    value_is_key: bool = False
    kv_source: int | None = None
    clip_qkv: float | None = None
    attention_gate: bool = False
    sinks: bool = False
    tied: bool = False
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    no_rope_layers: tuple[int, ...] = ()
    positions: Literal["learned", "alibi", "none"] = "learned"
    disentangled: DisentangledConfig | None = None
    convolution: ConvolutionConfig | None = None
    alibi_scale: float = 1.0
    alibi_rounded: bool = False
    window: int = 0
    window_layers: tuple[int, ...] = ()
    embedding_width: int | None = None
    input_map_bias: bool = False
    embedding_scale: float | None = None
    input_scale: float | None = None
    residual_scale: float | None = None
    attention_input_scale: float | None = None
    attention_output_scale: float | None = None
    key_scale: float | None = None
    mlp_gate_scale: float | None = None
    mlp_output_scale: float | None = None
    layer_scale: bool = False
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    logit_scale: float | None = None
    experts: ExpertsConfig | None = None
    experts_beside_mlp: bool = False
    delta_net: DeltaNetConfig | None = None
    mamba: MambaConfig | None = None
    latent: LatentConfig | None = None
    per_layer: PerLayerConfig | None = None
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        if self.head_size < 1:
            raise ConfigError(f"a width of {self.width} cannot be shared by {self.heads} heads")
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.window_layers and self.window < 1:
            raise ConfigError("layers with a sliding window need window >= 1")
        listed = [*self.window_layers, *self.no_rope_layers, *(i for one in self.variants for i in one.layers)]
        if any(not 0 <= layer < self.layers for layer in listed):
            raise ConfigError(f"the lists of layers name more than the {self.layers} layers of the model")
        for name, found in collections.Counter(one.name for one in self.variants).items():
            if found > 1 or name in (SELF, RECURRENT):
                raise ConfigError(
                    f"variants need names of their own, other than {SELF!r} and {RECURRENT!r}; {name!r} is taken"
                )
        for one in self.variants:
            if len(set(one.layers)) < len(one.layers):
                raise ConfigError(f"the variant {one.name!r} names a layer twice")
        if self.local_rope and not self.rope:
            raise ConfigError("a RoPE of the layers with a sliding window needs one of the other layers")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope.check(self.head_size)
        if self.latent is not None and (self.rope is None or self.latent.rotated_size != self.head_size):
            raise ConfigError("latent attention needs a RoPE, and head_size must be the size of the rotated part")
        if self.disentangled is not None and (self.causal or self.kv_heads != self.heads):
            raise ConfigError("disentangled attention needs an encoder with as many key/value heads as query heads")
        if self.delta_net is not None and self.mamba is not None:
            raise ConfigError("a layer cannot have both Gated DeltaNet and Mamba-2")
        if self.latent is not None and any((self.attention_input_scale, self.attention_output_scale, self.key_scale)):
            raise ConfigError("latent attention has no scales of its input, keys and output")
        if self.experts is not None and any((self.mlp_gate_scale, self.mlp_output_scale)):
            raise ConfigError("experts have no scales of their gates and outputs")
        finite = [name for name in _POSITIVE if (value := getattr(self, name)) is not None and not 0 < value < math.inf]
        if finite:
            raise ConfigError(f"{finite[0]} is {getattr(self, finite[0])}; it must be a finite number above 0")
        if self.experts_beside_mlp and (self.parallel or self.norm_place != "around"):
            raise ConfigError("experts beside the MLP need attention and MLP in sequence, and norms around each")
        if self.per_layer is not None and self.per_layer.vocab_size < self.vocab_size:
            raise ConfigError(
                f"embeddings by layer: vocab_size is {self.per_layer.vocab_size}, below that of the decoder,"
                f" {self.vocab_size}"
            )
        if self.per_layer is not None and (self.parallel or self.embedding_width is not None):
            raise ConfigError(
                "embeddings by layer need attention and MLP in sequence, and embeddings of the same width"
            )
        if self.variants:
            _check_sources(layer_configs(self))
            periods(self)

    @property
    def input_width(self) -> int:
        """The width of an embedding, of a real or a virtual token."""
        return self.embedding_width or self.width

    @property
    def learned_positions(self) -> bool:
        """Whether a table of position embeddings is added to the inputs."""
        return self.rope is None and self.positions == "learned"

    @property
    def biased(self) -> bool:
        """Whether attention scores have an ALiBi bias."""
        return self.rope is None and self.positions == "alibi"

    @property
    def recurrent(self) -> DeltaNetConfig | MambaConfig | None:
        """The recurrent part of a layer, if this is the config of the layer."""
        return self.delta_net or self.mamba

    @property
    def attends(self) -> bool:
        """Whether a layer has attention, if this is its config."""
        return self.recurrent is None or (self.mamba is not None and self.mamba.beside_attention)

    @property
    def remembers(self) -> tuple[Group | StateGroup, ...]:
        """What a layer remembers, if this is its config: keys and values, then a state. The groups list no layers."""
        found: list[Group | StateGroup] = []
        if self.attends and self.kv_source is None:
            sizes = self.kv_heads, self.head_size, self.head_size
            if self.latent is not None:
                sizes = 1, self.latent.key_size, self.latent.rank
            found.append(Group((), *sizes))
        if self.recurrent is not None:
            found.append(StateGroup((), self.recurrent.state_shapes))
        return tuple(found)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with, without the output matrix."""
        of_inputs = 0 if self.per_layer is None else self.width * self.layers * self.per_layer.width
        return of_inputs + sum(config.matmul_parameters_of_layer for config in layer_configs(self))

    @property
    def matmul_parameters_of_layer(self) -> int:
        """Parameters of one layer that every token is multiplied with, if this is the config of the layer."""
        mlp = 0
        if self.experts is not None:
            mlp += self.experts.matmul_parameters(self.width)
        if self.experts is None or self.experts_beside_mlp:
            mlp += self.width * self.mlp_width * (3 if self.gated_mlp else 2)
        if self.per_layer is not None:
            mlp += 2 * self.width * self.per_layer.width
        if self.convolution is not None:
            mlp += self.convolution.size * self.width**2
        if self.recurrent is not None:
            mlp += self.recurrent.matmul_parameters(self.width)
        if not self.attends:
            return mlp
        if self.latent is not None:
            return self.latent.matmul_parameters(self.width, self.heads) + mlp
        own = 0 if self.kv_source is not None else 1 if self.value_is_key else 2
        outputs = (3 if self.attention_gate else 2) * self.heads + own * self.kv_heads
        return self.width * self.head_size * outputs + mlp


_POSITIVE = ("norm_epsilon", "embedding_scale", "input_scale", "residual_scale", "score_scale", "score_cap",
             "logit_cap", "logit_scale", "clip_qkv", "alibi_scale", "attention_input_scale", "attention_output_scale",
             "key_scale", "mlp_gate_scale", "mlp_output_scale")  # fmt: skip


@functools.lru_cache(maxsize=64)
def layer_configs(config: DecoderConfig) -> tuple[DecoderConfig, ...]:
    """Returns the config of each layer, in which no layer is a variant. Layers of one kind share one object."""
    kinds, changes = layer_kinds(config), {variant.name: variant.changes() for variant in config.variants}

    def of_kind(kind: tuple[str, ...]) -> DecoderConfig:
        fields: dict[str, object] = {"variants": ()}
        for name in kind:
            fields |= changes[name]
        return dataclasses.replace(config, **fields)  # pyright: ignore[reportArgumentType]

    by_kind = {kind: of_kind(kind) for kind in set(kinds)}
    return tuple(by_kind[kind] for kind in kinds)


def _check_sources(configs: tuple[DecoderConfig, ...]) -> None:
    """Checks that layers without keys and values of their own read those of an earlier layer with the same sizes.

    Raises:
      ConfigError: one does not.
    """
    for layer, config in enumerate(configs):
        if config.kv_source is None:
            continue
        source = configs[config.kv_source] if 0 <= config.kv_source < layer else None
        sizes = config.kv_heads, config.head_size
        if source is None or source.kv_source is not None or (source.kv_heads, source.head_size) != sizes:
            raise ConfigError(
                f"layer {layer} cannot read the keys and values of layer {config.kv_source}: that must be an earlier"
                " layer with keys and values of its own, of the same sizes"
            )
        if config.recurrent is not None or config.latent is not None:
            raise ConfigError(f"layer {layer} cannot read another layer's keys and values in place of its own state")


def kv_sources(config: DecoderConfig) -> tuple[int, ...]:
    """Returns the layers whose keys and values other layers read, ascending."""
    return tuple(sorted({one.kv_source for one in config.variants if one.kv_source is not None}))


def layer_kinds(config: DecoderConfig) -> tuple[tuple[str, ...], ...]:
    """Returns the names of the variants that each layer is in."""
    kinds: list[list[str]] = [[] for _ in range(config.layers)]
    for variant in config.variants:
        for layer in variant.layers:
            kinds[layer].append(variant.name)
    return tuple(map(tuple, kinds))


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one kind whose parameters are stacked along a leading axis.

    Attributes:
      path: the path of their parameters.
      layers: indices of the layers, in the order of that axis.
      run: how many of them follow one another in each repeat of their period.
      config: of one of them.
      groups: names of the groups of what they remember: keys and values, then a state. There is none if they read the
        keys and values of another layer.
      places: for each group, the place of the first layer of a run among those of the group in one repeat.
    """

    path: str
    layers: tuple[int, ...]
    run: int
    config: DecoderConfig
    groups: tuple[str, ...]
    places: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Period:
    """A sequence of layers that repeats: the run of each stack, in this order.

    Attributes:
      name: of its parameters.
      stacks: stacks of as many runs as there are repeats.
    """

    name: str
    stacks: tuple[Stack, ...]

    @property
    def repeats(self) -> int:
        return len(self.stacks[0].layers) // self.stacks[0].run

    def groups(self) -> dict[str, int]:
        """Returns how many layers of one repeat each group has."""
        return dict(collections.Counter(name for own in self.stacks for name in own.groups for _ in range(own.run)))


MAX_STACKS = 256  # The most kinds of layers that are compiled one by one.


@functools.lru_cache(maxsize=64)
def periods(config: DecoderConfig) -> tuple[Period, ...]:
    """Returns the layers as few repeating sequences. Equal layers are one period of one stack, "layers".

    Raises:
      ConfigError: the layers repeat so little that their program would be too large.
    """
    kinds, configs, groups = layer_kinds(config), layer_configs(config), group_names(config)
    found, start = [], 0
    while start < config.layers:
        size, repeats = longest_repetition(kinds[start:])
        apart = range(0, size * repeats, size)
        own = [(_of_layers(configs[i], tuple(i + n for n in apart)), groups[i]) for i in range(start, start + size)]
        name = "layers" if not config.variants else f"layers_{start}"
        stacks: list[Stack] = []
        for (of_run, names), members in itertools.groupby(range(size), own.__getitem__):
            run = tuple(members)
            path, counts = name if size == 1 else f"{name}/{run[0]}", Period(name, tuple(stacks)).groups()
            places = tuple(counts.get(group, 0) for group in names)
            layers = tuple(start + n + i for n in apart for i in run)
            stacks.append(Stack(path, layers, len(run), of_run, names, places))
        found.append(Period(name, tuple(stacks)))
        start += size * repeats
        if sum(len(period.stacks) for period in found) > MAX_STACKS:
            raise ConfigError(
                f"the kinds of layers repeat too little: the first {start} of {config.layers} layers are more than"
                f" {MAX_STACKS} stacks of equal layers"
            )
    return tuple(found)


def _of_layers(config: DecoderConfig, layers: tuple[int, ...]) -> DecoderConfig:
    """Removes what concerns only other layers, and makes the local RoPE of layers that all have a window their RoPE."""
    windowed = [layer in config.window_layers for layer in layers]
    if not any(windowed):
        return dataclasses.replace(config, window=0, window_layers=(), local_rope=None)
    if all(windowed) and config.local_rope is not None:
        return dataclasses.replace(config, rope=config.local_rope, local_rope=None)
    return config


@functools.lru_cache(maxsize=64)
def group_names(config: DecoderConfig) -> tuple[tuple[str, ...], ...]:
    """Returns the names of the groups of what each layer remembers, in the order of `DecoderConfig.remembers`.

    Layers that remember the same shapes share a group. It has the name of the first variant with it, or "self". Of a
    layer that also has a state beside its attention, the group of the state has "recurrent" in its name.
    """

    def new(name: str) -> tuple[str, str]:
        return name, RECURRENT if name == SELF else f"{name}_{RECURRENT}"

    names = dict(zip(config.remembers, new(SELF), strict=False))
    kinds, configs = layer_kinds(config), layer_configs(config)
    by_kind: dict[tuple[str, ...], tuple[str, ...]] = {}
    for kind, own in zip(kinds, configs, strict=True):
        if kind not in by_kind:
            remembered = own.remembers
            for shape, name in zip(remembered, new(kind[0] if kind else SELF), strict=False):
                names.setdefault(shape, name)
            by_kind[kind] = tuple(names[shape] for shape in remembered)
    return tuple(by_kind[kind] for kind in kinds)
