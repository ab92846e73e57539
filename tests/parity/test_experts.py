"""Mixture-of-experts MLPs equal transformers' torch modules: chosen experts, weights, outputs, gradients."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.models.experts import Experts, route, router_logits
from spt_jax.models.experts_config import ExpertsConfig

pytestmark = pytest.mark.parity

D, F, E = 16, 12, 8
COMMON = {"hidden_size": D, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
SIGMOID = {
    "scoring": "sigmoid",
    "correction": True,
    "renormalize": True,
    "renormalize_epsilon": 1e-20,
    "group_score": "top2_sum",
}
GROUPED = {"n_group": 4, "topk_group": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A torch module, the config that it is built from, and ours.

    Attributes:
      family: model type.
      module: name of the torch class.
      theirs: keys of transformers' config.
      ours: fields of ExpertsConfig.
      router, shared: attributes of the torch module.
      mlp: for a family whose decoder layer adds the shared MLP itself, the class of that.
    """

    family: str
    module: str
    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    router: str = "gate"
    shared: str | None = None
    mlp: str | None = None
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.family

    @property
    def config(self) -> ExpertsConfig:
        return ExpertsConfig(**{"experts": E, "top_k": 3, "expert_width": F, **self.ours})


def deepseek(family: str, module: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str = "") -> Case:
    sizes = {"n_routed_experts": E, "moe_intermediate_size": F, "n_shared_experts": 2, "num_experts_per_tok": 3}
    return Case(
        family, module, {**sizes, **theirs}, {"shared_width": 2 * F, **ours}, "gate", "shared_experts", name=name
    )


MIXTRAL = {"num_local_experts": E, "num_experts_per_tok": 3, "intermediate_size": F}
QWEN = {"num_experts": E, "num_experts_per_tok": 3, "moe_intermediate_size": F}
CASES = [
    Case("mixtral", "MixtralSparseMoeBlock", MIXTRAL, {"renormalize": True}),
    Case(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        {**QWEN, "shared_expert_intermediate_size": 20},
        {"shared_width": 20, "shared_gate": True},
        shared="shared_expert",
    ),
    Case("qwen3_moe", "Qwen3MoeSparseMoeBlock", {**QWEN, "norm_topk_prob": True}, {"renormalize": True}),
    Case("qwen3_moe", "Qwen3MoeSparseMoeBlock", QWEN, {}, name="qwen3_moe as it is"),
    Case("olmoe", "OlmoeSparseMoeBlock", {"num_experts": E, "num_experts_per_tok": 3, "intermediate_size": F}, {}),
    Case("granitemoe", "GraniteMoeMoE", MIXTRAL, {"scoring": "softmax_of_chosen"}, "router"),
    Case(
        "granitemoeshared",
        "GraniteMoeSharedMoE",
        {**MIXTRAL, "shared_intermediate_size": 20},
        {"scoring": "softmax_of_chosen", "shared_width": 20},
        "router",
        mlp="GraniteMoeSharedMLP",
    ),
    Case(
        "gpt_oss",
        "GptOssMLP",
        {**MIXTRAL, "swiglu_limit": 2.0},
        {
            "scoring": "softmax_of_chosen",
            "router_bias": True,
            "bias": True,
            "gate": "clamped_swiglu",
            "gate_limit": 2.0,
        },
        "router",
    ),
    deepseek("glm4_moe", "Glm4MoeMoE", {"routed_scaling_factor": 1.5}, {**SIGMOID, "scale": 1.5}),
    deepseek(
        "glm4_moe",
        "Glm4MoeMoE",
        {**GROUPED, "norm_topk_prob": False},
        {
            "scoring": "sigmoid",
            "correction": True,
            "groups": 4,
            "top_groups": 2,
            "group_score": "top2_sum",
        },
        "glm4_moe in groups",
    ),
    deepseek("deepseek_v2", "DeepseekV2Moe", {"routed_scaling_factor": 1.5}, {"scale": 1.5}),
    deepseek(
        "deepseek_v2",
        "DeepseekV2Moe",
        {**GROUPED, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5},
        {"scale": 1.5, "groups": 4, "top_groups": 2, "group_score": "max"},
        "deepseek_v2 in groups",
    ),
    deepseek("deepseek_v3", "DeepseekV3MoE", GROUPED, {**SIGMOID, "scale": 2.5, "groups": 4, "top_groups": 2}),
]


