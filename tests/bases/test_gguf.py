"""GGUF files are bases: the same logits and tokens as the Hugging Face directory that they were made of."""

import dataclasses
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import spt_jax
from spt_jax.bases.base import load_base, read_config
from spt_jax.bases.gguf import _directory, gguf_directory
from spt_jax.bases.gguf_header import read_header, read_tensor
from spt_jax.errors import CheckpointError, ConfigError, SptError
from spt_jax.runtime import extras
from tests.bases.gguf_files import ARCHITECTURES, write_gguf, write_vocabulary
from tests.layouts import row_logits

IDS = np.arange(3, 43)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_that_of_the_directory(architecture, tmp_path):
    directory, file = write_gguf(tmp_path, architecture)
    ours, theirs = load_base(file, dtype="float32"), load_base(directory, dtype="float32")
    # The file holds the epsilon in float32.
    assert ours.config.norm_epsilon == pytest.approx(theirs.config.norm_epsilon)
    assert dataclasses.replace(ours.config, norm_epsilon=theirs.config.norm_epsilon) == theirs.config
    np.testing.assert_allclose(row_logits(ours, IDS), row_logits(theirs, IDS), atol=1e-4, rtol=0)
    assert np.std(row_logits(ours, IDS)) > 0.3


# The k-quants cannot be written by the gguf package; their blocks are read as those of random bytes are.
@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_blocks_are_those_of_the_gguf_package(kind, tmp_path):
    directory, file = write_gguf(tmp_path, "llama", kind)
    ours, theirs = load_base(file, dtype="float32"), load_base(directory, dtype="float32")
    np.testing.assert_array_equal(row_logits(ours, IDS), row_logits(theirs, IDS))


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants(kind, tmp_path):
    values, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = np.random.default_rng(0).integers(0, 60, (3, 2 * size), np.uint8)  # small scales, so that no value is NaN
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("weight", blocks, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_header(tmp_path / "a.gguf").tensors["weight"]
    assert tensor.shape == (3, 2 * values) and tensor.kind == kind
    (expected,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    found = read_tensor(tensor)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(expected.data, expected.tensor_type))
    assert np.isfinite(found).all() and found.std() > 0


def test_tokens_template_and_ends(tmp_path):
    base = load_base(write_gguf(tmp_path)[1], dtype="float32")
    tokenizer = base.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello w")) == ["<s>", "hello", "Ġw"]
    assert tokenizer.encode("</s>hello")[:2] == [0, 1]
    for text in ("Ünï 漢字 🙂", "  two  spaces\n\tand\r\n", "1,234"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>hello</s>"
    assert base.end_ids == (1,) and tokenizer.all_special_ids == [0, 1]
    assert len(tokenizer) == base.config.vocab_size


def test_digits_are_split_where_the_file_says_so(tmp_path):
    base = load_base(write_gguf(tmp_path, metadata={"tokenizer.ggml.eot_token_id": 5})[1], dtype="float32")
    assert base.end_ids == (1, 5)
    (tmp_path / "b").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "b" / "v.gguf", "llama")
    write_vocabulary(writer, 320)
    fields = dict(read_header(write_gguf(tmp_path / "b")[1]).metadata) | {"tokenizer.ggml.pre": "smollm"}
    writer.close()
    from spt_jax.bases.gguf_tokenizer import write_tokenizer

    write_tokenizer(tmp_path / "b", tmp_path / "b" / "v.gguf", "llama", fields)
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "b")
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12  3")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "1", "2", "ĠĠ", "3"]


LLAMA2 = ("plain text", " lead", "  two  blanks", "</s>x", "def f(x):\n    return x", "1,000", "中文 نص 🙂", "")


