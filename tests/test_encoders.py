"""Encoders: how sequences begin and end, what heads read, masks, and the rules that training keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spt_jax
from spt_jax.data.batches import multiples, pack, place_batch, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.examples import Example
from spt_jax.data.sequences import form_of, packing_saves
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.continuations import score_continuations
from spt_jax.evaluation.evaluate import evaluate, make_evaluation_set
from spt_jax.inference.forward import encode_prefix, target_scores
from spt_jax.models.attention import Stream
from spt_jax.prompts import DeepPrompts, PromptTuning
from spt_jax.runtime.mesh_config import MeshConfig
from spt_jax.runtime.sharding import make_mesh
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import CrossEntropy, VerbalizerCrossEntropy
from spt_jax.training.step import init_state, loss_and_gradient, make_train_step

CLASSES = {"a": " the", "b": " question"}
RECORDS = [
    {"text": text, "label": label}
    for text, label in [("who", "a"), ("what of it", "b"), ("where was the answer", "a"), ("a b", "b"), ("no", "b")]
]
HEAD = Template(prompt="<soft:2>{text}", target="{label}", virtual_tokens=2, verbalizers=CLASSES, head="classification")
MASKED = Template(prompt="<soft:1>{text} is<soft:1><mask>.", target="{label}", virtual_tokens=2, verbalizers=CLASSES)


@pytest.fixture(scope="module")
def base():
    return tiny_base("bert")


def pooled(base, pooling):
    """The same base with another pooling."""
    module = base.model.module
    config = dataclasses.replace(module.config, pooling=pooling)
    return dataclasses.replace(base, model=dataclasses.replace(base.model, module=module.clone(config=config)))


def batch_of(base, template, *, packing=True, microbatches=1):
    encoder = encoder_for(base, template)
    examples = encoder.encode_all(RECORDS)
    options = multiples(base.mesh, microbatches)
    plan = plan_batches(examples, lead=encoder.leads(examples), batch_size=len(examples), packing=packing, **options)
    return place_batch(pack(examples, plan), base.mesh)


def test_a_sequence_is_that_of_the_tokenizer(base):
    encoder = encoder_for(base, Template(prompt="{text}", target="{label}", verbalizers=CLASSES, head="classification"))
    for record in RECORDS:
        assert encoder.encode(record, 0).ids.tolist() == base.tokenizer(record["text"])["input_ids"]
    assert encoder.leads(encoder.encode_all(RECORDS)) == 0
    assert len(encoder.fixed_lead()) == 0


@pytest.mark.parametrize(("pooling", "reads"), [("first", 0), ("mean", 0), ("last", 7)])
def test_what_a_class_head_reads(base, pooling, reads):
    """Virtual tokens come after the opening token, unless the template has <bos> further on."""
    own = pooled(base, pooling)
    example = encoder_for(own, HEAD).encode({"text": "abcd", "label": "a"}, 0)
    assert example.ids.tolist()[:3] == [1, 320, 321] and example.ids[-1] == 2
    assert example.reads.tolist() == [reads] and example.pooled == (pooling == "mean")
    later = dataclasses.replace(HEAD, prompt="<soft:2><bos>{text}")
    if pooling == "first":
        assert encoder_for(own, later).encode({"text": "abcd", "label": "a"}, 0).reads.tolist() == [2]


@pytest.mark.parametrize("packing", [True, False])
def test_a_mean_is_that_of_the_real_tokens_of_an_example(base, packing):
    own = pooled(base, "mean")
    method = DeepPrompts(length=3, classes=2)
    virtual = method.materialize(method.init_params(jax.random.key(0), own), own.model)
    tokens = 0.1 * jax.random.normal(jax.random.key(1), (2, 32))
    kernel = jax.random.normal(jax.random.key(2), (32, 2))
    head = dataclasses.replace(virtual.head, kernel=kernel)
    virtual = dataclasses.replace(virtual, tokens=tokens, head=head)
    data = make_evaluation_set(own, encoder_for(own, HEAD, taken=3), RECORDS, packing=packing, taken=3)
    found = evaluate(own, data, virtual).predictions
    prefix = encode_prefix(own.model, virtual, jnp.zeros(0, jnp.int32))
    for record, prediction in zip(RECORDS, found, strict=True):
        ids = np.asarray(encoder_for(own, HEAD).encode(record, 0).ids)
        real = ids < 320
        table = np.concatenate([own.model.embedding_table(), np.asarray(tokens)])
        places = 3 + jnp.arange(len(ids))[None]
        ones = jnp.ones_like(places)
        hidden, _ = own.model.run(jnp.asarray(table[ids][None]), Stream(places, ones, 0 * ones), prefix)
        logits = np.asarray(hidden)[0][real].mean(axis=0) @ np.asarray(kernel)
        expected = logits - np.logaddexp(*logits)
        np.testing.assert_allclose(prediction["log_probabilities"], expected, atol=2e-5)


def test_a_verbalizer_replaces_the_mask(base):
    """Its log-probability is that of the base's logits at the mask, packed or not."""
    encoder = encoder_for(base, MASKED)
    example = encoder.encode(RECORDS[1], 0)
    assert example.ids.tolist().count(3) == 1 and example.ids[example.answer_at] == 3
    method = PromptTuning(length=2)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    table = np.concatenate([base.model.embedding_table(), np.asarray(virtual.tokens)])
    found = []
    for packing in (True, False):
        data = make_evaluation_set(base, encoder, RECORDS, packing=packing)
        found.append([one["log_probabilities"] for one in evaluate(base, data, virtual).predictions])
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    choices = [int(ids[0]) for ids in encoder.choices]
    for record, own in zip(RECORDS, found[0], strict=True):
        example = encoder.encode(record, 0)
        places = jnp.arange(len(example.ids))[None]
        ones = jnp.ones_like(places)
        hidden, _ = base.model.run(jnp.asarray(table[example.ids][None]), Stream(places, ones, 0 * ones))
        logits = np.asarray(jax.nn.log_softmax(base.model.logits(hidden)))[0, example.answer_at]
        np.testing.assert_allclose(own, logits[choices], atol=2e-5)