def build(case: Case) -> tuple[Any, Any]:
    """The torch module and the separate shared MLP, if there is one, with random weights."""
    import transformers

    modeling = importlib.import_module(f"transformers.models.{case.family}.modeling_{case.family}")
    config = transformers.CONFIG_MAPPING[case.family](**COMMON, **case.theirs)
    config._experts_implementation = "eager"
    modules = [getattr(modeling, name)(config) for name in (case.module, case.mlp) if name]
    generator = torch.Generator().manual_seed(3)
    for module in modules:
        module.eval().requires_grad_(False)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
    return modules[0], modules[1] if case.mlp else None


def ours(case: Case, module: Any, mlp: Any) -> dict[str, Any]:
    """Our parameters of a torch module."""
    experts, router = module.experts, getattr(module, case.router)
    params: dict[str, Any] = {"router": {"kernel": router.weight.T}}
    if case.config.router_bias:
        params["router"]["bias"] = router.bias
    if case.config.correction:
        params["correction"] = router.e_score_correction_bias
    if case.family == "gpt_oss":
        pairs, biases, down = experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj
        gate, up = pairs[..., ::2], pairs[..., 1::2]
    else:
        gate, up = experts.gate_up_proj.transpose(1, 2).chunk(2, dim=-1)
        down = experts.down_proj.transpose(1, 2)
    params["experts"] = {"gate": {"kernel": gate}, "up": {"kernel": up}, "down": {"kernel": down}}
    if case.config.bias:
        params["experts"]["gate"]["bias"], params["experts"]["up"]["bias"] = biases[..., ::2], biases[..., 1::2]
        params["experts"]["down"]["bias"] = experts.down_proj_bias
    if mlp is not None:
        gate, up = mlp.input_linear.weight.chunk(2)
        shared = {"gate": gate, "up": up, "down": mlp.output_linear.weight}
        params["shared"] = {name: {"kernel": weight.T} for name, weight in shared.items()}
    if case.shared:
        shared = getattr(module, case.shared)
        params["shared"] = {
            name: {"kernel": getattr(shared, f"{name}_proj").weight.T} for name in ("gate", "up", "down")
        }
    if case.config.shared_gate:
        params["shared_gate"] = {"kernel": module.shared_expert_gate.weight.T}
    return jax.tree.map(lambda tensor: jnp.asarray(tensor.numpy()), params)


def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, 15, D)).astype(np.float32)


def output_of(module: Any, mlp: Any) -> Callable[[Any], Any]:
    def output(x: Any) -> Any:
        y = module(x)
        y = y[0] if isinstance(y, tuple) else y
        return y if mlp is None else y + mlp(x)

    return output


def test_cases_cover_every_family():
    assert len({case.family for case in CASES}) == 10 and len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chosen_experts_and_their_weights(case):
    module, mlp = build(case)
    params = ours(case, module, mlp)
    x = inputs().reshape(-1, D)
    with torch.no_grad():
        _, weights, chosen = getattr(module, case.router)(torch.tensor(x))
    logits = router_logits(jnp.asarray(x), **params["router"])
    own_weights, own = route(case.config, logits, params.get("correction"))
    order, own_order = np.argsort(chosen.numpy(), axis=-1), np.argsort(own, axis=-1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(own), own_order, -1), np.take_along_axis(chosen.numpy(), order, -1)
    )
    expected = np.take_along_axis(weights.numpy(), order, -1)
    assert expected.std() > 0.01 and len(np.unique(chosen)) > E // 2
    np.testing.assert_allclose(np.take_along_axis(np.asarray(own_weights), own_order, -1), expected, atol=1e-6)


@pytest.mark.parametrize("dispatch", ["dense", "blocks", "ragged"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case, dispatch):
    """The gradient flows through the experts and through the weights of the router."""
    module, mlp = build(case)
    params = ours(case, module, mlp)
    layer = Experts(case.config, dispatch=dispatch)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(inputs()))["params"]
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
    x = torch.tensor(inputs(), requires_grad=True)
    y = output_of(module, mlp)(x)
    cotangent = np.random.default_rng(2).normal(size=y.shape).astype(np.float32)
    y.backward(torch.tensor(cotangent))

    @jax.jit
    def run(x, cotangent):
        out, pull = jax.vjp(lambda x: layer.apply({"params": params}, x), x)
        return out, pull(cotangent)[0]

    out, gradient = run(inputs(), cotangent)
    for own, theirs in ((out, y.detach()), (gradient, x.grad)):
        scale = theirs.abs().max().item()
        assert scale > 0.1
        np.testing.assert_allclose(np.asarray(own) / scale, theirs.numpy() / scale, atol=1e-5)
