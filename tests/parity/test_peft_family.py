"""Every method that PEFT has too: the same loss, logits and gradients from the same parameters and batch."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.prompts import ContextPromptTuning, LlamaAdapter, MultitaskPromptTuning, PrefixTuning, PTuning
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.examples import VOCAB, same_gradient
from tests.parity.test_peft import P, examples_for_peft, padded
from tests.parity.versions import peft_marks

pytestmark = peft_marks


def prefix_arrays(flat: np.ndarray, config) -> np.ndarray:
    """PEFT's [..., 2 * L * K * H] as [..., L, 2, K, H]: keys at 2l, values at 2l + 1."""
    return flat.reshape(*flat.shape[:-1], config.layers, 2, config.kv_heads, config.head_size)


def flat_prefix(tensors, config):
    free = prefix_arrays(tensors["embedding.weight"], config).transpose(2, 1, 0, 3, 4)
    return {"free": free, "scale": np.float32(1)}


def projected_prefix(tensors, config):
    start = np.zeros((2, config.layers, P, config.kv_heads, config.head_size), np.float32)
    outer = prefix_arrays(tensors["transform.2.weight"].T, config)
    return {
        "start": start,
        "network": {
            "embedding": tensors["embedding.weight"],
            "inner": {"kernel": tensors["transform.0.weight"].T, "bias": tensors["transform.0.bias"]},
            "outer": {"kernel": outer, "bias": prefix_arrays(tensors["transform.2.bias"], config)},
        },
    }


def layers_of(tensors, names):
    return {
        f"linear_{i}": {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}
        for i, name in enumerate(names)
    }


def mlp_encoder(tensors, config):
    layers = layers_of(tensors, [f"mlp_head.{i}" for i in (0, 2, 4)])
    return {"embedding": tensors["embedding.weight"], **layers}


def lstm_encoder(tensors, config, gradient=False):
    def direction(end):
        # torch has two biases that are added: one bias has their sum, and the gradient that each of them has.
        both = [tensors[f"lstm_head.bias_{side}_{end}"] for side in ("ih", "hh")]
        return {
            "input": tensors[f"lstm_head.weight_ih_{end}"].T,
            "recurrent": tensors[f"lstm_head.weight_hh_{end}"].T,
            "bias": both[0] if gradient else both[0] + both[1],
        }

    lstms = {f"lstm_{i}": {"forward": direction(f"l{i}"), "backward": direction(f"l{i}_reverse")} for i in range(2)}
    layers = layers_of(tensors, ["mlp_head.0", "mlp_head.2"])
    return {"embedding": tensors["embedding.weight"], **lstms, **layers}


def adapter(tensors, config):
    layers = sorted({int(name.split(".")[0]) for name in tensors})
    return {
        "rows": np.concatenate([tensors[f"{i}.adaption_prompt"] for i in layers]),
        "gates": np.concatenate([tensors[f"{i}.adaption_gate"] for i in layers]),
    }


def encoder_tensors(model, values):
    return {name: values(p) for name, p in model.prompt_encoder["default"].named_parameters()}


def adapter_tensors(model, values):
    prefix = "base_model.model.model.layers."
    chosen = {n: p for n, p in model.named_parameters() if "adaption_" in n}
    return {n.removeprefix(prefix).replace(".self_attn", ""): values(p) for n, p in chosen.items()}


COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
CASES = {
    "prefix": (PrefixTuning(length=P), lambda: peft.PrefixTuningConfig(**COMMON), flat_prefix),
    "projected prefix": (
        PrefixTuning(length=P, reparameterization="mlp", start="zero", hidden=24),
        lambda: peft.PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=24),
        projected_prefix,
    ),
    "p-tuning mlp": (
        PTuning(length=P, hidden=24),
        lambda: peft.PromptEncoderConfig(**COMMON, encoder_hidden_size=24),
        mlp_encoder,
    ),
    "p-tuning lstm": (
        PTuning(length=P, hidden=12, encoder="lstm"),
        lambda: peft.PromptEncoderConfig(
            **COMMON, encoder_hidden_size=12, encoder_reparameterization_type="LSTM", encoder_dropout=0.0
        ),
        lstm_encoder,
    ),
    "adapter": (
        LlamaAdapter(length=P, layers=2),
        lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=2),
        adapter,
    ),
}