def test_sentencepiece_is_that_of_llama_2(shared, tmp_path):
    """The vocabulary of Llama 2, with scores that give its merges."""
    import transformers

    from spt_jax.bases.gguf_tokenizer import write_tokenizer

    source = shared / "models" / "tokenizers" / "llama2"
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), rank)
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [-float(ranks.get(token, 1e6)) for token in tokens],
        "token_type": [3 if token in ("<s>", "</s>") else 6 if token.startswith("<0x") else 1 for token in tokens],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    write_tokenizer(tmp_path, tmp_path / "a.gguf", "llama", metadata)
    ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    for text in LLAMA2:
        assert ours.encode(text) == theirs.encode(text), text
        ids = ours.encode(text)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    write_tokenizer(tmp_path, tmp_path / "a.gguf", "llama", metadata | {"tokenizer.ggml.add_space_prefix": False})
    bare = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert bare.convert_ids_to_tokens(bare.encode("x y", add_special_tokens=False)) == ["x", "▁y"]


def test_control_tokens_that_would_be_split_are_refused(tmp_path):
    from spt_jax.bases.gguf_tokenizer import write_tokenizer

    fields = dict(read_header(write_gguf(tmp_path)[1]).metadata)
    tokens = fields["tokenizer.ggml.tokens"]
    fields["tokenizer.ggml.tokens"] = [*tokens[:-1], "<\u2581User>"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"][:-1], 3]
    with pytest.raises(CheckpointError, match="'<\u2581User>', is one that texts contain whole"):
        write_tokenizer(tmp_path, tmp_path / "a.gguf", "llama", fields)


def test_llama_3_frequencies(tmp_path):
    """The divisors of Llama 3's frequencies, by the formula in transformers, are recognized as its parameters."""
    theta, size, factor = 500_000.0, 16, 32.0
    plain = theta ** -(np.arange(0, size, 2) / size)
    waves = 2 * np.pi / plain
    smooth = (8192 / waves - 1) / 3
    scaled = np.where(waves < 8192 / 4, plain, plain / factor)
    between = (waves >= 8192 / 4) & (waves <= 8192)
    scaled = np.where(between, (1 - smooth) * plain / factor + smooth * plain, scaled)
    _, file = write_gguf(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": theta})
    added = tmp_path / "with.gguf"
    _with_tensor(file, added, "rope_freqs.weight", (plain / scaled).astype(np.float32))
    config = read_config(gguf_directory(added))
    assert (config.rope.kind, config.rope.factor, config.rope.original_max_positions) == ("llama3", factor, 8192)
    assert (config.rope.low_freq_factor, config.rope.high_freq_factor, config.rope.theta) == (1.0, 4.0, theta)
    _with_tensor(file, added, "rope_freqs.weight", np.linspace(1, 9, size // 2, dtype=np.float32))
    with pytest.raises(CheckpointError, match="frequencies of RoPE are not those of Llama 3"):
        gguf_directory(added)


def _with_tensor(file: Path, target: Path, name: str, values: np.ndarray) -> None:
    """Copies a file of float32 tensors and adds one."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_trains_and_the_saved_prompt_knows_the_file(tmp_path):
    _, file = write_gguf(tmp_path, kind=Kind.Q8_0)
    base = load_base(str(file), dtype="float32")
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", verbalizers={"a": "h", "b": "w"})
    records = [{"text": f"hello {i}", "label": "ab"[i % 2]} for i in range(8)]
    result = spt_jax.fit(base, spt_jax.PromptTuning(length=2), template, records, steps=2, progress=False)
    result.prompt.save(tmp_path / "prompt")
    again = spt_jax.load_prompt(tmp_path / "prompt")
    assert again.classify(["hello 1"]) == result.prompt.classify(["hello 1"])
    _, other = write_gguf(tmp_path / "other", kind=Kind.Q4_0)
    with pytest.raises(SptError, match="weights"):
        spt_jax.load_prompt(tmp_path / "prompt", base=load_base(other, dtype="float32"))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf"))[1]


def changed(file: Path, folder: Path, old: bytes, new: bytes) -> Path:
    content = file.read_bytes()
    assert content.count(old) >= 1
    target = folder / "changed.gguf"
    target.write_bytes(content.replace(old, new, 1))
    return target


def named(key: str) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF", b"GGML", "not a GGUF file"),
        (b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0", "version 1 is not supported"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "big-endian"),
        (named("general.architecture"), struct.pack("<Q", 1 << 60) + b"general.architecture", "length of a metadata"),
        (named("llama.block_count"), named("llama.block_cOunt"), "no 'llama.block_count'"),
        (named("llama.block_count") + b"\x04", named("llama.block_count") + b"\x63", "has the unknown type 99"),
        (named("llama"), named("mamba"), "'mamba' is not supported for GGUF files; supported are falcon"),
        (named("gpt-2"), named("gpt-9"), "the pre-tokenizer 'gpt-9' is not supported"),
        (named("gpt2"), named("gpt9"), "the tokenizer 'gpt9' is not supported"),
        (named("output_norm.weight"), named("output_norm.wEight"), "lacks 1 tensors of a llama .*: model.norm.weight"),
        (named("blk.1.attn_q.weight"), named("blk.0.attn_q.weight"), "'blk.0.attn_q.weight' is there twice"),
    ],
)  # fmt: skip
def test_wrong_headers_are_named(file, tmp_path, old, new, message):
    with pytest.raises(CheckpointError, match=message):
        load_base(changed(file, tmp_path, old, new), dtype="float32")


def tensor_entry(file: Path, name: str, *, kind: int | None = None, shape=None, offset: int | None = None):
    """Returns a tensor's entry in the table, and the entry with other values."""
    entry = gguf.GGUFReader(file)
    found = next(tensor for tensor in entry.tensors if tensor.name == name)
    dims = [int(n) for n in found.shape]
    start = int(found.data_offset - entry.data_offset)
    old = named(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, int(found.tensor_type), start)
    new_kind = int(found.tensor_type) if kind is None else kind
    new = named(name) + struct.pack(
        f"<I{len(dims)}QIQ", len(dims), *(shape or dims), new_kind, start if offset is None else offset
    )
    return old, new


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": 99}, "type 99, which is not supported; supported are F32"),
        ({"kind": 12}, "Q4_K blocks have 256"),
        ({"shape": (1 << 40, 1 << 20)}, "would end at byte"),
        ({"shape": (0, 64)}, "would end at byte"),
        ({"offset": 1 << 62}, "would end at byte"),
        ({"offset": 0}, "overlaps"),
        ({"shape": (64, 32)}, r"has shape \(32, 64\); the config asks for \(64, 64\)"),
    ],
)
def test_tensors_that_lie_are_named(file, tmp_path, change, message):
    name = "blk.1.attn_q.weight"
    with pytest.raises(CheckpointError, match=message):
        load_base(changed(file, tmp_path, *tensor_entry(file, name, **change)), dtype="float32")


def test_config_errors_name_the_file(tmp_path):
    _, file = write_gguf(tmp_path, metadata={"llama.attention.head_count_kv": 3})
    with pytest.raises(ConfigError, match=rf"^{file}: "):
        load_base(file)


def test_directories_of_killed_processes_are_removed(file, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [tmp_path / f"spt_jax-gguf-{os.getpid()}-a", tmp_path / "spt_jax-gguf-b", tmp_path / "other"]
    gone = tmp_path / f"spt_jax-gguf-{ended.pid}-a"
    for directory in (*kept, gone):
        directory.mkdir()
    own = _directory.__wrapped__(file, 0, 0)
    assert not gone.exists() and all(directory.exists() for directory in (*kept, own))
    assert own.parent == tmp_path


def test_truncated_missing_and_without_the_package(file, tmp_path, monkeypatch):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut.gguf: tensor .* would end at byte"):
        load_base(cut)
    with pytest.raises(CheckpointError, match=r"absent.gguf: no such file"):
        load_base(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match=r"Set base.path to such a file, .*model.gguf"):
        load_base(file.parent)
    monkeypatch.setattr(extras, "installed", lambda module: module != "gguf")
    with pytest.raises(SptError, match=r"pip install 'spt_jax\[gguf\]'"):
        load_base(file)


def test_a_file_of_the_hub(file, monkeypatch):
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    base = load_base("owner/name:model.gguf", dtype="float32", revision="main")
    assert asked == [("owner/name", "model.gguf", "main")] and base.config.layers == 2
    assert load_base("hf://owner/name:model.gguf", dtype="float32").config.layers == 2
    load_base("owner/name:folder/model.gguf", dtype="float32")
    assert asked[-1] == ("owner/name", "folder/model.gguf", None)


def test_any_bytes_are_read_or_refused_by_name(file, tmp_path):
    """Random changes of the header give a header or CheckpointError, quickly."""
    content = file.read_bytes()
    header = content.index(named("blk.1.attn_q.weight")) + 200
    target = tmp_path / "fuzzed.gguf"

    @hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
    @hypothesis.given(
        st.lists(
            st.tuples(st.integers(0, header), st.sampled_from([b"\0", b"\xff", b"\x7f" * 8, b"\xff" * 8])),
            min_size=1, max_size=4,
        ),
        st.integers(0, len(content)),
    )  # fmt: skip
    def check(changes, length):
        mutated = bytearray(content[: max(length, 1)])
        for at, new in changes:
            mutated[at : at + len(new)] = new
        target.write_bytes(mutated)
        start = time.monotonic()
        try:
            found = read_header(target)
        except CheckpointError as error:
            assert "fuzzed.gguf" in str(error)  # noqa: PT017
        else:
            assert all(tensor.start + tensor.size <= len(mutated) for tensor in found.tensors.values())
        assert time.monotonic() - start < 5

    check()


@pytest.mark.skipif("SPT_JAX_SMOLLM2" not in os.environ, reason="needs a real model")
def test_a_real_model():
    """SmolLM2 135M Instruct, against a conversion of the same file to a float32 directory by other code.

    SPT_JAX_SMOLLM2 is a folder with `SmolLM2-135M-Instruct.Q4_1.gguf` and, in `hf`, the conversion. One to float16
    differs by the rounding of the weights.
    """
    folder = Path(os.environ["SPT_JAX_SMOLLM2"])
    ours = load_base(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
    theirs = load_base(folder / "hf", dtype="float32")
    for text in (
        "What is the capital of France?",
        "def f(x):\n\treturn x",
        "Ünï 漢字 🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = ours.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == theirs.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = np.array(ours.tokenizer.encode(text))
    np.testing.assert_allclose(row_logits(ours, ids), row_logits(theirs, ids), atol=1e-3, rtol=0)
    answers = [
        spt_jax.generate(base, [text], sampling=spt_jax.SamplingConfig(max_new_tokens=32))[0].text
        for base in (ours, theirs)
    ]
    assert answers[0] == answers[1] and "Paris" in answers[0]


WRONG = (0, -1, 1 << 40, 1.5, float("nan"), "x", True, [], [-1], ["a", "b"])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "gpt2"])
def test_wrong_metadata_is_read_or_refused_by_name(architecture, tmp_path, monkeypatch):
    """Each value of the metadata in turn; the tokenizer's only in one architecture."""
    _, file = write_gguf(tmp_path, architecture)
    header, wrong, start = read_header(file), {}, time.monotonic()
    monkeypatch.setattr("spt_jax.bases.gguf.read_model", lambda _: dataclasses.replace(header, metadata=wrong))
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(tmp_path / "spt_jax-gguf-"))
    if architecture != "llama":
        monkeypatch.setattr("spt_jax.bases.gguf.write_tokenizer", lambda *_: {})
    refused = 0
    for key, value in itertools.product(header.metadata, WRONG):
        if key.startswith("tokenizer.") and architecture != "llama":
            continue
        wrong = {**header.metadata, key: value}
        shutil.rmtree(tmp_path / "spt_jax-gguf-", ignore_errors=True)
        (tmp_path / "spt_jax-gguf-").mkdir()
        try:
            read_config(_directory.__wrapped__(file, 0, 0))
        except (CheckpointError, ConfigError) as error:
            refused += 1
            assert len(str(error)) < 1000  # noqa: PT017
    assert refused > 60 and time.monotonic() - start < 60
