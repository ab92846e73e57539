"""Trials that cannot be compared are refused before they train."""

from unittest.mock import Mock

import pytest

from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.studies.results import check_comparable
from spt_jax.studies.trials import Prepared, Trial

CLASSES = Template(prompt="{text}", target="{label}", verbalizers={"good": " a", "bad": " b"})
TEXT = Template(prompt="{text}", target="{label}")
PAIRS = Template(prompt="{text}", target="{chosen}", rejected="{rejected}", head="preference")


def checked(*trials: tuple[Template, set[str]]) -> None:
    every = [Mock(Prepared, experiment=Mock(template=own), asked=dict.fromkeys(asked)) for own, asked in trials]
    check_comparable([Mock(Trial, settings={"number": str(number)}) for number in range(len(trials))], every)


def test_trials_of_one_measure_are_compared():
    checked((CLASSES, {"validation"}), (CLASSES, {"validation"}))
    checked((TEXT, {"validation", "test"}), (TEXT, {"test", "validation"}))


@pytest.mark.parametrize("other", [TEXT, PAIRS])
def test_tasks_with_different_measures_are_not(other: Template):
    with pytest.raises(ConfigError, match="number 1 and number 0 are tasks with different ones"):
        checked((CLASSES, {"validation"}), (other, {"validation"}))


@pytest.mark.parametrize("splits", [({"validation"}, {"validation", "test"}), ({"validation", "test"}, {"validation"})])
def test_test_records_of_some_trials_only_are_refused(splits):
    with pytest.raises(ConfigError, match="one of number 1 and number 0 has test records, and the other has none"):
        checked(*((TEXT, own) for own in splits))
