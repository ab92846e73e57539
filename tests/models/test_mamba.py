"""Options of Mamba-2, against a loop over tokens in float64."""

import dataclasses

import pytest

from spt_jax.errors import ConfigError
from tests.recurrent_layers import MAMBA, random_params, run, token_by_token
from tests.recurrent_rows import hidden, same, same_state, state_of, whole_rows


@pytest.mark.parametrize(
    "changes",
    [
        {"convolution_width": 2},
        {"groups": 4, "norm": "gate_last"},
        {"groups": 1, "norm": "none"},
        {"convolution_bias": False, "input_bias": False, "output_bias": False},
    ],
    ids=str,
)
def test_other_options(changes):
    config = dataclasses.replace(MAMBA, **changes)
    params, state, x = random_params(config), state_of(config, seed=3), hidden(1, 9)
    y, after = run(config, params, x, whole_rows(1, 9), state, chunk=4)
    expected, end = token_by_token(config, params, x[0], state)
    same(y[0], expected)
    same_state(after, end, 0)


def test_what_a_config_refuses():
    for changes, message in [
        ({"groups": 3}, "4 heads cannot be divided into 3 equal groups"),
        ({"convolution_width": 1}, "convolution_width is 1; it must be at least 2"),
        ({"state_size": 0}, "state_size is 0; it must be at least 1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0; it must be finite and above 0"),
        ({"part_scales": (1.0, 1.0)}, "part_scales are 2 numbers; they must be 5"),
        ({"part_scales": (1.0, 1.0, float("inf"), 1.0, 1.0)}, "it must be finite and above 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(MAMBA, **changes)
