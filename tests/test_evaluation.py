"""Scores against a forward pass of each continuation alone, metrics against closed forms."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
from spt_jax.evaluation.evaluate import EvaluationConfig, make_evaluation_set, score, selection_score
from spt_jax.inference.forward import embed_stream
from spt_jax.models.attention import Stream
from spt_jax.testing import EOS_ID, PAD_ID, tiny_base
from tests.rigged import letter_ids, speaker

RECORDS = [
    {"text": "good", "label": "yes"},
    {"text": "the question is bad", "label": "no"},
    {"text": "Hello world", "label": "yes"},
    {"text": "spam spam spam spam", "label": "no"},
    {"text": "the", "label": "no"},
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request):
    return tiny_base(request.param)


@pytest.fixture(scope="module")
def virtual(base):
    method = spt_jax.PromptTuning(length=3)
    return method.materialize(method.init_params(jax.random.key(0), base), base.model)


def encoder(base, prompt="<soft>{text}\n", verbalizers=None, **options):
    options.setdefault("virtual_tokens", 3 if "<soft>" in prompt else 0)
    template = spt_jax.Template(prompt=prompt, target="{label}", verbalizers=verbalizers or {}, **options)
    return spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 128)


@jax.jit
def _logits(model, virtual, ids, length):
    """Of one sequence [T]; padding from `length` on is in no segment."""
    places = jnp.arange(ids.shape[0])[None]
    rows = Stream(places, (places < length).astype(jnp.int32), jnp.zeros_like(places))
    hidden, _ = model.run(embed_stream(model, virtual, ids[None], rows), rows)
    return model.logits(hidden[0])


def log_probability(base, virtual, ids, start) -> float:
    """Of ids[start:] after ids[:start], by one plain forward pass of the whole sequence."""
    padded = jnp.asarray(np.pad(ids, (0, 64 - len(ids)), constant_values=PAD_ID))
    table = np.asarray(jax.nn.log_softmax(_logits(base.model, virtual, padded, len(ids))))
    return float(sum(table[t - 1, int(ids[t])] for t in range(start, len(ids))))


@pytest.mark.parametrize("packing", [True, False])
def test_verbalizer_scores_are_those_of_each_continuation_alone(base, virtual, packing):
    verbalizers = {"yes": "positive answer", "no": "bad", "maybe": "positive question"}
    enc = encoder(base, verbalizers=verbalizers)
    data = make_evaluation_set(base, enc, RECORDS, packing=packing)
    scores = score(base, data, virtual)
    for number, example in enumerate(data.examples):
        for choice, ids in enumerate(example.choices):
            alone = log_probability(base, virtual, np.concatenate([example.ids, ids]), len(example.ids))
            assert scores[number, choice] == pytest.approx(alone, rel=1e-4)


def test_perplexity_is_that_of_the_targets(base, virtual):
    data = make_evaluation_set(base, encoder(base), RECORDS)
    result = spt_jax.evaluate(base, data, virtual, generated=False).metrics
    alone = [log_probability(base, virtual, e.ids, e.first_target) for e in data.examples]
    tokens = sum(int(e.predicted.sum()) for e in data.examples)
    assert result["perplexity"] == pytest.approx(np.exp(-sum(alone) / tokens), rel=1e-4)


def test_classification_metrics_follow_from_the_predictions(base, virtual):
    data = make_evaluation_set(base, encoder(base, verbalizers={"yes": "good", "no": "bad bad bad"}), RECORDS)
    result = spt_jax.evaluate(base, data, virtual)
    right = [p["label"] == p["prediction"] for p in result.predictions]
    assert [p["label"] for p in result.predictions] == [r["label"] for r in RECORDS]
    assert result.metrics["accuracy"] == np.mean(right)
    low, high = result.metrics["accuracy_interval"]
    assert low <= result.metrics["accuracy"] <= high
    scores = np.asarray([p["log_probabilities"] for p in result.predictions])
    lengths = np.asarray([len(choice) for choice in data.examples[0].choices])
    labels = np.asarray([e.label for e in data.examples])
    normalized = ((scores / lengths[None]).argmax(1) == labels).mean()
    assert result.metrics["accuracy_normalized"] == pytest.approx(normalized)
    losses = np.log(np.exp(scores).sum(1)) - scores[np.arange(5), labels]
    assert result.metrics["loss"] == pytest.approx(losses.mean(), rel=1e-3)


def test_generated_answers_are_compared_with_the_targets(base):
    """A base asked for what it says anyway is always right."""
    enc = encoder(base, "{text}")
    prompts = [enc.prompt_ids(record) for record in RECORDS]
    said = spt_jax.generate(base, prompts, sampling=spt_jax.SamplingConfig(max_new_tokens=6))
    records = [{**record, "label": answer.text} for record, answer in zip(RECORDS, said, strict=True)]
    config = EvaluationConfig(max_new_tokens=6)
    result = spt_jax.evaluate(base, make_evaluation_set(base, enc, records, config), None).metrics
    assert result["exact_match"] == 1.0 and result["token_f1"] == 1.0


def answers(base, encoder, records, virtual=None, **config):
    data = make_evaluation_set(base, encoder, records, EvaluationConfig(**config))
    return data, spt_jax.evaluate(base, data, virtual)


def test_an_answer_depends_on_its_own_record(base, virtual):
    """A record that leaves little room is answered in what it leaves, and the others as without it."""
    long = {"text": "x" * 110, "label": "yes"}
    _, alone = answers(base, encoder(base), RECORDS, virtual, max_new_tokens=20)
    data, together = answers(base, encoder(base), [*RECORDS, long], virtual, max_new_tokens=20)
    for one, other in zip(together.predictions, alone.predictions, strict=False):
        assert one["prediction"] == other["prediction"]
    left = base.config.max_positions - len(data.prompts[-1])
    assert 0 < left < 20
    (own,) = spt_jax.generate(base, [data.prompts[-1]], virtual, spt_jax.SamplingConfig(max_new_tokens=left))
    assert together.predictions[-1]["prediction"] == own.text.strip()


def test_what_is_shortened_in_training_is_shortened_when_asked(base, virtual):
    """With room for new tokens; what fits is asked as it was trained."""
    records = [*RECORDS, {"text": "word " * 100 + "END", "label": "yes"}]
    enc = encoder(base, truncate="text", keep="end")
    data, result = answers(base, enc, records, virtual, max_new_tokens=20)
    for prompt, example in zip(data.prompts[:-1], data.examples, strict=False):
        np.testing.assert_array_equal(prompt, example.ids[: example.first_target])
    last = data.prompts[-1]
    assert 128 - 20 - 5 < len(last) <= 128 - 20
    assert base.tokenizer.decode(last[-5:]).endswith("END\n")
    assert result.metrics["generated"] == len(records)
    # Asked for more than half of all positions, the field keeps half of them.
    data, _ = answers(base, enc, records[-1:], virtual, max_new_tokens=120)
    assert 128 // 2 - 5 < len(data.prompts[0]) <= 128 // 2
    short = spt_jax.Encoder(enc.template, base.tokenizer, base.config.vocab_size, 50)
    data, _ = answers(base, short, records[-1:], virtual, max_new_tokens=20)
    assert 44 < len(data.prompts[0]) < 50, "the positions beyond the longest example are room enough"


def test_a_turn_that_ends_in_training_ends_in_evaluation():
    """The token that ends a turn is neither EOS nor declared by the base."""
    turns = (
        "{% for m in messages %}{{ m.role + '\n' + m.content + '<pad>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    newline, first, second = letter_ids("Ċyz")
    rigged = speaker({newline: first, first: second, second: PAD_ID, PAD_ID: second})
    tokenizer = copy.deepcopy(rigged.tokenizer)
    tokenizer.chat_template = turns
    rigged = dataclasses.replace(rigged, tokenizer=tokenizer)
    for template, record in (
        (spt_jax.Template(prompt="{text}", target="{label}", chat=True), {"text": "a", "label": "yz"}),
        (
            spt_jax.Template(prompt="{messages}"),
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yz"}]},
        ),
    ):
        enc = spt_jax.Encoder(template, tokenizer, rigged.config.vocab_size, 128)
        assert set(enc.end_ids) == {PAD_ID, EOS_ID}
        _, result = answers(rigged, enc, [record], max_new_tokens=9)
        assert result.metrics["exact_match"] == 1.0 and result.predictions[0]["prediction"] == "yz"


def test_a_chat_is_asked_for_its_last_answer(base):
    """Turns after it are left out: they are not what the model should say."""
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    named = dataclasses.replace(base, tokenizer=tokenizer)
    messages = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    enc = spt_jax.Encoder(spt_jax.Template(prompt="{messages}"), tokenizer, base.config.vocab_size, 128)
    data, result = answers(named, enc, [{"messages": messages}, {"messages": messages[:2]}], max_new_tokens=3)
    np.testing.assert_array_equal(*data.prompts)
    assert [prediction["reference"] for prediction in result.predictions] == ["a", "a"]


def test_selection_prefers_accuracy_then_loss():
    def of(accuracy, loss):
        return selection_score({"accuracy": accuracy, "loss": loss, "examples": 100})

    assert of(0.51, 9.0) > of(0.50, 0.0) > of(0.50, 1.0)
    assert selection_score({"loss": 1.0}) > selection_score({"loss": 2.0})
