"""The program of a step does not grow with the number of layers, if their kinds repeat."""

import dataclasses
import functools

import pytest

from benchmarks.shapes import lower_step
from spt_jax.bases.config import decoder_config
from spt_jax.testing import tiny_config
from spt_jax.training.cost import StepShape

SHAPE = StepShape(rows=2, length=16, outputs=4, lead=4)
WINDOW, FULL, RECURRENT = "sliding_attention", "full_attention", "linear_attention"
# The layers that repeat, and the most instructions as a multiple of Llama's. Norms of outputs, queries and keys, and a
# second mask and RoPE, are in the one body of Gemma 3. Qwen 3.5 has two bodies, as recurrent layers follow one another.
FAMILIES = {
    "gemma3_text": ([WINDOW] * 5 + [FULL], 1.45),
    "gpt_oss": ([WINDOW, FULL], 1.8),
    "qwen3_5_text": ([RECURRENT] * 3 + [FULL], 3.3),
}


@functools.cache
def instructions(family: str, layers: int, kinds: tuple[str, ...] = ()) -> int:
    """Returns the number of instructions of a step before XLA compiles it."""
    fields = {"layer_types": list(kinds) * (layers // len(kinds))} if kinds else {}
    config = decoder_config(tiny_config(family, num_hidden_layers=layers, **fields))
    return sum(" = " in line for line in lower_step(config, SHAPE, remat="dots").as_text().splitlines())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_repeat_are_compiled_once(family):
    kinds, most = FAMILIES[family]
    found = instructions(family, 24, tuple(kinds))
    assert found == instructions(family, 48, tuple(kinds))
    assert found <= most * instructions("llama", 24)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_a_pattern_costs_hardly_more_than_layers_of_one_kind(family):
    kinds, _ = FAMILIES[family]
    assert instructions(family, 24, tuple(kinds)) <= 1.05 * instructions(family, 24, (FULL,))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3_5_text"])
def test_weights_are_not_stored_for_the_backward_pass(family, remat):
    kinds = FAMILIES.get(family, ([FULL] * 4, 1))[0]
    fields = {"layer_types": kinds * 2} if family in FAMILIES else {}
    config = decoder_config(tiny_config(family, num_hidden_layers=8, intermediate_size=52, **fields))
    shape = dataclasses.replace(SHAPE, rows=3)  # so that no activation has the size of a weight
    lines = lower_step(config, shape, remat=remat).as_text().splitlines()
    weights, stores = f"x{config.width}x52xf32", "stablehlo.dynamic_update_slice"
    assert any(weights in line for line in lines) and any(stores in line for line in lines)
    assert not [line for line in lines if stores in line and weights in line]
