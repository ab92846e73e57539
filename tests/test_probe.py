"""The linear probe: its optimum, and the frozen features that it reads."""

import jax
import jax.numpy as jnp
import numpy as np

import spt_jax
from spt_jax.evaluation.evaluate import evaluate
from spt_jax.studies.probe import features, fit_probe
from spt_jax.testing import tiny_base
from tests.examples import sequence_logits

VERBALIZERS = {"good": "H", "bad": "L", "so": "N"}


def probe_set(base, records):
    template = spt_jax.Template(prompt="{text}\n", target="{label}", verbalizers=VERBALIZERS, head="classification")
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 100)
    return spt_jax.make_evaluation_set(base, encoder, records)


RECORDS = [{"text": f"word {i} " + "and " * (i % 4), "label": list(VERBALIZERS)[i % 3]} for i in range(20)]


def test_the_penalised_loss_has_no_slope_where_the_probe_is():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(60, 5)) * np.asarray([1.0, 10.0, 0.1, 1.0, 1.0]) + 3.0
    labels = rng.integers(0, 3, 60)
    penalty = 0.01
    head = fit_probe(states, labels, 3, penalty).head
    assert head is not None

    def loss(kernel, bias):
        log_probabilities = jax.nn.log_softmax(jnp.asarray(states, jnp.float32) @ kernel + bias[None])
        own = kernel * states.std(axis=0)[:, None]  # the penalty is on weights of standardised features
        return -log_probabilities[jnp.arange(60), labels].mean() + penalty / 2 * jnp.sum(own**2)

    of_kernel, of_bias = jax.grad(loss, (0, 1))(head.kernel, head.bias)
    assert np.abs(of_kernel / states.std(axis=0)[:, None]).max() < 1e-4 and np.abs(of_bias).max() < 1e-4


def test_features_are_the_states_that_the_base_answers_from():
    """The output matrix turns a feature into the logits of the token behind the request."""
    base = tiny_base()
    data = probe_set(base, RECORDS)
    found = features(base, data)
    assert found.shape == (20, base.config.width)
    matrix = np.asarray(base.params["embedding"] if base.config.tied else base.params["output"].T, np.float64)
    tokens = np.zeros((1, base.config.width), np.float32)
    for number in (0, 3, 7):
        expected = sequence_logits(base, tokens, data.examples[number].ids)[-1]
        np.testing.assert_allclose(found[number] @ matrix.T, expected, atol=1e-3)


def test_a_probe_is_asked_as_a_prompt_is():
    base = tiny_base()
    data = probe_set(base, RECORDS)
    states = features(base, data)
    labels = np.asarray([example.label for example in data.examples])
    probe = fit_probe(states, labels, 3, 1e-6)
    result = evaluate(base, data, probe)
    assert result.metrics["accuracy"] == 1.0  # 20 records in 32 dimensions can be told apart
    assert probe.head is not None
    logits = states @ np.asarray(probe.head.kernel) + np.asarray(probe.head.bias)
    expected = (
        logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1)[:, None]
    )
    np.testing.assert_allclose([p["log_probabilities"] for p in result.predictions], expected, atol=2e-3)
