"""The tiny models and tokenizers that other tests stand on."""

import jax
import numpy as np
import pytest
import transformers

from spt_jax.bases.base import load_base, tokenizer_hash
from spt_jax.bases.config import decoder_config
from spt_jax.errors import ConfigError
from spt_jax.testing import (
    BOS_ID,
    EOS_ID,
    FAMILIES,
    OWN_TOKENIZERS,
    PAD_ID,
    random_params,
    tiny_base,
    tiny_config,
    tiny_tokenizer,
    write_tiny_checkpoint,
)

TEXTS = ("Hello world", " the question", "two  spaces\nand a line", "Grüße, 数 😀", "tab\tend ")


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_lose_nothing(kind, text):
    tokenizer = tiny_tokenizer(kind)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_only_the_sentencepiece_one_puts_a_space_in_front():
    def tokens(kind, text):
        tokenizer = tiny_tokenizer(kind)
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)

    assert tokens("byte", "H") == ["H"]
    assert tokens("byte", " H") == ["ĠH"]
    assert tokens("sentencepiece", "H") == ["▁H"]
    assert tokens("sentencepiece", " H") == ["▁", "▁H"]
    assert tokens("sentencepiece", "xH") == ["▁", "x", "H"]
    assert tokens("byte", "Hello the")[:2] == ["Hello", "Ġthe"]


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_control_tokens(kind):
    tokenizer = tiny_tokenizer(kind)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS_ID, EOS_ID)
    assert tokenizer.pad_token_id == (PAD_ID if kind == "byte" else None)
    assert tokenizer("Hello").input_ids[0] == BOS_ID
    assert tiny_tokenizer(kind, add_bos=False)("Hello").input_ids[0] != BOS_ID
    assert tokenizer("Hello", add_special_tokens=False).input_ids[0] != BOS_ID


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(OWN_TOKENIZERS)))
def test_tokenizers_survive_the_disk(kind, family, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_tiny_checkpoint(tmp_path, family, tokenizer=kind))
    encodes = not decoder_config(tiny_config(family)).causal
    assert tokenizer_hash(tokenizer) == tokenizer_hash(tiny_tokenizer(kind, add_eos=encodes, add_mask=encodes))


@pytest.mark.parametrize("family", OWN_TOKENIZERS)
def test_some_families_have_a_tokenizer_of_their_own_in_transformers(family, tmp_path):
    """Other splits of words, the same vocabulary and nothing added to it."""
    base = tiny_base(family)
    assert base.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    with pytest.raises(ConfigError, match="byte-level"):
        write_tiny_checkpoint(tmp_path, family, tokenizer="sentencepiece")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_random(family):
    """A bias of zero or a scale of one would hide that it is not read."""
    config = decoder_config(tiny_config(family))
    for path, leaf in jax.tree_util.tree_leaves_with_path(random_params(config)):
        name = jax.tree_util.keystr(path)
        if leaf.size < 16:
            assert (leaf != ("scale" in name)).all(), name
            continue
        assert 0.1 < leaf.std() < 0.3, name
        assert abs(leaf.mean() - ("scale" in name)) < 0.15, name
        different = leaf[0] if family == "albert" and "layers" in name else leaf  # ALBERT's layers are equal.
        assert len(np.unique(different)) > 0.99 * different.size, name


def test_same_arguments_give_the_same_files(tmp_path):
    one, two = write_tiny_checkpoint(tmp_path / "a", seed=4), write_tiny_checkpoint(tmp_path / "b", seed=4)
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name
    other = write_tiny_checkpoint(tmp_path / "c", seed=5)
    assert (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_shards(tmp_path):
    directory = write_tiny_checkpoint(tmp_path, shards=3)
    assert sorted(file.name for file in directory.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    whole = tiny_base()
    jax.tree.map(np.testing.assert_array_equal, load_base(directory, dtype="float32").params, whole.params)


def test_tiny_bases():
    base = tiny_base("llama", tokenizer="sentencepiece", num_hidden_layers=2)
    assert base.name == "tiny-llama"
    assert (base.config.vocab_size, base.config.layers) == (384, 2)
    assert len(base.tokenizer) == base.config.vocab_size
    assert base.parameter_count < 100_000


def test_family_typo():
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        tiny_config("lama")
