"""The rules by which a sweep over lengths stops and chooses, against simulations and closed forms."""

import numpy as np
import pytest

from spt_jax.errors import ConfigError
from spt_jax.studies.plateau import Estimate, check_records, estimates, has_plateaued, shortest_of_the_best


def ladder(*means: float, error: float = 0.02) -> list[Estimate]:
    return [Estimate(mean, error) for mean in means]


def test_standard_errors_are_those_of_repeated_experiments():
    """Three seeds and 200 records drawn anew 400 times: the means spread as one experiment's standard error says."""
    rng = np.random.default_rng(0)
    means, errors, covered = [], [], 0
    for _ in range(400):
        hardness = rng.normal(0.0, 0.3, 200)
        settings = [0.6 + rng.normal(0.0, 0.05, (3, 1)) + hardness + rng.normal(0, 0.1, (3, 200)) for _ in range(6)]
        estimate = estimates(settings)[0]
        means.append(estimate.mean)
        errors.append(estimate.standard_error)
        covered += estimate.interval[0] <= 0.6 <= estimate.interval[1]
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    assert 0.91 <= covered / 400 <= 0.98


def test_one_seed_leaves_the_variance_of_records_alone():
    values = np.asarray([[1.0, 0.0, 1.0, 1.0]])
    (estimate,) = estimates([values])
    assert estimate.mean == 0.75 and estimate.standard_error == pytest.approx(values.std(ddof=1) / 2)


def test_the_interval_of_a_share_is_within_0_and_1():
    (estimate,) = estimates([np.asarray([[1.0, 1.0, 1.0, 0.0]])], (0.0, 1.0))
    assert estimate.interval == (pytest.approx(0.75 - 1.959964 * estimate.standard_error), 1.0)
    (estimate,) = estimates([np.asarray([[0.0, 0.0, 0.0, 1.0]])], (0.0, 1.0))
    assert estimate.interval[0] == 0.0


def test_seeds_are_pooled_over_settings():
    """Settings without noise over records: what remains is the seeds' variance, (0.02 + 0) / (1 + 1) over 2 seeds."""
    settings = [np.asarray([[0.5] * 9, [0.7] * 9]), np.full((2, 9), 0.4)]
    assert [own.standard_error for own in estimates(settings)] == pytest.approx([np.sqrt(0.01 / 2)] * 2)


def test_a_plateau_is_lengths_in_a_row_without_an_improvement():
    """Of standard errors of 0.02, so that a difference has one of 0.028."""
    assert not has_plateaued(ladder(0.5, 0.6), 2)
    assert not has_plateaued(ladder(0.5, 0.6, 0.61), 2)
    assert has_plateaued(ladder(0.5, 0.6, 0.61, 0.59), 2)
    assert not has_plateaued(ladder(0.5, 0.6, 0.61, 0.65), 2)
    assert has_plateaued(ladder(0.5, 0.527), 1) and not has_plateaued(ladder(0.5, 0.529), 1)
    assert has_plateaued([Estimate(0.5, 0.03), Estimate(0.549, 0.04)], 1)
    assert not has_plateaued([Estimate(0.5, 0.03), Estimate(0.551, 0.04)], 1)


def test_small_steps_that_add_up_are_an_improvement():
    assert not has_plateaued(ladder(0.50, 0.515, 0.53), 2)


def test_the_shortest_within_one_standard_error_is_taken():
    assert shortest_of_the_best(ladder(0.50, 0.585, 0.60, 0.55)) == 1
    assert shortest_of_the_best(ladder(0.50, 0.579, 0.60, 0.61)) == 2
    assert shortest_of_the_best(ladder(0.7)) == 0


@pytest.mark.parametrize(("resolution", "enough"), [(0.05, 100), (0.02, 625), (0.1, 25)])
def test_too_few_records_are_told_how_many_would_do(resolution: float, enough: int):
    with pytest.raises(ConfigError, match=f"Give at least {enough} records"):
        check_records(enough - 1, resolution)
    check_records(enough, resolution)
    # At worst, half of the answers are right: then this is the standard error of their share.
    assert np.sqrt(0.5 * 0.5 / enough) <= resolution < np.sqrt(0.5 * 0.5 / (enough - 1))


def test_a_resolution_is_a_share():
    with pytest.raises(ConfigError, match="between 0 and 1"):
        check_records(100, 0.0)
