"""docs/from_peft.md has every option of PEFT's soft prompts, and names options that exist here."""

import dataclasses
import re

import peft
import pytest

from spt_jax.prompts import METHODS
from spt_jax.prompts.initializers import Initializer
from tests.markdown import ROOT

PAGE = (ROOT / "docs" / "from_peft.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
CONFIGS = {
    "PromptTuningConfig": "prompt_tuning",
    "PrefixTuningConfig": "prefix_tuning",
    "CartridgeConfig": "prefix_tuning",
    "PromptEncoderConfig": "p_tuning",
    "MultitaskPromptTuningConfig": "multitask_prompt_tuning",
    "AdaptionPromptConfig": "llama_adapter",
    "CPTConfig": "cpt",
}


def rows(section: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", SECTIONS[section], re.MULTILINE)


def fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def test_the_options_that_all_share():
    assert sorted(rows("All configs")) == sorted(fields(peft.PeftConfig))
    assert sorted(rows("All prompts")) == sorted(fields(peft.PromptLearningConfig) - fields(peft.PeftConfig))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_has_a_row(name: str):
    config = getattr(peft, name)
    shared = peft.PromptLearningConfig if issubclass(config, peft.PromptLearningConfig) else peft.PeftConfig
    assert sorted(rows(name)) == sorted(fields(config) - fields(shared))


@pytest.mark.parametrize("name", CONFIGS)
def test_options_that_are_named_exist_here(name: str):
    """A flag of a method is a field of its class or of its initializer."""
    method = METHODS[CONFIGS[name]]
    flags = re.findall(r"--method\.([\w.-]+)", SECTIONS[name])
    assert f"spt_jax.{method.__name__}`" in SECTIONS[name] and flags
    for flag in flags:
        first, _, second = flag.replace("-", "_").partition(".")
        assert first in fields(method)
        assert not second or second in fields(Initializer)


def test_every_soft_prompt_of_peft_has_a_section():
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()
    prompts = {config.__name__ for config in known if issubclass(config, peft.PromptLearningConfig)}
    assert len(prompts) >= 5 and prompts <= {*SECTIONS}