@pytest.mark.parametrize("over", ["vocabulary", "choices"])
def test_losses_of_masked_verbalizers(base, over):
    """Over the vocabulary, the mean log-probability of the right verbalizer; among the choices, its share of them."""
    encoder = encoder_for(base, MASKED)
    examples = encoder.encode_all(RECORDS)
    if over == "vocabulary":
        examples = [example.as_target() for example in examples]
    plan = plan_batches(examples, lead=0, batch_size=len(examples))
    batch = place_batch(pack(examples, plan), base.mesh)
    method = PromptTuning(length=2)
    params = method.init_params(jax.random.key(0), base)
    objective = CrossEntropy() if over == "vocabulary" else VerbalizerCrossEntropy(choices=2)
    loss, _, _ = loss_and_gradient(method, objective, base.model, params, batch)
    virtual = method.materialize(params, base.model)
    data = make_evaluation_set(base, encoder, RECORDS)
    scores = np.asarray([one["log_probabilities"] for one in evaluate(base, data, virtual).predictions])
    right = [list(CLASSES).index(record["label"]) for record in RECORDS]
    own = scores[np.arange(len(right)), right]
    expected = -own if over == "vocabulary" else np.logaddexp(*scores.T) - own
    np.testing.assert_allclose(float(loss), expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("template", [HEAD, MASKED], ids=["head", "mask"])
def test_packing_and_microbatches_change_nothing(base, template):
    method = DeepPrompts(length=2, classes=2) if template is HEAD else PromptTuning(length=2)
    if template is HEAD:
        template = dataclasses.replace(HEAD, prompt="{text}", virtual_tokens=0)
    params = jax.tree.map(lambda a: a + 0.1, method.init_params(jax.random.key(0), base))
    objective = CrossEntropy() if template.head == "classification" else VerbalizerCrossEntropy(choices=2)
    found = []
    for packing, microbatches in ((True, 1), (False, 1), (False, 2)):
        batch = batch_of(base, template, packing=packing, microbatches=microbatches)
        loss, gradient, _ = loss_and_gradient(method, objective, base.model, params, batch, microbatches)
        found.append((loss, gradient))
    for loss, gradient in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, found[0][1])


