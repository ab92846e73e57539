"""Loading a frozen base, its identity, and what a person is told when that fails."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import load_base, tokenizer_hash
from spt_jax.bases.families import FAMILIES
from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError, DataError
from spt_jax.prompts.initializers import initialize, labels, text, vocabulary
from spt_jax.testing import tiny_base, tiny_tokenizer, write_tiny_checkpoint
from tests.layouts import Run, forward, lay_out

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a"
    " big, red ball."
)


def test_greedy_text_of_a_real_model(stories):
    """The text that transformers' generate gives from BOS for this checkpoint."""
    base, length = load_base(stories, dtype="float32"), 64
    ids = np.asarray([base.tokenizer.bos_token_id], np.int32)
    while len(ids) < length and not base.tokenizer.decode(ids, skip_special_tokens=True).endswith("ball."):
        row, stream = lay_out([Run(0, 0, ids)], length)
        ids = np.append(ids, np.asarray(forward(base, row, stream)[0][0, len(ids) - 1]).argmax()).astype(np.int32)
    assert base.tokenizer.decode(ids, skip_special_tokens=True) == STORY
    assert base.parameter_count == 260_032


def rewrite(file, **fields):
    """Sets fields of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_same_checkpoint_has_the_same_fingerprint_wherever_and_however_it_is_loaded(tmp_path):
    one = load_base(write_tiny_checkpoint(tmp_path / "a"), dtype="float32")
    two = load_base(write_tiny_checkpoint(tmp_path / "b", shards=2), dtype="bfloat16")
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint.differences(two.fingerprint) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, ["weights"]),
        ({"add_bos": False}, ["tokenizer"]),
        ({"rms_norm_eps": 1e-6}, ["norm_epsilon"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ["rope.theta"]),
        ({"max_position_embeddings": 64}, ["max_positions", "rope.original_max_positions"]),
    ],
)
def test_fingerprint_differences_name_the_field(change, named):
    one, two = tiny_base(), tiny_base(**change)
    sentences = one.fingerprint.differences(two.fingerprint)
    assert [sentence.split(" is ")[0] for sentence in sentences] == named


def test_fingerprint_survives_json(tmp_path):
    base = tiny_base("smollm3")
    fingerprint = base.fingerprint
    again = dataclasses.replace(fingerprint, **json.loads(json.dumps(dataclasses.asdict(fingerprint))))
    assert again == fingerprint


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("llama", "norm_place", None),
        ("qwen3", "qk_norm", "head"),
        ("gemma2", "logit_cap", 4.0),
        ("llama", "rope.factor", None),
    ],
)
def test_an_option_that_a_fingerprint_lacks_has_its_default(family, option, value):
    """As in a fingerprint that was saved before the library had the option."""
    fingerprint = tiny_base(family).fingerprint
    *parts, name = option.split(".")
    config = json.loads(json.dumps(fingerprint.config))
    place = config[parts[0]] if parts else config
    del place[name]
    older = dataclasses.replace(fingerprint, config=config)
    named = [sentence.split(",")[0] for sentence in older.differences(fingerprint)]
    assert named == ([] if value is None else [f"{option} is {value!r} here"])


def test_fingerprint_of_one_value(tmp_path):
    directory = write_tiny_checkpoint(tmp_path)
    before = load_base(directory, dtype="float32").fingerprint
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][5] *= 1.001
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (sentence,) = before.differences(load_base(directory, dtype="float32").fingerprint)
    assert sentence.startswith("weights is ")


def test_tokenizer_hash_is_not_of_padding_and_truncation():
    tokenizer = tiny_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer(["Hello", "the question is long"], padding=True, truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(tiny_tokenizer(add_bos=False)) != before


def test_dtype_and_length_of_the_run():
    base = tiny_base(dtype="bfloat16")
    assert base.dtype == "bfloat16"
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert tiny_base(rope_parameters=rope).config.max_positions == 128
    assert tiny_base(rope_parameters=rope, max_length=200).config.max_positions == 200
    assert tiny_base(max_length=200).config.max_positions == 128


def test_missing_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        load_base(tmp_path / "nowhere")


def test_hub_without_a_network():
    with pytest.raises(CheckpointError, match="'nobody/nothing' is not a directory here, and the hub did not"):
        load_base("nobody/nothing")


def test_missing_and_damaged_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    with pytest.raises(ConfigError, match=r"config\.json: 'hidden_size' is 'wide'"):
        load_base(tmp_path)


@pytest.mark.parametrize("model_type", ["big_bird", "whisper", "no_such_model", None])
def test_unsupported_architecture_lists_those_supported(model_type, tmp_path):
    directory = write_tiny_checkpoint(tmp_path)
    rewrite(directory / "config.json", model_type=model_type)
    with pytest.raises(ConfigError, match=", ".join(FAMILIES)):
        load_base(directory)


def test_unknown_quantization_is_refused(tmp_path):
    directory = write_tiny_checkpoint(tmp_path)
    rewrite(directory / "config.json", quantization_config={"quant_method": "quanto"})
    with pytest.raises(ConfigError, match=r"config\.json: quantized checkpoints of the method 'quanto'.*gptq, mxfp4"):
        load_base(directory)


def test_dtype_typo(tmp_path):
    with pytest.raises(ConfigError, match=r"'bfloat61'.*bfloat16"):
        load_base(write_tiny_checkpoint(tmp_path), dtype="bfloat61")


@pytest.fixture
def padded(tmp_path):
    """A base whose tokenizer has two tokens more than its embedding has rows: a control token and a plain one."""
    directory = write_tiny_checkpoint(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(directory)
    return load_base(directory)


def test_tokens_without_an_embedding_are_refused_where_they_occur(padded):
    def encoder(prompt, **options):
        template = Template(prompt=prompt, target="{answer}", virtual_tokens=2 if "<soft>" in prompt else 0, **options)
        return Encoder(template, padded.tokenizer, padded.config.vocab_size, 64)

    record = {"text": "a good text", "answer": "yes"}
    assert encoder("<soft>{text}").encode(record, 0).ids.max() == 321  # the second virtual token
    for prompt, fields, token, id_ in (
        ("{text}", {"text": "a <tool> here"}, "<tool>", 321),
        ("<soft>{text}", {"answer": "<tool>"}, "<tool>", 321),
        ("<soft>{text}", {"text": "<tool>"}, "<tool>", 321),
        ("[PAD]{text}<soft>", {}, "[PAD]", 320),
    ):
        with pytest.raises(DataError, match=rf"record 3: the token '{re.escape(token)}' has id {id_}.* 320 embeddings"):
            encoder(prompt).encode(record | fields, 2)
    with pytest.raises(DataError, match="<tool>"):
        encoder("<soft>{text}").prompt_ids({"text": "a <tool>"})
    with pytest.raises(DataError, match="<tool>"):
        encoder("{text}", verbalizers={"yes": "<tool>", "no": "no"})


def test_tokens_without_an_embedding_start_no_prompt(padded):
    key = jax.random.key(0)
    assert initialize(vocabulary(), key, padded, 300).shape == (300, 32)
    for init in (text("a <tool>"), labels(["<tool>", "no"])):
        with pytest.raises(DataError, match="<tool>"):
            initialize(init, key, padded, 4)


def remove(directory, *patterns):
    for pattern in patterns:
        for file in directory.glob(pattern):
            file.unlink()


def put(directory, name, content=b""):
    (directory / name).write_bytes(content)


def adapter(directory):
    remove(directory, "*.safetensors", "config.json")
    put(
        directory, "adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B"}'
    )
    put(directory, "adapter_model.safetensors")


def other_weights(*names):
    def change(directory):
        remove(directory, "*.safetensors")
        for name in names:
            put(directory, name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            adapter,
            r"no config\.json; it is a PEFT adapter of 'meta-llama/Llama-3\.2-1B'\. Set base\.path to that model",
        ),
        (
            other_weights("pytorch_model.bin"),
            r"no model\.safetensors.*; pytorch_model\.bin holds pickle weights.*Convert",
        ),
        (
            other_weights("model.Q4_K_M.gguf"),
            r"; model\.Q4_K_M\.gguf holds GGUF weights\. Set base\.path to such a file",
        ),
        (
            other_weights("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            r"model-00002-of-00002\.safetensors \(shards without their index\)\. Copy model\.safetensors\.index\.json",
        ),
        (other_weights("weights.safetensors"), r"weights\.safetensors \(another name\).*rename"),
        (other_weights(), r"no model\.safetensors and no .*index\.json; it holds config\.json, tokenizer\.json"),
        (
            lambda directory: remove(directory, "tokenizer*"),
            r"no tokenizer\.json\. Copy it from the model's repository",
        ),
        (
            lambda directory: (remove(directory, "tokenizer*"), put(directory, "tokenizer.model")),
            r"no tokenizer\.json; tokenizer\.model cannot be read without it",
        ),
    ],
)
def test_what_a_directory_holds_instead(change, message, tmp_path):
    directory = write_tiny_checkpoint(tmp_path)
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        load_base(directory)


def test_a_file_of_the_model_instead_of_its_directory(tmp_path):
    directory = write_tiny_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=rf"is a file; set base\.path to the model's directory, {directory}"):
        load_base(directory / "model.safetensors")
