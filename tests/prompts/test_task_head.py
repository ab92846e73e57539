"""Heads of methods with virtual tokens: trained, saved, read and refused."""

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import ConfigError
from spt_jax.experiment.config import BaseConfig, DataConfig, ExperimentConfig, TaskConfig, make_template, resolve
from spt_jax.prompts import PromptTuning, PTuning
from spt_jax.testing import tiny_base

CLASSES = {"good": "good", "bad": "bad"}
RECORDS = [{"text": f"{word} {label}", "label": label} for label in CLASSES for word in ("the", "of", "and", "world")]
TEMPLATE = spt_jax.Template(prompt="<soft>{text}", target="{label}", verbalizers=CLASSES, head="classification")
OPTIONS = {"batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def base():
    return tiny_base("bert")


@pytest.mark.parametrize("method", [PromptTuning(length=3), PTuning(length=3, hidden=8)], ids=lambda own: own.name)
def test_rows_and_head_are_trained_and_saved(base, method, tmp_path):
    """The loss falls from that of equal classes, both parts move, and the saved prompt predicts the same."""
    result = spt_jax.fit(base, method, TEMPLATE, RECORDS, steps=40, **OPTIONS)
    virtual, start = result.prompt.virtual, method.materialize(method.init_params(jax.random.key(0), base), base.model)
    assert np.abs(virtual.head.kernel).max() > 0 and np.abs(virtual.tokens - start.tokens).max() > 0
    assert result.prompt.evaluate(RECORDS).metrics["loss"] < np.log(2) - 0.005
    result.prompt.save(tmp_path / "prompt")
    loaded = spt_jax.load_prompt(tmp_path / "prompt", base)
    texts = [record["text"] for record in RECORDS]
    assert loaded.classify(texts) == result.prompt.classify(texts)
    np.testing.assert_array_equal(loaded.virtual.head.kernel, virtual.head.kernel)


def test_a_head_of_a_decoder(tmp_path):
    """It reads the last token, and a head for tags the words."""
    base = tiny_base("llama")
    result = spt_jax.fit(base, PromptTuning(length=2), TEMPLATE, RECORDS, steps=2, **OPTIONS)
    assert set(result.prompt.classify(["the text"])) <= set(CLASSES)
    template = spt_jax.Template(prompt="<soft>{words}", target="{tags}", head="tagging", reads="words")
    records = [{"words": ["a", "the"], "tags": ["x", "y"]}, {"words": ["of"], "tags": ["x"]}]
    tagged = spt_jax.fit(base, PromptTuning(length=2), template, records, steps=2, **OPTIONS | {"batch_size": 2})
    assert tagged.prompt.virtual.head.kernel.shape == (32, 2)


def resolved(method, **task):
    data = DataConfig(train="t.jsonl", prompt="<soft>{text}", target="{label}", verbalizers=CLASSES)
    return resolve(ExperimentConfig(base=BaseConfig(path=""), data=data, method=method, task=TaskConfig(**task)))


def test_the_task_says_whether_there_is_a_head():
    plain, headed = resolved(PromptTuning()), resolved(PromptTuning(), name="classification")
    assert plain.method.spec(tiny_layout()).head is None and make_template(plain).head == "language_model"
    assert (headed.method.head, headed.method.classes) == ("classification", 2)
    assert make_template(headed).head == "classification"
    assert resolved(PromptTuning(head="classification")).method == headed.method
    with pytest.raises(ConfigError, match=r"method\.head=classification differ"):
        resolved(PromptTuning(head="classification"), name="tagging")
    with pytest.raises(ConfigError, match=r"method\.classes is 2, but language_model has no head"):
        resolved(PromptTuning(classes=2))
    with pytest.raises(
        ConfigError, match="low_rank_prompt_tuning has none; methods with a head: prompt_tuning, p_tuning"
    ):
        resolved(spt_jax.prompts.LowRankPromptTuning(), name="classification")
    with pytest.raises(ConfigError, match="classes is 1; a head needs at least 2"):
        PTuning(classes=1)
    with pytest.raises(ConfigError, match=r"method\.head is 'clasification'; did you mean 'classification'"):
        PromptTuning(head="clasification")


def tiny_layout():
    return tiny_base("bert").layout
