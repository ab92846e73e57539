"""Prompts that version 0.1 saved answer as they did, and training goes the way it went.

The numbers were recorded on one processor; others round otherwise, so they are compared to a tolerance.
"""

import functools

import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import FrozenBase
from spt_jax.testing import tiny_base
from tests.golden import methods

RECORDED = safetensors.numpy.load_file(methods.NUMBERS)
FOLDERS = sorted(folder for family in methods.PROMPTS.iterdir() for folder in family.iterdir())


@functools.cache
def base_of(family: str) -> FrozenBase:
    return tiny_base(family)


def same(numbers: dict[str, np.ndarray], prefix: str, kinds: tuple[str, ...]) -> None:
    recorded = {key.removeprefix(prefix): value for key, value in RECORDED.items() if key.startswith(prefix)}
    recorded = {key: value for key, value in recorded.items() if key.startswith(kinds)}
    assert set(numbers) == set(recorded)
    for name, value in recorded.items():
        np.testing.assert_allclose(numbers[name], value, rtol=1e-4, atol=1e-4 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_prompt_of_version_0_1_loads_and_answers_the_same(folder):
    family = folder.parent.name
    same(methods.answers(folder, base_of(family)), f"{family}/{folder.name}/", ("scores", "ids", "log_probabilities"))


@pytest.mark.parametrize("name", methods.NAMES)
def test_five_steps_of_training_are_the_same(name):
    numbers, _ = methods.trained(name, base_of("llama"))
    same(numbers, f"llama/{name}/", ("metrics", "params"))
