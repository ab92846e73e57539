"""One step, against every example standing alone; what it may change; and the program that it compiles to."""

import dataclasses
import functools
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from spt_jax.bases.checkpoint import parameter_shapes
from spt_jax.bases.config import decoder_config
from spt_jax.data.batches import Batch, multiples, pack, place_batch, plan_batches
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import embed_stream, encode_prefix, output_logits
from spt_jax.models.attention import Stream
from spt_jax.models.decoder import Decoder
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.prompts import PromptTuning, VirtualPrompt
from spt_jax.prompts.initializers import array, uniform
from spt_jax.runtime.sharding import MeshConfig, make_mesh, parameter_sharding
from spt_jax.testing import tiny_base, tiny_config
from spt_jax.training.objectives import CrossEntropy, VerbalizerCrossEntropy
from spt_jax.training.step import init_state, loss_and_gradient, make_train_step, train_step
from tests.examples import HEAD, QUICK_COMPILE, VIRTUAL, VOCAB, loss_alone, random_examples, same_gradient

METHOD = PromptTuning(length=VIRTUAL, init=uniform(0.5))
HEAD_LENGTH = len(HEAD)
OBJECTIVES = {
    "target": CrossEntropy(),
    "spans": CrossEntropy(),
    "single": VerbalizerCrossEntropy(choices=3),
    "choices": VerbalizerCrossEntropy(choices=3),
}


@functools.cache
def base_of(family: str = "llama", **overrides):
    return tiny_base(family, **overrides)


def prompt_of(base, seed: int = 1):
    return METHOD.init_params(jax.random.key(seed), base)


@functools.partial(jax.jit, static_argnames=("method", "objective", "microbatches"), compiler_options=QUICK_COMPILE)
def jitted(method, objective, model, params, batch, microbatches=1):
    return loss_and_gradient(method, objective, model, params, batch, microbatches)


def loss_in_rows(base, params, examples, objective, *, weights=None, lead=HEAD_LENGTH, microbatches=1, **options):
    """Loss and gradient [P, D] of one batch in the given layout."""
    multiple = options.pop("multiple", microbatches)
    plan = plan_batches(examples, lead=lead, batch_size=len(examples), multiple=multiple, **options)
    batch = pack(examples, plan, weights)
    loss, gradient, weight = jitted(METHOD, objective, base.model, params, batch, microbatches)
    return float(loss), np.asarray(gradient["tokens"]), float(weight)


LAYOUTS = {
    "packed": {},
    "packed, lead ends amid the prompt": {"lead": 2},
    "packed, 4 microbatches": {"microbatches": 4},
    "padded": {"packing": False},
    "padded, prompt in every row": {"packing": False, "lead": 0},
}
CASES = [
    *[("llama", "choices", layout) for layout in LAYOUTS],
    *[("llama", "target", layout) for layout in ("packed", "packed, 4 microbatches", "padded, prompt in every row")],
    *[("llama", kind, "packed") for kind in ("spans", "single")],
    ("mistral", "choices", "packed"),
    ("smollm3", "target", "packed"),
    ("gpt2", "choices", "packed"),
]


@functools.cache
def reference(family: str, kind: str):
    base, examples = base_of(family), random_examples(kind, 9)
    params = prompt_of(base)
    return base, examples, params, loss_alone(base, params["tokens"], examples)


@pytest.mark.parametrize(("family", "kind", "layout"), CASES)
def test_every_layout_is_each_example_alone(family, kind, layout):
    """Rotary and learned positions, a sliding window shorter than the examples, and layers without positions."""
    base, examples, params, (loss, gradient) = reference(family, kind)
    ours, slope, weight = loss_in_rows(base, params, examples, OBJECTIVES[kind], **LAYOUTS[layout])
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    worst = same_gradient(slope, gradient)
    print(f"{family} {kind} {layout}: loss {abs(ours / loss - 1):.1e}, gradient {worst:.1e}")
    assert weight == (9 if OBJECTIVES[kind].uses_choices else sum(example.predicted.sum() for example in examples))


