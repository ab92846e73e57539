"""Files of BART and mBART: names of tensors, options, and the first token of an answer."""

import json

import numpy as np
import pytest
import safetensors.numpy

import spt_jax
from spt_jax.bases.base import load_base
from spt_jax.bases.config import model_config
from spt_jax.data.encoder import encoder_for
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.testing import tiny_base, tiny_config, write_tiny_checkpoint

TEMPLATE = spt_jax.Template(prompt="{text}", target="{label}", verbalizers={"good": "good", "bad": "bad"})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("bart"), "bart", seed=1)


def tensors_of(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


def copied(directory, folder, tensors, **fields):
    """A copy of a checkpoint with these tensors and fields of generation_config.json."""
    for file in directory.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if fields:
        (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_files_of_the_model_without_its_output_matrix(directory, tmp_path):
    """Names without "model.", copies of the embedding table, and no bias of the logits, as in facebook/bart-base."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of(directory).items()}
    tensors.pop("final_logits_bias")
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"].copy()
        tensors[f"{side}.version"] = np.asarray([3.0], np.float32)
    base, whole = load_base(copied(directory, tmp_path, tensors)), load_base(directory)
    assert whole.model.config.logit_bias and not base.model.config.logit_bias
    np.testing.assert_array_equal(base.params["encoder"]["positions"], whole.params["encoder"]["positions"])
    table = tensors_of(directory)["model.encoder.embed_positions.weight"]
    np.testing.assert_array_equal(base.params["encoder"]["positions"], table[2:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop("model.decoder.layers.1.encoder_attn.q_proj.bias"), CheckpointError, "lacks 1 tensors"),
        (lambda t: t.update(other=np.zeros(3, np.float32)), CheckpointError, "does not have: 'other'"),
        (lambda t: t.update({"classification_head.dense.bias": np.zeros(3, np.float32)}), ConfigError, "train a task"),
        (lambda t: t.update({"lm_head.weight": np.zeros((320, 32), np.float32)}), CheckpointError, "lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit(change, error, message, directory, tmp_path):
    tensors = tensors_of(directory)
    change(tensors)
    with pytest.raises(error, match=message):
        load_base(copied(directory, tmp_path, tensors))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("bart", {"normalize_before": True}, "normalize_before True is not supported; it must be False"),
        ("mbart", {"add_final_layer_norm": False}, "add_final_layer_norm False"),
        ("bart", {"static_position_embeddings": True}, "static_position_embeddings True"),
        ("bart", {"is_decoder": True}, "one side only"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings false"),
        ("bart", {"decoder_ffn_dim": 64}, "unequal ffn_dim, 48 and 64"),
        ("bart", {"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "cannot be shared by 3 heads"),
        ("mbart", {"decoder_start_token_id": None}, "set it in config.json to the id of the language"),
        ("mbart", {"decoder_start_token_id": 999}, "start_id is 999"),
    ],
)
def test_options_that_are_refused(family, options, message):
    with pytest.raises(ConfigError, match=message):
        model_config(tiny_config(family, **options))


def test_answers_begin_with_the_forced_token(directory, tmp_path):
    """It takes the place of the token that the tokenizer puts first, in targets and verbalizers."""
    base = load_base(copied(directory, tmp_path, tensors_of(directory), forced_bos_token_id=17))
    assert base.layout.start_id == 2 and base.layout.forced_id == 17
    plain = load_base(directory)
    for template in (TEMPLATE, spt_jax.Template(prompt="{text}", target="{label}")):
        forced, free = (encoder_for(one, template) for one in (base, plain))
        first, second = (one.encode({"text": "the text", "label": "good"}, 0) for one in (forced, free))
        words = [[*one.ids[one.starts + 1 :], *(one.choices[0] if one.choices else [])] for one in (first, second)]
        assert words[0] == [17, *words[1]]
    opening = tiny_base("bart", seed=1, add_bos=True).tokenizer
    assert encoder_for(base, TEMPLATE).form.answer([1, 5]) == [17, 1, 5]  # BOS is a token of the text here.
    assert opening("a")["input_ids"][-1] == 2
    assert any("forced_id is None here, 17 there" in line for line in base.fingerprint.differences(plain.fingerprint))


def test_a_tokenizer_with_an_opening_token(directory, tmp_path):
    """BART's own tokenizer puts <s> before each text, so that labels begin with it unless another token is forced."""
    tokenizer = spt_jax.testing.tiny_tokenizer("byte", add_bos=True, add_eos=True)
    tokenizer.save_pretrained(copied(directory, tmp_path, tensors_of(directory)))
    target = spt_jax.Template(prompt="{text}", target="{label}")
    record = {"text": "the text", "label": "good"}

    def answer():
        example = encoder_for(load_base(tmp_path), target).encode(record, 0)
        return example.ids[example.starts + 1 :].tolist()

    assert answer() == tokenizer("good")["input_ids"] and answer()[0] == 1
    (tmp_path / "generation_config.json").write_text(json.dumps({"forced_bos_token_id": 17}))
    assert answer() == [17, *tokenizer("good")["input_ids"][1:]]


def test_forced_tokens_that_are_wrong(directory, tmp_path):
    copied(directory, tmp_path, tensors_of(directory), forced_bos_token_id="en_XX")
    with pytest.raises(CheckpointError, match=r"forced_bos_token_id is 'en_XX'; it must be an integer"):
        load_base(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"forced_bos_token_id": 320}))
    with pytest.raises(ConfigError, match="forced_id is 320"):
        load_base(tmp_path)


def test_a_trained_prompt_generates_after_the_forced_token(directory, tmp_path):
    base = load_base(copied(directory, tmp_path, tensors_of(directory), forced_bos_token_id=17))
    records = [{"text": f"{word} text", "label": "good"} for word in ("the", "of", "and")]
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}")
    method = spt_jax.PromptTuning(length=3)
    prompt = spt_jax.fit(base, method, template, records, steps=4, batch_size=3, progress=False).prompt
    (answer,) = prompt.generate(["the text"], spt_jax.SamplingConfig(max_new_tokens=3))
    assert answer.startswith(base.tokenizer.decode([17]))
