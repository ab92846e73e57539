"""The estimate of the memory of a step of an encoder-decoder, against XLA's plan of the compiled program."""

import pytest

from benchmarks.shapes import lower_step
from spt_jax.bases.config import model_config
from spt_jax.runtime.sharding import make_mesh
from spt_jax.testing import tiny_config
from spt_jax.training.cost import StepShape, choose_remat
from spt_jax.training.encoder_decoder_memory import encoder_decoder_memory
from tests.examples import QUICK_COMPILE

LAYERS = {"t5": ("num_layers", "num_decoder_layers"), "bart": ("encoder_layers", "decoder_layers")}
SIZES = {
    "t5": {"d_model": 256, "d_ff": 1024, "d_kv": 32, "num_heads": 8},
    "bart": {
        "d_model": 256,
        "encoder_ffn_dim": 1024,
        "decoder_ffn_dim": 1024,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "max_position_embeddings": 512,
    },
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def config_of(family, **more):
    return model_config(
        tiny_config(family, **SIZES[family], **dict.fromkeys(LAYERS[family], 6), vocab_size=4000, **more)
    )


@pytest.mark.parametrize(
    ("family", "remat", "more", "rows", "length", "microbatches"),
    [
        ("t5", "none", {}, 4, 256, 1),
        ("t5", "dots", {}, 16, 64, 1),
        ("t5", "full", {}, 8, 256, 2),
        ("t5", "dots", GATED, 16, 64, 1),
        ("bart", "none", {}, 16, 64, 1),
        ("bart", "dots", {}, 8, 128, 1),
        ("bart", "full", {}, 4, 256, 1),
    ],
)
def test_the_estimate_is_within_a_fifth(family, remat, more, rows, length, microbatches):
    """Of the temporaries, at sizes whose shares are those of real bases; weights are arguments of the program."""
    config, shape = config_of(family, **more), StepShape(rows, length, 16, decoder=length // 4)
    options = {"remat": remat, "microbatches": microbatches}
    program = lower_step(config, shape, compiler_options=QUICK_COMPILE, **options).compile()
    ours = encoder_decoder_memory(config, shape, itemsize=4, mesh=make_mesh(), **options)
    assert ours.total - ours.weights == pytest.approx(program.memory_analysis().temp_size_in_bytes, rel=0.2)


def test_rematerialization_by_what_fits():
    config, shape = config_of("t5"), StepShape(4, 256, 16, decoder=64)

    def estimate(remat):
        return encoder_decoder_memory(config, shape, remat=remat, itemsize=4, mesh=make_mesh())

    none, dots, full = (estimate(kind).total for kind in ("none", "dots", "full"))
    assert none > dots > full
    assert [choose_remat(estimate, limit) for limit in (2 * none, none, dots)] == ["none", "dots", "full"]


def test_a_prefix_and_more_tokens_of_the_decoder_take_more():
    config, shape = config_of("bart"), StepShape(8, 64, 16, decoder=16)
    own, prefix, longer = (
        encoder_decoder_memory(config, one, remat="none", itemsize=4, mesh=make_mesh())
        for one in (shape, StepShape(8, 64, 16, prefix=8, decoder=16), StepShape(8, 64, 16, decoder=32))
    )
    # Keys and values of 8 positions at three sites of 6 layers, of width 256, with their cotangents.
    assert own.prefix == 0 and prefix.prefix == 3 * 4 * 8 * 2 * 3 * 6 * 256
    assert own.kept < min(prefix.kept, longer.kept) and own.weights == longer.weights
