"""A prompt with its base classifies, generates, scores, saves and loads, and is the functions below it."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pandas
import pytest

import spt_jax
from spt_jax.api.prompt import Prompt
from spt_jax.data.encoder import encoder_for
from spt_jax.errors import CheckpointError, ConfigError, DataError, RemoteError
from spt_jax.evaluation.evaluate import score
from spt_jax.prompts.names import prompt_directory
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from tests.examples import sequence_score

CLASSES = {"good": "H", "bad": "LL", "so so": "N"}
TEXTS = ["a nice day", "awful", "all so very sad"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> spt_jax.FrozenBase:
    return spt_jax.load_base(write_tiny_checkpoint(tmp_path_factory.mktemp("base"), "llama"))


def make_prompt(base: spt_jax.FrozenBase, folder: Path, method: spt_jax.Method | None = None, **template) -> Prompt:
    """An untrained prompt, saved and loaded."""
    method = method or spt_jax.PromptTuning(length=4, init=spt_jax.init.normal())
    fields = {"prompt": "<soft>{text}\nIt is", "target": " {label}", "virtual_tokens": method.token_count, **template}
    params = method.init_params(jax.random.key(3), base)
    virtual = method.materialize(params, base.model)
    spt_jax.save_prompt(folder, base, method, virtual, spt_jax.Template(**fields), extra={"seed": 3})
    return spt_jax.load_prompt(folder, base)


@pytest.fixture(scope="module")
def classifier(base, tmp_path_factory) -> Prompt:
    return make_prompt(base, tmp_path_factory.mktemp("prompts") / "classes", verbalizers=CLASSES)


@pytest.fixture(scope="module")
def generator(base, tmp_path_factory) -> Prompt:
    return make_prompt(base, tmp_path_factory.mktemp("prompts") / "text")


def expected_scores(prompt: Prompt, answers, *, ends: bool) -> np.ndarray:
    """Log-probabilities of the answers after the texts, one sequence at a time."""
    encoder = encoder_for(prompt.base, dataclasses.replace(prompt.template, verbalizers={}))
    found = []
    for text in TEXTS:
        for answer in answers:
            example = encoder.encode({"text": text, "label": answer}, 0)
            ids, predicted = (example.ids, example.predicted) if ends else (example.ids[:-1], example.predicted[:-1])
            found.append(sequence_score(prompt.base, prompt.virtual.tokens, ids, predicted)[0])
    return np.asarray(found).reshape(len(TEXTS), len(answers))


def test_classes_are_scored_as_each_sequence_alone(classifier):
    found = classifier.score(TEXTS)
    assert [list(row) for row in found] == [list(CLASSES)] * 3
    expected = expected_scores(classifier, list(CLASSES.values()), ends=False)
    np.testing.assert_allclose([list(row.values()) for row in found], expected, atol=1e-4)
    classes = [list(CLASSES)[int(row.argmax())] for row in expected]
    assert classifier.classify(TEXTS) == classifier.predict(TEXTS) == classes
    assert classifier.classify(pandas.DataFrame({"text": TEXTS, "other": [1, 2, 3]})) == classes
    assert classifier.classify(text for text in TEXTS[:1]) == classes[:1]
    assert classifier.classify([]) == classifier.score([]) == []


def test_it_predicts_what_the_evaluation_predicts(base, classifier):
    records = [{"text": text, "label": "bad"} for text in TEXTS]
    evaluation = classifier.evaluate(records)
    assert [prediction["prediction"] for prediction in evaluation.predictions] == classifier.classify(TEXTS)
    data = spt_jax.make_evaluation_set(base, encoder_for(base, classifier.template), records)
    assert evaluation == spt_jax.evaluate(base, data, classifier.virtual)
    np.testing.assert_allclose(
        [list(row.values()) for row in classifier.score(records)], score(base, data, classifier.virtual), atol=1e-4
    )
    with pytest.raises(DataError, match="records: record 1 has no field 'label'"):
        classifier.evaluate([{"text": "nice"}])


def test_texts_of_other_lengths_use_the_same_program(classifier):
    from spt_jax.evaluation.evaluate import _batch_scores

    classifier.classify(["a"])
    before = _batch_scores._cache_size()
    for text in ("", "bb", "c" * 12):
        classifier.classify([text])
    assert _batch_scores._cache_size() == before


def test_answers_are_scored_as_each_sequence_alone(generator):
    answers = ["yes", "no, never", "H"]
    found = generator.score(TEXTS, answers)
    assert [list(row) for row in found] == [answers] * 3
    np.testing.assert_allclose(
        [list(row.values()) for row in found], expected_scores(generator, answers, ends=True), atol=1e-4
    )


def test_it_generates_what_the_function_generates(base, generator):
    encoder = encoder_for(base, generator.template)
    ids = [encoder.prompt_ids({"text": text}) for text in TEXTS]
    sampling = spt_jax.SamplingConfig(max_new_tokens=5, end_ids=encoder.end_ids)
    expected = [answer.text for answer in spt_jax.generate(base, ids, generator.virtual, sampling)]
    assert generator.generate(TEXTS, max_new_tokens=5) == expected
    assert generator.generate(TEXTS, spt_jax.SamplingConfig(max_new_tokens=5)) == expected
    assert generator.generate([{"text": text} for text in TEXTS], max_new_tokens=5) == expected
    assert generator.generate([]) == []


def test_the_base_generates_after_texts(base):
    sampling = spt_jax.SamplingConfig(max_new_tokens=4)
    ids = [np.asarray(base.tokenizer.encode(text), np.int32) for text in TEXTS]
    assert ids[0][0] == base.tokenizer.bos_token_id
    expected = spt_jax.generate(base, ids, None, sampling)
    assert spt_jax.generate(base, TEXTS, None, sampling) == expected
    with pytest.raises(ConfigError, match=r"prompts is one text \('a nice day'\); give a list of texts"):
        spt_jax.generate(base, TEXTS[0])


def test_texts_do_not_place_virtual_tokens(base, generator):
    with pytest.raises(ConfigError, match="texts do not say where the virtual tokens go"):
        spt_jax.generate(base, TEXTS, generator.virtual)


def test_a_tagging_head_predicts_a_tag_per_word(base, tmp_path):
    method = spt_jax.DeepPrompts(head="tagging", length=3, classes=2)
    fields = {"prompt": "{text}", "target": "{tags}", "verbalizers": {"A": "A", "B": "B"}, "reads": "text"}
    tagger = make_prompt(base, tmp_path / "tags", method, **fields, head="tagging")
    tags = tagger.predict(["one two three", "four"])
    assert [len(own) for own in tags] == [3, 1] and {tag for own in tags for tag in own} <= {"A", "B"}
    with pytest.raises(ConfigError, match="its task is tagging; use `predict`"):
        tagger.classify(["one"])
    with pytest.raises(ConfigError, match="the task tagging has no score per input"):
        tagger.score(["one"])
    with pytest.raises(ConfigError, match="does not generate text: its task is tagging; use `predict`"):
        tagger.generate(["one"])


def test_methods_that_do_not_fit_the_task_say_which_one_does(classifier, generator):
    with pytest.raises(ConfigError, match="does not generate text: its task is classification; use `classify`"):
        classifier.generate(TEXTS)
    with pytest.raises(ConfigError, match="its task is language_model; use `generate`"):
        generator.classify(TEXTS)
    with pytest.raises(ConfigError, match="predicts no classes; use `generate` or `score`"):
        generator.predict(TEXTS)
    with pytest.raises(ConfigError, match="a classifier scores its classes"):
        classifier.score(TEXTS, ["yes"])
    with pytest.raises(ConfigError, match="give a list of the answers"):
        generator.score(TEXTS)


def test_inputs_are_refused_with_the_way(base, classifier, generator, tmp_path):
    with pytest.raises(DataError, match=r"inputs is one text \('awful'\); give a list of texts"):
        classifier.classify("awful")
    with pytest.raises(DataError, match="inputs: a mapping with the keys 'text'"):
        classifier.classify({"text": "awful"})
    with pytest.raises(DataError, match=r"inputs: record 2 is int \(3\)"):
        classifier.classify([{"text": "awful"}, 3])
    with pytest.raises(DataError, match="record 1: no field 'text'; did you mean 'texts'"):
        generator.generate([{"texts": "awful"}])
    two = make_prompt(base, tmp_path / "two", prompt="<soft>{text} or {other}")
    with pytest.raises(ConfigError, match="the template has the fields text, other; give them by name"):
        two.generate(TEXTS)
    fixed = make_prompt(base, tmp_path / "fixed", target="{one} {two}")
    with pytest.raises(ConfigError, match="answers take the place of its field; it needs exactly one"):
        fixed.score(TEXTS, ["yes"])


def test_a_record_that_is_too_long_to_answer_is_named(base, generator):
    most = base.layout.max_positions
    message = rf"record 2: its [\d,]+ tokens and max_new_tokens=3 need more than the {most} positions of"
    with pytest.raises(DataError, match=message):
        generator.generate(["a", "x" * 10 * most], max_new_tokens=3)


def test_it_is_saved_and_loaded_with_its_base(classifier, tmp_path):
    directory = classifier.save(tmp_path / "saved")
    again = spt_jax.load_prompt(str(directory), progress=False)
    assert again.base.fingerprint == classifier.base.fingerprint and again.template == classifier.template
    assert again.info == classifier.info and again.info["extra"] == {"seed": 3}
    assert again.classify(TEXTS) == classifier.classify(TEXTS)
    elsewhere = spt_jax.load_prompt(directory, again.base.name)
    assert elsewhere.base.fingerprint == classifier.base.fingerprint


def test_a_missing_or_another_base_is_named(base, classifier, tmp_path):
    directory = classifier.save(tmp_path / "saved")
    info = json.loads((directory / "prompt.json").read_text())
    info["base"]["id"] = "/nowhere/model"
    (directory / "prompt.json").write_text(json.dumps(info))
    with pytest.raises(
        CheckpointError, match=rf"/nowhere/model.*If the base of {directory} is elsewhere, give it as base="
    ):
        spt_jax.load_prompt(directory)
    with pytest.raises(CheckpointError, match="/not/there") as error:
        spt_jax.load_prompt(directory, "/not/there")
    assert "give it as base=" not in str(error.value)
    other = tiny_base(seed=1)
    with pytest.raises(CheckpointError, match="trained on another base"):
        spt_jax.load_prompt(directory, other)
    with pytest.warns(UserWarning, match="Using it anyway"):
        forced = spt_jax.load_prompt(directory, other, force=True)
    with pytest.raises(CheckpointError, match="is used with another base, which would be recorded as its own"):
        forced.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_hub_id_is_downloaded_only_if_there_is_no_such_directory(base, classifier, tmp_path, monkeypatch):
    directory = classifier.save(tmp_path / "ann" / "topics")
    asked = []

    def download(name, *, revision, **_):
        asked.append((name, revision))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("ann/topics", "hf://ann/topics@v1"):
        loaded = spt_jax.load_prompt(name, base)
        np.testing.assert_array_equal(loaded.virtual.tokens, classifier.virtual.tokens)
    assert asked == [("ann/topics", None), ("ann/topics", "v1")]
    monkeypatch.chdir(tmp_path)
    spt_jax.load_prompt("ann/topics", base)
    assert len(asked) == 2
    for name in ("topics", "./ann/topic", "a/b/c", Path("ann/other")):
        assert prompt_directory(name) == Path(name)
    with pytest.raises(CheckpointError, match="topics"):
        spt_jax.load_prompt("topics", base)


def test_what_the_hub_does_not_have_is_named(base, monkeypatch):
    def download(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(RemoteError, match=r"no directory 'ann/topics' here, and the hub cannot be reached.*no network"):
        spt_jax.load_prompt("ann/topics", base)