def test_a_mesh_changes_nothing():
    """Weights and rows split over devices."""
    losses = []
    for mesh in (None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        base = tiny_base("bert", mesh=mesh)
        method, optimizer = PromptTuning(length=2), optax.sgd(0.1)
        state = init_state(jax.random.key(0), base, method, optimizer)
        step = make_train_step(base, method, optimizer, VerbalizerCrossEntropy(choices=2))
        batch = batch_of(base, MASKED, packing=False)
        for _ in range(2):
            state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    with pytest.raises(ConfigError, match=r"mesh\.sequence > 1 does not work with encoders"):
        tiny_base("bert", mesh=make_mesh(MeshConfig(sequence=2)))


def test_a_saved_prompt_scores_as_before(base, tmp_path):
    method = DeepPrompts(length=2, classes=2)
    template = dataclasses.replace(HEAD, prompt="{text}", virtual_tokens=0)
    virtual = method.materialize(method.init_params(jax.random.key(3), base), base.model)
    kernel = jax.random.normal(jax.random.key(2), (32, 2))
    virtual = dataclasses.replace(virtual, head=dataclasses.replace(virtual.head, kernel=kernel))
    spt_jax.save_prompt(tmp_path / "prompt", base, method, virtual, template)
    saved = spt_jax.load_prompt(tmp_path / "prompt", base)
    one, other = (
        evaluate(base, make_evaluation_set(base, encoder_for(base, template, taken=2), RECORDS, taken=2), own)
        for own in (virtual, saved.virtual)
    )
    assert one.predictions == other.predictions
    other = dataclasses.replace(base.fingerprint, config={**base.fingerprint.config, "pooling": "mean"})
    with pytest.raises(spt_jax.CheckpointError, match="pooling is 'first' here, 'mean' there"):
        spt_jax.load_prompt(tmp_path / "prompt", dataclasses.replace(base, fingerprint=other))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (Template(prompt="{text}", target="{label}"), "generates no text"),
        (dataclasses.replace(MASKED, prompt="<soft>{text}"), "has 0 mask tokens"),
        (dataclasses.replace(MASKED, prompt="<soft><mask>{text}<mask>"), "has 2 mask tokens"),
        (dataclasses.replace(MASKED, verbalizers={"a": " the", "b": "zzqq"}), "one mask stands for one token"),
    ],
)
def test_templates_that_an_encoder_refuses(base, template, message):
    with pytest.raises(ConfigError, match=message):
        encoder_for(base, template)


def test_what_needs_a_causal_base(base):
    with pytest.raises(ConfigError, match="generates no text"):
        spt_jax.generate(base, [np.asarray([1, 5, 6])])
    with pytest.raises(ConfigError, match="depend on what follows"):
        spt_jax.remember(base, "some text")
    bare = dataclasses.replace(base, tokenizer=tiny_base("llama", add_bos=False).tokenizer)
    encoder = encoder_for(bare, dataclasses.replace(HEAD, prompt="{text}", virtual_tokens=0))
    with pytest.raises(ConfigError, match="opening token"):
        encoder.encode(RECORDS[0], 0)


def test_a_base_without_an_output_matrix_trains_a_head():
    base = tiny_base("electra", architectures=["ElectraForPreTraining"])
    assert not base.layout.predicts_tokens and base.layout.head_width == 32 and base.layout.width == 16
    method = DeepPrompts(length=2, classes=2)
    template = dataclasses.replace(HEAD, prompt="{text}", virtual_tokens=0)
    params = method.init_params(jax.random.key(0), base)
    loss, _, _ = loss_and_gradient(method, CrossEntropy(), base.model, params, batch_of(base, template))
    np.testing.assert_allclose(float(loss), np.log(2), rtol=1e-5)
    with pytest.raises(ConfigError, match="has no output matrix; train a task head"):
        target_scores(
            base.model,
            None,
            None,
            batch_of(base, dataclasses.replace(MASKED, virtual_tokens=0, prompt="{text}<mask>")).rows,
        )


def test_text_of_a_record_is_never_a_mask(base):
    encoder = encoder_for(base, MASKED)
    example = encoder.encode({"text": "<mask>", "label": "a"}, 0)
    assert example.ids.tolist().count(3) == 1
    with pytest.raises(DataError, match="no verbalizer"):
        encoder.encode({"text": "x", "label": "c"}, 0)


def test_keys_and_values_of_encoders_have_a_lower_rate(base):
    method = DeepPrompts(length=2, classes=2)
    assert method.recipe_for(base.layout)["learning_rate"] < method.recipe["learning_rate"]
    assert method.recipe_for(tiny_base().layout) == method.recipe


def test_keys_and_values_of_deep_bases_have_a_lower_rate():
    method = DeepPrompts(length=2, classes=2)
    deep = tiny_base(num_hidden_layers=12).layout
    assert method.recipe_for(deep)["learning_rate"] == method.recipe["learning_rate"] / 2


def test_examples_of_nearly_equal_length_are_not_packed(base):
    def of(*lengths):
        return [Example(np.zeros(length, np.int32), np.zeros(length, bool), (), 0, 0) for length in lengths]

    assert packing_saves(of(10, 50, 12), base.layout)
    assert not packing_saves(of(100, 110, 120), base.layout)
    assert packing_saves(of(100, 110, 120), tiny_base().layout)


def test_continuations_of_encoders_have_no_scores(base):
    pair = (np.asarray([5, 6]), np.asarray([7]))
    with pytest.raises(ConfigError, match="causal bases only"):
        score_continuations(base, [pair])


def test_a_tokenizer_that_changes_the_text_is_refused(base):
    def tokenizer(text, *, add_special_tokens):
        return {"input_ids": [1, 9, 2] if add_special_tokens else [8]}

    with pytest.raises(ConfigError, match="other tokens beside its special tokens"):
        form_of(tokenizer, base.layout)
