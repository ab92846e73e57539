"""What a sweep's `--over` and `--trials` stand for."""

import math

import pytest

from spt_jax.errors import ConfigError
from spt_jax.experiment.config_files import load_config_file
from spt_jax.studies.settings import Range, flag_words, parse_field, settings
from tests.jobs import ROOT

CONFIG = load_config_file(ROOT / "configs" / "local_files.py")


def field(text: str):
    return parse_field(text, CONFIG)


def test_values_and_ranges():
    assert field("train.batch_size=8,16") == ("train.batch_size", ["8", "16"])
    assert field("--train.batch-size=8") == ("train.batch_size", ["8"])
    assert field(r"data.prompt=<soft>{text}\, please,<soft>{text}") == (
        "data.prompt",
        ["<soft>{text}, please", "<soft>{text}"],
    )
    assert field("optimizer.learning_rate=1e-3..0.5:log") == ("optimizer.learning_rate", Range(1e-3, 0.5, False, True))
    assert field("train.batch_size=8..32") == ("train.batch_size", Range(8.0, 32.0, True, False))
    assert field("method.init.name=vocabulary,normal")[0] == "method.init.name"
    assert (
        field("method.reparameterization=none")[0] == "method.reparameterization"
    )  # another method's than the config's


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lerning_rate=0.1", "did you mean 'optimizer.learning_rate'"),
        ("learning_rate", "neither FIELD=VALUE"),
        ("train.batch_size=", "neither FIELD=VALUE"),
        ("train.batch_size=8,8", "occurs twice"),
        ("train.batch_size=8,,16", "is empty"),
        ("optimizer.learning_rate=0.5..0.1", "LOW must be less than HIGH"),
        ("optimizer.learning_rate=0..0.1:log", "greater than 0"),
    ],
)
def test_wrong_fields_say_what_is_wrong(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        field(text)


def test_a_grid_is_every_combination():
    grid = settings([("a", ["1", "2"]), ("b", ["x", "y", "z"])], None, 0)
    assert len(grid) == 6 and grid[:2] == [{"a": "1", "b": "x"}, {"a": "1", "b": "y"}]
    assert settings([], None, 0) == [{}]


def test_draws_lie_in_their_ranges_and_follow_from_their_seed():
    fields = [field("optimizer.learning_rate=0.001..1:log"), field("train.batch_size=8..16"), ("c", ["x", "y"])]
    drawn = settings(fields, 200, 0)
    assert drawn == settings(fields, 200, 0) != settings(fields, 200, 1)
    rates = [math.log10(float(own["optimizer.learning_rate"])) for own in drawn]
    assert -3 <= min(rates) < -2.8 and -0.2 < max(rates) <= 0
    assert sum(rates) / len(rates) == pytest.approx(-1.5, abs=0.2)
    assert {int(own["train.batch_size"]) for own in drawn} == set(range(8, 17))
    assert {own["c"] for own in drawn} == {"x", "y"}
    assert len({tuple(own.values()) for own in drawn}) == 200


@pytest.mark.parametrize(
    ("fields", "trials", "message"),
    [
        ([("a", ["1"]), ("a", ["2"])], None, "twice"),
        ([("a", Range(0.0, 1.0, False, False))], None, "--trials"),
        ([("a", ["1", "2"])], 3, "does not have 3 different settings"),
        ([("a", ["1"])], 0, "at least 1"),
        ([], 4, "at least 1"),
    ],
)
def test_searches_that_cannot_be(fields, trials, message: str):
    with pytest.raises(ConfigError, match=message):
        settings(fields, trials, 0)


def test_values_become_the_words_of_their_flags():
    assert flag_words("train.batch_size", "8", CONFIG) == ["--train.batch-size", "8"]
    assert flag_words("data.packing", "False", CONFIG) == ["--data.no-packing"]
    assert flag_words("data.chat", "True", CONFIG) == ["--data.chat"]
    assert flag_words("data.verbalizers", "good=H bad=L", CONFIG) == ["--data.verbalizers", "good=H", "bad=L"]
    assert flag_words("loss.class_weights", "1 2", CONFIG) == ["--loss.class-weights", "1", "2"]
    assert flag_words("data.prompt", "<soft>{text} is", CONFIG) == ["--data.prompt", "<soft>{text} is"]
    with pytest.raises(ConfigError, match="must be True or False"):
        flag_words("data.packing", "no", CONFIG)
