"""`check_model` accepts every family, and names the rule that a model breaks."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from spt_jax.bases.families import FAMILIES
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.testing import check_model, tiny_base, tiny_config
from tests.golden.cases import CASES


def switches(config: object) -> set[tuple]:
    """The fields of a config, and of the configs in it, that have another value than the default."""
    found = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for own in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(own):
                found |= switches(own)
        if field.default is not dataclasses.MISSING and value != field.default:
            found.add((type(config).__name__, field.name, value if isinstance(value, str) else None))
    return found


def every_switch() -> list[str]:
    """A few families whose configs have among them every switch that a family has; parity has every family."""
    configs = {name: FAMILIES[name].config(tiny_config(name), None) for name in FAMILIES}
    left, chosen = set().union(*map(switches, configs.values())), []
    while left:
        chosen.append(max(configs, key=lambda name: len(switches(configs[name]) & left)))
        left -= switches(configs[chosen[-1]])
    return chosen


@pytest.mark.parametrize("family", every_switch())
def test_every_switch_keeps_the_rules(family):
    check_model(tiny_base(family).model)


@pytest.mark.parametrize("name", ["gemma4_text E2B", "gemma4_text A4B"])
def test_kinds_of_gemma4_keep_the_rules(name):
    (case,) = (case for case in CASES if case.name == name)
    check_model(tiny_base(case.family, **case.overrides).model)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Broken(DecoderModel):
    """A model without one of the rules."""

    fault: str = dataclasses.field(default="", metadata={"static": True})

    def run(self, x, stream, prefix=None, cache=None, gated=None, **options):
        if self.fault == "segments":
            stream = dataclasses.replace(stream, segments=jnp.minimum(stream.segments, 1))
        if self.fault == "parents":
            stream = dataclasses.replace(stream, parents=jnp.zeros_like(stream.parents))
        if self.fault == "positions":
            stream = dataclasses.replace(stream, positions=stream.positions * (prefix is None))
        if self.fault == "gradient":
            x = x.at[:, 3].set(jax.lax.stop_gradient(x[:, 3]))
        return super().run(x, stream, prefix, None if self.fault == "cache" else cache, gated, **options)

    def scores(self, states, at, ids):
        return super().scores(states, at, ids + (self.fault == "scores"))


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("segments", "packed sequences do not see each other"),
        ("parents", "a continuation sees the context that it shares"),
        ("positions", "a prefix is the context"),
        ("cache", "a cache is the context"),
        ("scores", "scores are log-probabilities of the logits"),
        ("gradient", "gradient for the embeddings is off finite differences"),
    ],
)
def test_a_broken_rule_is_named(fault, rule):
    model = tiny_base().model
    with pytest.raises(AssertionError, match=rule):
        check_model(Broken(model.params, model.module, fault))