@pytest.mark.parametrize("kind", ["target", "choices"])
def test_class_weights_weigh_examples(kind):
    """One class weighs nothing."""
    base, examples, params, (plain, _) = reference("llama", "choices")
    if kind == "target":  # the right choice as the only target
        examples = [example.as_target() for example in examples]
    weights = (0.5, 2.0, 0.0)
    ours, slope, _ = loss_in_rows(base, params, examples, OBJECTIVES[kind], weights=weights)
    loss, gradient = loss_alone(base, params["tokens"], examples, weights)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    same_gradient(slope, gradient)
    assert abs(loss / plain - 1) > 1e-3


@pytest.mark.parametrize(("kind", "lead"), [("target", 0), ("choices", HEAD_LENGTH)])
def test_padding_rows_change_nothing(kind, lead):
    """Three examples in 16 rows: the empty ones give no NaN, to the loss or the gradient."""
    base, _, params, _ = reference("llama", kind)
    examples = random_examples(kind, 3, seed=1)
    loss, gradient = loss_alone(base, params["tokens"], examples)
    padded = loss_in_rows(base, params, examples, OBJECTIVES[kind], lead=lead, packing=False, multiple=16)
    np.testing.assert_allclose(padded[0], loss, rtol=1e-5)
    same_gradient(padded[1], gradient)


@pytest.mark.parametrize("kind", ["target", "choices"])
def test_a_batch_of_padding_alone_has_no_loss(kind):
    base, examples, params, _ = reference("llama", kind)
    batch = pack(examples, plan_batches(examples, lead=HEAD_LENGTH, batch_size=9))
    empty = Batch(batch.lead_ids, jax.tree.map(np.zeros_like, batch.rows))
    loss, gradient, _ = jitted(METHOD, OBJECTIVES[kind], base.model, params, empty)
    assert loss == 0
    assert not np.asarray(gradient["tokens"]).any()


def test_virtual_ids_never_reach_the_embedding_table():
    """`jnp.take` gives NaN out of range, and a gradient of zero or NaN beside it."""
    base = base_of()
    params = prompt_of(base)
    ids = jnp.asarray([[VOCAB - 1, VOCAB, VOCAB + VIRTUAL - 1, 0]])
    stream = Stream(jnp.arange(4)[None], jnp.ones_like(ids), jnp.zeros_like(ids))

    def embedded(tokens):
        return embed_stream(base.model, VirtualPrompt(tokens=tokens), ids, stream)

    rows = np.asarray(embedded(params["tokens"])[0])
    table = np.asarray(base.params["embedding"])
    tokens = np.asarray(params["tokens"])
    np.testing.assert_array_equal(rows, np.stack([table[-1], tokens[0], tokens[-1], table[0]]))
    gradient = np.asarray(jax.grad(lambda tokens: embedded(tokens).sum())(params["tokens"]))
    np.testing.assert_array_equal(gradient, np.repeat([[1.0], [0.0], [0.0], [0.0], [1.0]], tokens.shape[1], axis=1))
    assert np.isfinite(embed_stream(base.model, None, ids, stream)).all()


def test_one_logit_row_for_each_position_that_predicts():
    """No logits come back for virtual tokens, nor for text that is given."""
    base, examples = base_of(), random_examples("target", 9)
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=9))
    virtual = VirtualPrompt(**prompt_of(base))

    @jax.jit
    def logits(model, batch):
        prefix = encode_prefix(model, virtual, batch.lead_ids)
        return output_logits(model, virtual, prefix, batch.rows)

    rows, scores = batch.rows, logits(base.model, batch)
    assert scores.shape == (*rows.outputs.shape, VOCAB)
    assert (rows.target_weights > 0).sum() == sum(example.predicted.sum() for example in examples)
    assert rows.outputs.size < rows.ids.size / 2


