"""Encoder-decoders equal transformers', whose torch models read the very same checkpoint."""

import json
import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.bases.families import ENCODER_DECODERS
from spt_jax.inference.forward import target_scores
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts.virtual import VirtualPrompt
from spt_jax.testing import write_tiny_checkpoint
from tests.encoder_decoders import START, VARIANTS, choice, logits_by_target, rows_of, text, words
from tests.examples import same_gradient

pytestmark = pytest.mark.parity


def torch_model(directory, family):
    import transformers

    architecture = getattr(transformers, ENCODER_DECODERS[family].architecture)
    model, loading = architecture.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading[name] for name in ("unexpected_keys", "mismatched_keys"))
    assert all(re.search(r"\.(vision_tower|multi_modal_projector)\.", name) for name in loading["missing_keys"])
    model.generation_config.forced_eos_token_id = None  # BART's, which replaces the last token at a limit.
    return model.eval()


def load_both(tmp_path, variant, **more):
    family, overrides = VARIANTS[variant]
    directory = write_tiny_checkpoint(tmp_path / "model", family, seed=3, **overrides, **more)
    return load_base(directory, dtype="float32"), torch_model(directory, family)


def torch_logits(model, prompt, target) -> np.ndarray:
    """The logits [M, V] that predict the target."""
    inputs = np.concatenate([[START], target[:-1]])
    with torch.no_grad():
        found = model(input_ids=torch.tensor(prompt[None]).long(), decoder_input_ids=torch.tensor(inputs[None]).long())
    return found.logits[0].numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_alone_packed_and_of_choices(variant, tmp_path):
    """Prompts and targets beyond the largest distance, in rows of one and of several examples."""
    base, model = load_both(tmp_path, variant)
    pairs = [(words(30, 1), words(22, 2)), (words(5, 3), words(3, 4)), (words(11, 5), words(9, 6))]
    texts = [text(*pair, index) for index, pair in enumerate(pairs)]
    answers = [words(4, 7), words(1, 8), words(6, 9)]
    questions = [choice(prompt, answers, index=index) for index, (prompt, _) in enumerate(pairs)]
    for packing in (False, True):
        rows = rows_of(texts, packing=packing)
        assert packing == (rows.examples.shape[1] > 1)
        found = logits_by_target(base, rows)
        for index, (prompt, target) in enumerate(pairs):
            theirs = torch_logits(model, prompt, target)
            assert np.std(theirs) > 0.1
            np.testing.assert_allclose(found[index, 0], theirs, atol=1e-4, rtol=0)
    found = logits_by_target(base, rows_of(questions, packing=True))
    for index, (prompt, _) in enumerate(pairs):
        for number, answer in enumerate(answers):
            np.testing.assert_allclose(found[index, number], torch_logits(model, prompt, answer), atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["umt5", "t5gemma2"])
def test_hidden_states_of_the_encoder(variant, tmp_path):
    """`run` returns those of the encoder at the encoder's tokens, one of which has a row of its own in T5Gemma 2."""
    base, model = load_both(tmp_path, variant)
    prompt = words(30, 1)
    prompt[4] = 100
    assert getattr(base.model.config, "own_row_id", None) in (None, 100)
    rows = rows_of([text(prompt, words(5, 2))], packing=False)
    hidden, _ = jax.jit(lambda model, ids, stream: model.run(model.embed(ids), stream))(
        base.model, rows.ids, rows.stream
    )
    with torch.no_grad():
        theirs = model.get_encoder()(input_ids=torch.tensor(prompt[None]).long()).last_hidden_state[0].numpy()
    np.testing.assert_allclose(np.asarray(hidden)[0, :30], theirs, atol=1e-4, rtol=0)
    table = model.get_input_embeddings()(torch.arange(320)).detach().numpy()
    np.testing.assert_allclose(base.model.embedding_table(), table, rtol=1e-6)


def test_a_scaled_model_with_an_output_matrix_of_its_own(tmp_path):
    """What transformers saves of one: `tie_word_embeddings` is true there for every model of the family."""
    base, model = load_both(tmp_path, "t5 1.1")
    again = tmp_path / "again"
    model.save_pretrained(again)
    for file in (tmp_path / "model").glob("token*"):
        (again / file.name).write_bytes(file.read_bytes())
    read = load_base(again, dtype="float32")
    assert not read.model.config.tied and read.model.config.output_scale is None
    assert read.fingerprint == base.fingerprint


