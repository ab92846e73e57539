"""Rows with different prompts in one call are what each prompt's rows are alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spt_jax.data.batches import multiples, pack, place_batch, plan_batches
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.attention import GatedPrefix, LinearMemory
from spt_jax.models.edits import HiddenEdits
from spt_jax.models.memory import KeysValues
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.virtual import Head, ReplacedRows, VirtualPrefix, VirtualPrompt
from spt_jax.runtime.sharding import MeshConfig, make_mesh
from spt_jax.testing import tiny_base
from tests.examples import QUICK_COMPILE, VOCAB


@functools.cache
def base_of(**axes: int):
    return tiny_base(num_key_value_heads=4, mesh=make_mesh(MeshConfig(**axes)))


def noise(seed: int, *shape: int) -> jax.Array:
    return 0.5 * jax.random.normal(jax.random.key(seed), shape)


def memory(seed: int, shape: tuple[int, ...]) -> dict[str, KeysValues]:
    return {"self": KeysValues(noise(seed, *shape), noise(seed + 1, *shape))}


def edits(seed: int, rank: int) -> HiddenEdits:
    layers, width = base_of().config.layers, base_of().config.width
    down, up = noise(seed, layers, width, rank), noise(seed + 2, layers, rank, width)
    return HiddenEdits(down, noise(seed + 1, layers, rank), up)


def prompts() -> list[VirtualPrompt]:
    """Prompts with every part that can be stacked, token rows and prefixes of two lengths, and nothing at all."""
    config = base_of().config
    keys = (config.layers, 6, config.kv_heads, config.head_size)
    short = (config.layers, 2, config.kv_heads, config.head_size)
    heads = (config.kv_heads, config.head_size, config.head_size)
    gated = (2, 4, config.kv_heads, config.head_size)
    return [
        VirtualPrompt(tokens=noise(0, 5, config.width)),
        VirtualPrompt(prefix=VirtualPrefix(memory(1, keys))),
        VirtualPrompt(tokens=noise(3, 2, config.width), prefix=VirtualPrefix(memory(4, short))),
        VirtualPrompt(gated=GatedPrefix(memory(6, gated), noise(8, 2))),
        VirtualPrompt(linear=LinearMemory({"self": noise(9, config.layers, *heads)})),
        VirtualPrompt(edits=edits(11, 2)),
        VirtualPrompt(edits=edits(14, 3)),
        VirtualPrompt(replaced=ReplacedRows(noise(10, 2, config.width), jnp.asarray([5.0, 61.0]))),
        VirtualPrompt(),
    ]


# What the examples of each prompt begin with: virtual tokens, and fixed text of various lengths.
LEADS = (
    [1, VOCAB, VOCAB + 1, VOCAB + 2, 17],
    [1, 17, 18],
    [1, VOCAB, VOCAB + 1],
    [1],
    [1, 50],
    [1, 51],
    [1],
    [1, 5, 61],
    [1, 40, 41, 42, 43, 44, 45],
)


def examples() -> list[Example]:
    """Three examples of every prompt, in turn, with virtual tokens further on for the first."""
    random = np.random.default_rng(0)
    result = []
    for index in range(3 * len(LEADS)):
        prompt = index % len(LEADS)
        inner = [VOCAB + 3, VOCAB + 4] if prompt == 0 else []
        ids = np.asarray(
            [*LEADS[prompt], *random.integers(3, VOCAB, 4 + index % 5), *inner, *random.integers(3, 99, 2)]
        )
        predicted = np.arange(len(ids)) >= len(ids) - 2
        result.append(Example(ids.astype(np.int32), predicted, (), 0, index, prompt))
    return result


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
def targets_of(model, virtual, batch):
    """Log-probabilities over the vocabulary at every target [B, M, V]."""
    prefix = encode_prefix(model, virtual, batch.lead_ids, batch.lead_length)
    logits = jax.nn.log_softmax(output_logits(model, virtual, prefix, batch.rows))
    return jnp.take_along_axis(logits, batch.rows.target_outputs[:, :, None], axis=1)


def in_one_batch(base, packing: bool):
    chosen = examples()
    plan = plan_batches(
        chosen,
        lead=[len(lead) for lead in LEADS],
        batch_size=len(chosen),
        packing=packing,
        **multiples(base.mesh),
    )
    batch = pack(chosen, plan)
    logits = targets_of(base.model, stack_prompts(prompts()), place_batch(batch, base.mesh))
    where = np.where(
        batch.rows.target_weights > 0, np.take_along_axis(batch.rows.examples, batch.rows.target_groups, 1), -1
    )
    return {index: np.asarray(logits)[where == index] for index in range(len(chosen))}


@functools.cache
def alone():
    """Every example in a row of its own, with its own prompt only."""
    base, result = base_of(), {}
    for example in examples():
        single = dataclasses.replace(example, prompt=0)
        batch = pack([single], plan_batches([single], lead=0, batch_size=1, packing=False))
        result[example.index] = targets_of(base.model, prompts()[example.prompt], batch)[0]
    return result


@pytest.mark.parametrize(("packing", "axes"), [(False, {}), (True, {}), (True, {"data": 2, "tensor": 2})])
def test_rows_with_different_prompts_are_each_prompt_alone(packing, axes):
    together = in_one_batch(base_of(**axes), packing)
    for index, expected in alone().items():
        np.testing.assert_allclose(together[index], expected, atol=2e-5)


def test_rows_hold_one_prompt_each():
    chosen = examples()
    batch = pack(chosen, plan_batches(chosen, lead=[len(lead) for lead in LEADS], batch_size=len(chosen)))
    assert batch.lead_ids.shape == (len(LEADS), 7)
    assert batch.lead_length.tolist() == [len(lead) for lead in LEADS]
    assert (batch.rows.examples >= 0).sum(1).max() > 1
    for row, prompt in zip(batch.rows.examples, batch.rows.stream.prompt_index, strict=True):
        assert {chosen[index].prompt for index in row if index >= 0} <= {int(prompt)}


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2}], ids=["one device", "mesh"])
def test_generation_with_different_prompts_is_each_alone(axes):
    base, sampling = base_of(**axes), SamplingConfig(max_new_tokens=8)
    chosen = examples()
    texts = [example.ids for example in chosen]
    index = [example.prompt for example in chosen]
    together = generate(base, texts, stack_prompts(prompts()), sampling, prompt_index=index, batch_size=4)
    for prompt, virtual in enumerate(prompts()):
        own = [number for number, other in enumerate(index) if other == prompt]
        answers = generate(base_of(), [texts[number] for number in own], virtual, sampling)
        for number, answer in zip(own, answers, strict=True):
            assert together[number].ids == answer.ids
            np.testing.assert_allclose(together[number].log_probabilities, answer.log_probabilities, atol=1e-4)


def test_gradients_go_to_each_prompt_alone():
    """Of a stack of equal prompts, as multitask training has it."""
    base = base_of()
    tokens = noise(0, 2, 3, base.config.width)
    random = np.random.default_rng(1)
    chosen = []
    for index in range(6):
        ids = np.asarray([1, VOCAB, VOCAB + 1, VOCAB + 2, *random.integers(3, VOCAB, 5)], np.int32)
        chosen.append(Example(ids, np.arange(9) >= 8, (), 0, index, index % 2))

    def total(virtual, batch):
        logits = targets_of.__wrapped__(base.model, virtual, batch)
        rows = batch.rows
        picked = jnp.take_along_axis(logits, rows.target_ids[:, :, None], axis=2)[..., 0]
        return jnp.sum(picked * rows.target_weights)

    batch = pack(chosen, plan_batches(chosen, lead=[4, 4], batch_size=6))
    together = jax.jit(jax.grad(total))(VirtualPrompt(tokens=tokens), batch).tokens
    for prompt in range(2):
        own = [dataclasses.replace(e, prompt=0) for e in chosen if e.prompt == prompt]
        batch = pack(own, plan_batches(own, lead=4, batch_size=3))
        apart = jax.jit(jax.grad(total))(VirtualPrompt(tokens=tokens[prompt]), batch).tokens
        np.testing.assert_allclose(together[prompt], apart, atol=1e-5 * float(jnp.abs(apart).max()))


def test_rows_may_be_narrower_than_heads():
    """The embeddings of ALBERT and of small ELECTRAs are narrower than their hidden states."""
    rows, head = jnp.ones((2, 16)), Head(jnp.ones((32, 3)), jnp.ones(3))
    stacked = stack_prompts([VirtualPrompt(rows, head=head), VirtualPrompt(rows[:1], head=head)])
    assert stacked.tokens.shape == (2, 2, 16) and stacked.head.kernel.shape == (2, 32, 3)


def test_what_does_not_go_together_is_refused():
    width = base_of().config.width
    head = Head(jnp.zeros((width, 2)), jnp.zeros(2))
    with pytest.raises(ConfigError, match="no prompts"):
        stack_prompts([])
    with pytest.raises(ConfigError, match=r"different width: \[16, 32\]"):
        stack_prompts([VirtualPrompt(jnp.zeros((2, 16))), VirtualPrompt(jnp.zeros((2, 32)))])
    with pytest.raises(ConfigError, match=r"different width: \[16, 32\]"):
        stack_prompts([VirtualPrompt(head=Head(jnp.zeros((size, 2)), jnp.zeros(2))) for size in (16, 32)])
    with pytest.raises(ConfigError, match="some of these prompts have a head"):
        stack_prompts([VirtualPrompt(head=head), VirtualPrompt()])
    with pytest.raises(ConfigError, match="are not compatible"):
        stack_prompts([VirtualPrompt(head=head), VirtualPrompt(head=Head(jnp.zeros((width, 3)), jnp.zeros(3)))])
    with pytest.raises(ConfigError, match=r"outside 0 to 8"):
        generate(base_of(), [np.asarray([1, 5])], stack_prompts(prompts()), prompt_index=[9])
    with pytest.raises(ConfigError, match=r"prompt_index has 2 entries for 1 prompts"):
        generate(base_of(), [np.asarray([1, 5])], stack_prompts(prompts()), prompt_index=[0, 1])