def test_a_wrong_number_of_microbatches_is_refused():
    """Below 1 before tracing, and what does not divide the rows with the number that does."""
    base, examples, params, _ = reference("llama", "target")
    with pytest.raises(ConfigError, match="microbatches is 0; it must be at least 1"):
        make_train_step(base, METHOD, optax.sgd(0.1), CrossEntropy(), microbatches=0)
    batch = pack(examples, plan_batches(examples, lead=HEAD_LENGTH, batch_size=9, packing=False))
    with pytest.raises(ConfigError, match="9 rows cannot be split into 2 microbatches"):
        loss_and_gradient(METHOD, CrossEntropy(), base.model, params, jax.tree.map(jnp.asarray, batch), 2)


def test_a_step_is_the_optimizer_applied_to_the_gradient():
    base, examples, params, (loss, gradient) = reference("llama", "target")
    method = PromptTuning(length=VIRTUAL, init=array(np.array(params["tokens"])))
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=9))
    state = init_state(jax.random.key(0), base, method, optax.sgd(0.1))
    before = np.array(state.params["tokens"])
    state, metrics = make_train_step(base, method, optax.sgd(0.1))(state, batch)
    same_gradient(before - np.asarray(state.params["tokens"]), 0.1 * gradient, 1e-4)
    assert state.step == 1
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["prompt_norm"], np.linalg.norm(state.params["tokens"]), rtol=1e-5)


def test_only_the_prompt_changes():
    """The frozen parameters stay bit for bit, the state is prompt-sized, and what the prompt started from is kept."""
    base, examples = base_of(), random_examples("choices", 6)
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=6))
    start = np.random.default_rng(0).standard_normal((VIRTUAL, base.config.width)).astype(np.float32)
    method, optimizer = PromptTuning(length=VIRTUAL, init=array(start)), optax.adam(0.1)
    frozen, kept = jax.tree.map(np.array, base.params), start.copy()
    state = init_state(jax.random.key(0), base, method, optimizer)
    step = make_train_step(base, method, optimizer, OBJECTIVES["choices"])
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, base.params, frozen)
    np.testing.assert_array_equal(start, kept)
    assert np.abs(np.asarray(state.params["tokens"]) - start).max(axis=1).min() > 0.1
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == 5
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    assert max(sizes) == start.size
    assert sum(sizes) < 3 * start.size + 10


class Counting(PromptTuning):
    """Counts how often a step is traced."""

    traces = []

    def materialize(self, params, model):
        self.traces.append(jax.tree.map(jnp.shape, params))
        return super().materialize(params, model)


def test_one_trace_per_bucket():
    """Ten batches in two numbers of rows, from the fresh state to the last."""
    base, method = base_of(), Counting(length=VIRTUAL)
    examples = random_examples("target", 40, lengths=(3, 7, 12, 30))
    optimizer = optax.adam(0.1)
    step = make_train_step(base, method, optimizer, microbatches=2)
    state = init_state(jax.random.key(0), base, method, optimizer)
    plan = dataclasses.replace(
        plan_batches(examples, lead=6, batch_size=8, packing=False, multiple=2), row_buckets=(4, 8)
    )
    Counting.traces.clear()
    counts = []
    for i in range(10):
        size = 8 if i % 3 == 2 else 4
        batch = pack(examples[2 * i : 2 * i + size], plan)
        counts.append(batch.rows.ids.shape[0])
        state, _ = step(state, place_batch(batch, base.mesh))
    assert set(counts) == {4, 8}
    assert len(Counting.traces) == 2
    assert step.func._cache_size() == 2