@pytest.mark.parametrize("variant", ["t5", "t5 1.1", "umt5", "bart", "mbart", "t5gemma", "t5gemma2"])
def test_loss_and_gradient_of_a_prompt(variant, tmp_path):
    """Alone and packed, against transformers' loss on `inputs_embeds` with the prompt before the text."""
    base, model = load_both(tmp_path, variant)
    pairs = [(words(20, 1), words(6, 2)), (words(5, 3), words(3, 4)), (words(11, 5), words(9, 6))]
    prompt = np.random.default_rng(7).normal(0, 0.3, (5, base.layout.width)).astype(np.float32)
    virtual_ids = base.layout.vocab_size + np.arange(5, dtype=np.int32)
    examples = [text(np.concatenate([virtual_ids, ids]), target, i) for i, (ids, target) in enumerate(pairs)]

    @jax.jit
    def loss(model, tokens, rows):
        found = target_scores(model, VirtualPrompt(tokens=tokens), None, rows).log_probabilities[:, :, 0]
        return -(found * rows.target_weights).sum() / rows.target_weights.sum()

    rows_of_prompt = torch.tensor(prompt, requires_grad=True)
    total = torch.zeros(())
    for ids, target in pairs:
        words_in = model.get_input_embeddings()(torch.tensor(ids).long())
        found = model(
            inputs_embeds=torch.cat([rows_of_prompt, words_in])[None],
            decoder_input_ids=torch.tensor([[START, *target[:-1]]]).long(),
            labels=torch.tensor(target[None]).long(),
        )
        total = total + found.loss * len(target)
    theirs = total / sum(len(target) for _, target in pairs)
    theirs.backward()
    for packing in (False, True):
        rows = rows_of(examples, packing=packing)
        ours, gradient = jax.value_and_grad(loss, argnums=1)(base.model, prompt, rows)
        np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-5)
        same_gradient(gradient, rows_of_prompt.grad)


@pytest.mark.parametrize("variant", ["t5", "umt5", "bart", "mbart", "t5gemma", "t5gemma2"])
def test_generated_ids(variant, tmp_path):
    """Greedy and sampled, padded and in one batch, against transformers' `generate` on each prompt alone."""
    base, model = load_both(tmp_path, variant)
    prompts = [words(30, 1), words(5, 2), words(11, 3)]
    ids = [np.concatenate([prompt, [START]]).astype(np.int32) for prompt in prompts]
    for prompt, ours in zip(prompts, generate(base, ids, sampling=SamplingConfig(max_new_tokens=20)), strict=True):
        theirs = model.generate(torch.tensor(prompt[None]).long(), max_new_tokens=20, do_sample=False, num_beams=1)
        assert list(ours.ids) == theirs[0, 1:].tolist()
    sampling = SamplingConfig(max_new_tokens=20, temperature=0.8, top_k=40, seed=5)
    for prompt, ours in zip(prompts, generate(base, ids, sampling=sampling), strict=True):
        logits = torch_logits(model, prompt, np.asarray(ours.ids, np.int32))
        found = torch.log_softmax(torch.tensor(logits), -1)[np.arange(len(ours.ids)), list(ours.ids)].numpy()
        np.testing.assert_allclose(ours.log_probabilities, found, atol=1e-4)


@pytest.mark.parametrize("variant", ["t5", "bart", "t5gemma"])
def test_generation_after_a_soft_prompt(variant, tmp_path):
    """The same ids as transformers generates after the prompt's rows and the text's embeddings."""
    base, model = load_both(tmp_path, variant)
    prompt = np.random.default_rng(7).normal(0, 0.3, (5, base.layout.width)).astype(np.float32)
    text_ids = words(11, 3)
    ids = np.concatenate([base.layout.vocab_size + np.arange(5), text_ids, [START]]).astype(np.int32)
    (ours,) = generate(base, [ids], VirtualPrompt(tokens=prompt), SamplingConfig(max_new_tokens=16))
    embedded = model.get_input_embeddings()(torch.tensor(text_ids).long())
    inputs = torch.cat([torch.tensor(prompt), embedded])[None]
    theirs = model.generate(inputs_embeds=inputs, max_new_tokens=16, do_sample=False, num_beams=1)
    assert list(ours.ids) == theirs[0, 1:].tolist()


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_forced_first_tokens(family, tmp_path):
    """That of generation_config.json comes first, as in transformers, also where the decoder starts with EOS."""
    directory = write_tiny_checkpoint(tmp_path / "model", family, seed=3)
    fields = {"forced_bos_token_id": 17, "eos_token_id": 2, "decoder_start_token_id": 2}
    (directory / "generation_config.json").write_text(json.dumps(fields))
    base, model = load_base(directory, dtype="float32"), torch_model(directory, family)
    assert base.layout.forced_id == model.generation_config.forced_bos_token_id == 17 and base.layout.start_id == 2
    prompts = [words(11, 3), words(5, 2)]
    ids = [np.concatenate([prompt, [2]]).astype(np.int32) for prompt in prompts]
    for temperature in (0.0, 0.9):
        sampling = SamplingConfig(max_new_tokens=12, temperature=temperature)
        for prompt, ours in zip(prompts, generate(base, ids, sampling=sampling), strict=True):
            assert ours.ids[0] == 17 and ours.log_probabilities[0] == 0
            if temperature:
                continue
            inputs = torch.tensor(prompt[None]).long()
            theirs = model.generate(inputs, max_new_tokens=12, do_sample=False, num_beams=1)
            assert list(ours.ids) == theirs[0, 1:].tolist()