def load_both(directory, family, configure):
    """Our base, and PEFT's model with parameters of its method that hide nothing behind zeros."""
    import transformers

    write_tiny_checkpoint(directory, family, seed=11)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, configure())
    model.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return load_base(directory, dtype="float32"), model


def real_examples(method, count: int) -> list[Example]:
    """Virtual tokens in front, as PEFT has them, for the methods with token rows."""
    examples = examples_for_peft("target", count)
    if method.token_count:
        return examples
    return [Example(e.ids[e.ids < VOCAB], e.predicted[e.ids < VOCAB], (), 0, e.index) for e in examples]


@functools.partial(jax.jit, static_argnames="method")
def ours_of(method, model, params, batch):
    loss, gradient, _ = loss_and_gradient(method, CrossEntropy(), model, params, batch)
    virtual = method.materialize(params, model)
    prefix = encode_prefix(model, virtual, batch.lead_ids, batch.lead_length)
    return loss, gradient, output_logits(model, virtual, prefix, batch.rows)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "llama") for name in CASES),
        *(("prefix", family) for family in ("gpt2", "bloom", "opt", "gemma3_text", "granite")),
        ("p-tuning mlp", "qwen3"),
        ("p-tuning mlp", "granite"),
    ],
)
def test_loss_logits_and_gradients_are_pefts(name, family, tmp_path):
    method, configure, convert = CASES[name]
    base, model = load_both(tmp_path, family, configure)
    read = adapter_tensors if name == "adapter" else encoder_tensors
    params = convert(read(model, lambda p: p.detach().numpy().copy()), base.config)
    params = jax.tree.map(jnp.asarray, params)

    examples = examples_for_peft("target", 6)
    output = model(**padded(examples, "right"))
    output.loss.backward()
    options = {"gradient": True} if name == "p-tuning lstm" else {}
    gradients = convert(read(model, lambda p: p.grad.numpy().copy()), base.config, **options)

    own = real_examples(method, 6)
    lead = P if method.token_count else 2
    batch = pack(own, plan_batches(own, lead=lead, batch_size=6, packing=False))
    loss, slope, logits = ours_of(method, base.model, params, batch)
    np.testing.assert_allclose(float(loss), output.loss.item(), rtol=1e-5)
    theirs = output.logits.detach().numpy()
    shift = theirs.shape[1] - padded(examples, "right")["input_ids"].shape[1]
    for row, record in enumerate(batch.rows.examples[:, 0]):
        targets = np.flatnonzero(examples[record].predicted) - P
        places = batch.rows.target_outputs[row, : len(targets)]
        np.testing.assert_allclose(np.asarray(logits)[row, places], theirs[record, shift + targets - 1], atol=1e-4)
    trainable = method.trainable(slope)
    for path, leaf in jax.tree.leaves_with_path(slope):
        if functools.reduce(lambda tree, key: tree[key.key], path, trainable):
            expected = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
            worst = same_gradient(leaf, expected, 2e-5)
            print(f"{name} {family} {jax.tree_util.keystr(path)}: {worst:.1e}")


