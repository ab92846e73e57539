"""The tokenizer of a GGUF file: Gemma's vocabularies, wrong metadata, and an older transformers."""

import json
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
import transformers
from tokenizers import models, normalizers, trainers

from spt_jax.bases.gguf import gguf_directory
from spt_jax.bases.gguf_tokenizer import write_tokenizer
from spt_jax.errors import CheckpointError
from tests.bases import gguf_files

TEXT = "the cat sat on the mat\nthen the other cat sat  and   that was the end\n\nthe mat and the hat, the rat"
CONTROL, DEFINED, BYTE, NORMAL = 3, 4, 6, 1


def gemma_vocabulary() -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Returns the tokens as Gemma's files hold them, their types, and the merges.

    The order is Gemma's: control tokens, bytes, line feeds and runs of blanks that are defined, merged pieces, single
    characters.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(vocab_size=45, show_progress=False, special_tokens=[])
    # Each line is one word: merges cross blanks.
    trained.train_from_iterator([" ".join(line.split()) for line in TEXT.split("\n")], trainer)
    content = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in content["merges"]]
    pieces = ["".join(merge) for merge in merges]
    characters = [token for token in content["vocab"] if token not in pieces]
    blanks = ["  ", "   ", "    "]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "\n\n", *blanks, *pieces, *characters]
    kinds = [CONTROL] * 6 + [BYTE] * 256 + [DEFINED] * 5 + [NORMAL] * (len(pieces) + len(characters))
    runs = [
        ("\u2581", "\u2581"),
        ("\u2581", "\u2581\u2581"),
        ("\u2581\u2581", "\u2581"),
        ("\u2581\u2581", "\u2581\u2581"),
    ]
    runs += [("\u2581", "\u2581\u2581\u2581"), ("\u2581\u2581\u2581", "\u2581")]
    return tokens, kinds, [("\n", "\n"), *runs, *merges]


def metadata(tokens: list[str], kinds: list[int], changes: dict[str, object] | None = None) -> dict:
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [-float(id_) for id_ in range(len(tokens))],
        "token_type": kinds,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "padding_token_id": 0,
        "unknown_token_id": 3,
        "add_space_prefix": False,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (fields | (changes or {})).items() if value is not None}


def written(folder: Path, architecture: str, fields: dict) -> transformers.PreTrainedTokenizerFast:
    write_tokenizer(folder, folder / "a.gguf", architecture, fields)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


TEXTS = (
    TEXT,
    "the cat",
    " the cat",
    "  the  cat   and    rat     end      ",
    "Ünï 漢字 🙂",
    "\n\n\nthe\n mat",
    "<start_of_turn>user\nthe hat<eos> end",
    "",
)


@pytest.mark.parametrize("architecture", ["gemma", "gemma2", "gemma3"])
def test_gemma_is_the_tokenizer_of_transformers(architecture, tmp_path):
    tokens, kinds, merges = gemma_vocabulary()
    ours = written(tmp_path, architecture, metadata(tokens, kinds))
    spelled = [token.replace(" ", "\u2581") for token in tokens]
    theirs = transformers.GemmaTokenizer(vocab={token: id_ for id_, token in enumerate(spelled)}, merges=merges)
    theirs.add_special_tokens({"additional_special_tokens": ["<start_of_turn>"]})
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert ours.encode(text) == [2, *expected]
        assert ours.decode(expected, skip_special_tokens=False) == text
    assert ours.convert_ids_to_tokens(ours.encode("the cat", add_special_tokens=False))[0][0] != "\u2581"
    assert ours.encode("漢", add_special_tokens=False) == [tokens.index(f"<0x{byte:02X}>") for byte in "漢".encode()]
    assert ours.encode("    ", add_special_tokens=False) == [tokens.index("    ")]
    assert len(ours) == len(tokens)


def test_runs_of_blanks_that_nothing_builds_are_refused(tmp_path):
    tokens, kinds, _ = gemma_vocabulary()
    tokens[tokens.index("\u2581")] = "unrelated"
    with pytest.raises(CheckpointError, match=r"'  ', is one that texts contain whole"):
        write_tokenizer(tmp_path, tmp_path / "a.gguf", "gemma2", metadata(tokens, kinds))


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_an_older_transformers_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf", None)
    monkeypatch.setattr(transformers, "__version__", "5.0.0")
    tokens, kinds, _ = gemma_vocabulary()
    with pytest.raises(CheckpointError, match=r"a.gguf: .* needs transformers 5.23 or newer, and 5.0.0 is installed"):
        write_tokenizer(tmp_path, tmp_path / "a.gguf", "llama", metadata(tokens, kinds, {"model": model, "merges": []}))