@pytest.fixture
def captured_constants_raise():
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 1_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2}], ids=["one device", "two devices"])
def test_the_frozen_base_is_no_constant_of_the_program(axes, captured_constants_raise):
    """5 MB of weights: an argument of the step's program; literals, with a warning, of any jit around the step."""
    base = tiny_base(mesh=make_mesh(MeshConfig(**axes)), hidden_size=128, intermediate_size=1024)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(base.params)) > 5_000_000
    examples = random_examples("target", 4)
    optimizer = optax.sgd(0.1)
    plan = plan_batches(examples, lead=6, batch_size=4, **multiples(base.mesh))
    batch = place_batch(pack(examples, plan), base.mesh)
    state = init_state(jax.random.key(0), base, METHOD, optimizer)
    step = make_train_step(base, METHOD, optimizer)
    text = step.func.lower(*step.args, state, batch).as_text()
    assert len(text) < 1_000_000
    with pytest.raises(UserWarning, match="constants were captured"):
        jax.jit(lambda state, batch: step(state, batch)).lower(state, batch)


MESHES = (
    {"data": 4},
    {"fsdp": 4},
    {"tensor": 4},
    {"data": 2, "fsdp": 2},
    {"data": 2, "sequence": 2},
    {"fsdp": 2, "tensor": 2, "sequence": 2},
)


@functools.cache
def on_mesh(kind: str, **axes: int):
    """Loss, the gradient that one step of SGD takes, and how many leaves of the base are split."""
    mesh = make_mesh(MeshConfig(**axes))
    base = base_of("llama", num_key_value_heads=4)
    flat = traverse_util.flatten_dict(base.params)
    flat = {path: jax.device_put(leaf, parameter_sharding(mesh, path, leaf.shape)) for path, leaf in flat.items()}
    model = DecoderModel(traverse_util.unflatten_dict(flat), base.model.module.clone(mesh=mesh))
    base = dataclasses.replace(base, model=model)
    optimizer = optax.sgd(1.0)
    examples = random_examples(kind, 12)
    plan = plan_batches(examples, lead=len(HEAD), batch_size=12, **multiples(mesh, 2))
    state = init_state(jax.random.key(3), base, METHOD, optimizer)
    before = np.array(state.params["tokens"])
    step = make_train_step(base, METHOD, optimizer, OBJECTIVES[kind], microbatches=2)
    state, metrics = step(state, place_batch(pack(examples, plan), mesh))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in flat.values())
    return float(metrics["loss"]), before - np.asarray(state.params["tokens"]), split


@pytest.mark.parametrize(
    ("axes", "kind"), [*[(axes, "choices") for axes in MESHES], ({"fsdp": 2, "tensor": 2}, "target")], ids=str
)
def test_every_mesh_gives_the_same(axes, kind):
    loss, gradient, none = on_mesh(kind)
    ours, slope, split = on_mesh(kind, **axes)
    assert none == 0
    assert bool(split) == bool({"fsdp", "tensor"} & set(axes))
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    worst = same_gradient(slope, gradient)
    print(f"{axes} {kind}: loss {abs(ours / loss - 1):.1e}, gradient {worst:.1e}")


def test_the_program_does_not_grow_with_the_layers():
    """Layers are scanned: 24 of them are the same program as 4, but for the numbers in it, and compile as soon."""
    examples = random_examples("target", 6)
    batch = pack(examples, plan_batches(examples, lead=len(HEAD), batch_size=6))
    optimizer = optax.adam(0.1)
    state = init_state(jax.random.key(0), base_of(), METHOD, optimizer)

    def lowered(layers):
        config = decoder_config(tiny_config("llama", num_hidden_layers=layers))
        model = DecoderModel(parameter_shapes(config), Decoder(config))
        return jax.jit(functools.partial(train_step, METHOD, CrossEntropy(), optimizer)).lower(model, state, batch)

    def compiled(layers):
        """The program, and processor seconds for it."""
        start = time.process_time()
        program = lowered(layers)
        program.compile()
        return program.as_text(), time.process_time() - start

    compiled(3)
    (few, few_seconds), (many, many_seconds) = compiled(4), compiled(24)
    assert abs(len(many) / len(few) - 1) < 0.05
    assert many_seconds < 2 * few_seconds
