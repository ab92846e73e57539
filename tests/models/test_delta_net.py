"""Options of Gated DeltaNet, against a loop over tokens in float64."""

import dataclasses

import pytest

from spt_jax.errors import ConfigError
from spt_jax.models.layout import StateGroup
from tests.recurrent_layers import DELTA_NET, random_params, run, token_by_token
from tests.recurrent_rows import hidden, same, same_state, state_of, whole_rows


@pytest.mark.parametrize(
    "changes", [{"convolution_width": 2}, {"key_heads": 4}, {"key_heads": 1, "key_size": 1}], ids=str
)
def test_other_shapes(changes):
    config = dataclasses.replace(DELTA_NET, **changes)
    params, state, x = random_params(config), state_of(config, seed=3), hidden(1, 9)
    y, after = run(config, params, x, whole_rows(1, 9), state)
    expected, end = token_by_token(config, params, x[0], state)
    same(y[0], expected)
    same_state(after, end, 0)


def test_what_a_config_refuses():
    for changes, message in [
        ({"key_heads": 3}, "4 value heads cannot share 3 key heads evenly"),
        ({"convolution_width": 1}, "convolution_width is 1; it must be at least 2"),
        ({"value_size": 0}, "value_size is 0; it must be at least 1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0; it must be a finite number above 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(DELTA_NET, **changes)


def test_the_shapes_of_the_state():
    group = StateGroup((0, 1, 2), DELTA_NET.state_shapes)
    assert dict(group.shapes) == {"convolution": (3, 2 * 12 + 20), "recurrent": (4, 6, 5)}