def test_a_start_token_that_stands_for_the_text_is_refused(tmp_path):
    tokens, kinds, _ = gemma_vocabulary()
    tokens[2] = "$A"
    with pytest.raises(CheckpointError, match=r"\['\$A'\] cannot be put around texts"):
        write_tokenizer(tmp_path, tmp_path / "a.gguf", "gemma2", metadata(tokens, kinds))


NUMBERS = st.sampled_from([0, -1, 1, 7, 1 << 20, 1 << 40, (1 << 64) - 1, 1.5, float("nan"), float("inf")])
SCALARS = NUMBERS | st.booleans() | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=4) | st.none()
# With few tokens, of which merges and ids are often, but not always, some.
TOKENS = ["<s>", "</s>", "a", "b", "ab", "\u2581", "  ", "$A", "x:1", "", "Ġ", "<0x61>"]
PIECES = st.lists(st.sampled_from(TOKENS), max_size=12, unique=True)
MERGES = st.lists(st.sampled_from(["a b", "b a", "a", "a b a", "", " ", "c d", "\u2581 \u2581"]), max_size=4)
FIELDS = {
    "model": st.sampled_from(["llama", "gpt2"]) | VALUES,
    "tokens": PIECES | VALUES,
    "scores": st.lists(st.floats(width=32), max_size=12) | VALUES,
    "token_type": st.lists(st.integers(-1, 7), max_size=12) | VALUES,
    "merges": MERGES | VALUES,
    "pre": st.sampled_from(["gpt-2", "llama-bpe", "smollm", None]) | VALUES,
    "bos_token_id": st.integers(0, 3) | VALUES,
    "eos_token_id": st.integers(0, 3) | VALUES,
    "unknown_token_id": VALUES,
    "padding_token_id": VALUES,
    "add_space_prefix": st.booleans() | VALUES,
    "add_bos_token": st.booleans() | VALUES,
}
SOME_WRONG = st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})
)
# Fields of a right vocabulary, so that a few wrong ones are reached.
RIGHT = {"llama": gemma_vocabulary()[:2], "gpt2": (["<s>", "</s>", "a", "b", "ab", "Ġ"], [3, 3, 1, 1, 1, 1])}


def read_or_refuse(folder: Path, architecture: str, fields: dict) -> bool:
    """Returns whether the fields make a tokenizer, whose ids are then those of the vocabulary."""
    file, start = folder / "a.gguf", time.monotonic()
    try:
        write_tokenizer(folder, file, architecture, fields)
    except CheckpointError as error:
        assert str(error).startswith(f"{file}: ")  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
        return False
    finally:
        assert time.monotonic() - start < 5
    tokens = fields["tokenizer.ggml.tokens"]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert all(0 <= id_ < len(tokens) for id_ in tokenizer.get_vocab().values())
    return True


def test_any_fields_are_read_or_refused_by_name(tmp_path):
    read = []

    @hypothesis.settings(max_examples=600, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        model=st.sampled_from(["llama", "gpt2"]),
        architecture=st.sampled_from(["llama", "gemma3", "phi3", "qwen2"]),
        wrong=SOME_WRONG,
    )
    def check(model, architecture, wrong):
        tokens, kinds = RIGHT[model]
        changes = {"model": model, "merges": ["a b"] if model == "gpt2" else None, "unknown_token_id": 0}
        read.append(read_or_refuse(tmp_path, architecture, metadata(tokens, kinds, changes | wrong)))

    check()
    assert 20 < sum(read) < len(read) - 50


def test_more_tokens_than_embeddings_are_refused(tmp_path, monkeypatch):
    right = gguf_files.write_vocabulary
    monkeypatch.setattr(gguf_files, "write_vocabulary", lambda writer, size: right(writer, size + 5))
    _, file = gguf_files.write_gguf(tmp_path)
    with pytest.raises(CheckpointError, match=r"model.gguf: 325 tokens, but token_embd.weight has 320 rows"):
        gguf_directory(file)
