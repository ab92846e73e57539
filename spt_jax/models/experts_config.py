"""The shape of a mixture-of-experts MLP."""

import dataclasses
import math
from typing import Literal

from spt_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """What defines the function of a mixture-of-experts MLP. Array dimensions: E `experts`, F `expert_width`.

    A token's router logits are scored, `top_k` experts are chosen by these scores, and their outputs are added up with
    the scores as weights.

    Attributes:
      experts: the number of experts.
      top_k: the number of experts of a token.
      expert_width: the hidden width of an expert.
      shared_width: the hidden width of the MLP that every token passes as well; 0 for none.
      shared_gate: whether the output of the shared MLP is multiplied by the sigmoid of a linear map of the input.
      scoring: "softmax" or "sigmoid" over all experts, or "softmax_of_chosen", over the largest logits only.
      renormalize: whether the weights of a token are divided by their sum.
      renormalize_epsilon: added to that sum.
      router_bias: whether the router has a bias.
      router_norm_epsilon: epsilon of an RMSNorm of the router's input, which is then multiplied by a stored scale and
        by D^-0.5 (Gemma 4); None for no norm.
      correction: whether a bias is added to the scores for the choice of experts only, and not to the weights (Wang et
        al. 2024, arXiv 2408.15664).
      groups: the number of groups of adjacent experts; 1 for no groups.
      top_groups: the number of groups that the experts of a token are chosen from (DeepSeek-V2, arXiv 2405.04434).
      group_score: a group's score: that of its best expert ("max") or the sum of its best two ("top2_sum").
      scale: factor of all weights.
      expert_scale: whether the weights of each expert are also multiplied by a stored number.
      bias: whether the linear maps of the experts have biases.
      gate: "swiglu" is silu(gate) * up; "geglu_tanh" is gelu(gate) * up, in its tanh form;
        "clamped_swiglu" is that of gpt-oss, gate * sigmoid(gate_slope * gate) * (up + 1), with gate at most
        `gate_limit` and up between -`gate_limit` and `gate_limit`.
      gate_limit: for "clamped_swiglu" only.
      gate_slope: for "clamped_swiglu" only.

    Raises:
      ConfigError: the options contradict each other, or a number is out of range.
    """

    experts: int
    top_k: int
    expert_width: int
    shared_width: int = 0
    shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    renormalize: bool = False
    renormalize_epsilon: float = 0.0
    router_bias: bool = False
    router_norm_epsilon: float | None = None
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    scale: float = 1.0
    expert_scale: bool = False
    bias: bool = False
    gate: Literal["swiglu", "geglu_tanh", "clamped_swiglu"] = "swiglu"
    gate_limit: float = 7.0
    gate_slope: float = 1.702

    def __post_init__(self) -> None:
        for name in ("experts", "top_k", "expert_width", "groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"experts: {name} is {getattr(self, name)}; it must be at least 1")
        if self.top_k > self.experts:
            raise ConfigError(f"experts: top_k is {self.top_k}, but there are only {self.experts} experts")
        if self.shared_width < 0:
            raise ConfigError(f"experts: shared_width is {self.shared_width}; it must be at least 0 (0 for none)")
        if self.shared_gate and not self.shared_width:
            raise ConfigError("experts: shared_gate needs a shared MLP, that is shared_width above 0")
        if self.renormalize and self.scoring == "softmax_of_chosen":
            raise ConfigError("experts: the scores 'softmax_of_chosen' add up to 1 already; set renormalize to False")
        if not (math.isfinite(self.renormalize_epsilon) and self.renormalize_epsilon >= 0):
            raise ConfigError(
                f"experts: renormalize_epsilon is {self.renormalize_epsilon}; it must be a finite number of at least 0"
            )
        if self.renormalize_epsilon and not self.renormalize:
            raise ConfigError("experts: renormalize_epsilon has no effect unless renormalize is True")
        for name in ("scale", "gate_limit", "gate_slope", "router_norm_epsilon"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"experts: {name} is {value}; it must be a finite number above 0")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.experts % self.groups:
            raise ConfigError(f"experts: {self.experts} experts cannot be divided into {self.groups} equal groups")
        if self.top_groups > self.groups:
            raise ConfigError(f"experts: top_groups is {self.top_groups}, but there are only {self.groups} groups")
        size = self.experts // self.groups
        if self.top_k > self.top_groups * size:
            raise ConfigError(
                f"experts: top_k is {self.top_k}, but {self.top_groups} of {self.groups} groups have only"
                f" {self.top_groups * size} experts"
            )
        if self.groups > 1 and self.group_score == "top2_sum" and size < 2:
            raise ConfigError(
                f"experts: group_score 'top2_sum' needs at least 2 experts per group; with {self.groups} groups of"
                f" {self.experts} experts there is 1"
            )

    def matmul_parameters(self, width: int) -> int:
        """Returns the number of parameters that one token is multiplied with, for a model of width D."""
        mlps = 3 * width * (self.top_k * self.expert_width + self.shared_width)
        return width * (self.experts + self.shared_gate) + mlps
