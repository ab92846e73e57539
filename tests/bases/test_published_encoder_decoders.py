"""Encoder-decoders of the sizes of released models: how many parameters they have."""

import jax
import pytest

from spt_jax.bases.families import ENCODER_DECODERS
from tests.bases.published_encoder_decoders import PUBLISHED, shapes_of


def test_every_family_has_a_released_model():
    assert {family for family, *_ in PUBLISHED.values()} == set(ENCODER_DECODERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_released_models(name):
    _, _, parameters, unread = PUBLISHED[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(name))) == parameters - unread