def test_multitask_prompts_are_pefts(tmp_path):
    """Rows of three tasks in one batch: loss and gradients of the shared rows and of every task's matrix."""
    configure = lambda: peft.MultitaskPromptTuningConfig(**COMMON, num_tasks=3, num_ranks=2)  # noqa: E731
    base, model = load_both(tmp_path, "llama", configure)
    tasks = [0, 2, 1, 2, 0, 0]
    examples = [dataclasses.replace(e, prompt=t) for e, t in zip(examples_for_peft("target", 6), tasks, strict=True)]
    output = model(**padded(examples, "right"), task_ids=torch.tensor(tasks))
    output.loss.backward()
    names = {"tokens": "embedding.weight", "left": "prefix_task_cols", "right": "prefix_task_rows"}
    theirs = encoder_tensors(model, lambda p: (jnp.asarray(p.detach().numpy()), p.grad.numpy()))
    method = MultitaskPromptTuning(length=P, tasks=("a", "b", "c"), rank=2)
    params = {ours: theirs[name][0] for ours, name in names.items()}
    for packing in (False, True):
        batch = pack(examples, plan_batches(examples, lead=[P, P, P], batch_size=6, packing=packing))
        loss, slope, _ = ours_of(method, base.model, params, batch)
        np.testing.assert_allclose(float(loss), output.loss.item(), rtol=1e-5)
        for ours, name in names.items():
            same_gradient(slope[ours], theirs[name][1], 2e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_context_prompt_tuning_is_pefts(decay, tmp_path):
    """Projection, tokens that stay, loss on the context's labels and gradient, over three steps of SGD.

    The first label of the context is its first token, which nothing predicts. The context without decay has no other.
    """
    kinds, ids = (4, 5, 6, 8, 11, 12) if decay else (4, 1, 2, 2, 3, 0), (17, 40, 41, 18, 50, 51)
    base, model = load_both(
        tmp_path,
        "llama",
        lambda: peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=list(ids),
            cpt_mask=[1] * P,
            cpt_tokens_type_mask=list(kinds),
            opt_weighted_loss_type="decay" if decay else "none",
            opt_loss_decay_factor=decay,
            opt_projection_epsilon=3.0,
            opt_projection_format_epsilon=2.0,
        ),
    )
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.delta_embedding.weight.zero_()
    method = ContextPromptTuning(ids=ids, kinds=kinds, decay=decay, epsilon=3.0, format_epsilon=2.0)
    params = method.init_params(jax.random.key(0), base)
    np.testing.assert_array_equal(encoder.embedding.weight.detach().numpy(), params["start"])
    examples = examples_for_peft("target", 6)
    inputs = padded(examples, "right")
    kinds_of_rows = torch.where(inputs["labels"] == -100, 2, 4)
    batches = [
        pack(examples, plan_batches(examples, lead=P, batch_size=6, packing=packing)) for packing in (False, True)
    ]
    optimizer = torch.optim.SGD([encoder.delta_embedding.weight], lr=5.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs, input_type_mask=kinds_of_rows.clone()).loss  # PEFT changes the mask in place
        loss.backward()
        for batch in batches:
            ours, slope, _ = ours_of(method, base.model, params, batch)
            np.testing.assert_allclose(float(ours), loss.item(), rtol=1e-5)
            same_gradient(slope["delta"], encoder.delta_embedding.weight.grad.numpy(), 2e-5)
        optimizer.step()
        params = method.project({**params, "delta": params["delta"] - 5.0 * slope["delta"]})
    norms = np.linalg.norm(params["delta"], axis=1)
    assert (norms[[i for i, kind in enumerate(kinds) if kind % 4 == 0]] == 0).all()
    scale = (base.config.width / 2048) ** 0.5
    np.testing.assert_allclose(norms[[1, 4]].max(), 2.0 * scale, rtol=1e-4)
    np.testing.assert_allclose(norms[[2, 3]].max(), 3.0 * scale, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        *(
            (family, ValueError, "conv state for non linear attention layer")
            for family in ("qwen3_5_text", "qwen3_next", "granitemoehybrid", "falcon_h1")
        ),
        ("deepseek_v3", RuntimeError, "Sizes of tensors must match"),
    ],
)
def test_bases_whose_prefixes_raise_in_peft(family, error, message, tmp_path):
    """PEFT makes keys and values for every layer, which recurrent layers and latent attention do not take."""
    base, model = load_both(tmp_path, family, lambda: peft.PrefixTuningConfig(**COMMON))
    with pytest.raises(error, match=message):
        model(**padded(examples_for_peft("target", 2), "right"))
    method = PrefixTuning(length=P)
    params = method.init_params(jax.random.key(0), base)
    batch = pack(real_examples(method, 2), plan_batches(real_examples(method, 2), lead=2, batch_size=2, packing=False))
    _, slope, _ = ours_of(method, base.model, params, batch)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope))
