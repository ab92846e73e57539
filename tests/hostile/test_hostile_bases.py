"""Model directories that strangers made: each loads or is refused with a reason, soon and in little memory."""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from spt_jax.testing import write_tiny_checkpoint
from tests.hostile.base_attempts import BYTES, SECONDS

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
INDEX = "model.safetensors.index.json"
CODE = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\n\nclass Own:\n    pass\n"


def fields(name, **changes):
    """A change of a JSON file's fields; what JSON cannot say (NaN, Infinity) is written as Python writes it."""

    def change(directory):
        content = json.loads((directory / name).read_text()) | changes
        (directory / name).write_text(json.dumps(content))

    return change


def config(**changes):
    return fields("config.json", **changes)


def tokenizer(**changes):
    return fields("tokenizer.json", **changes)


def content(name, text):
    return lambda directory: (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def split(pattern):
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return tokenizer(pre_tokenizer=rule)


def replaced(*rules):
    normalizers = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in rules]
    return tokenizer(normalizer={"type": "Sequence", "normalizers": normalizers})


def header(text, length=None):
    """A safetensors file with another header, in front of the tensors of the old one."""

    def change(directory):
        file = directory / "model.safetensors"
        old = file.read_bytes()
        (size,) = struct.unpack("<Q", old[:8])
        own = text(json.loads(old[8 : 8 + size])).encode()
        file.write_bytes(struct.pack("<Q", len(own) if length is None else length) + own + old[8 + size :])

    return change


def shapes(shape):
    def text(entries):
        for key, entry in entries.items():
            if key != "__metadata__":
                entry["shape"] = shape
        return json.dumps(entries)

    return header(text)


NAN, INFINITY = float("nan"), float("inf")
HEADS = "not a multiple of the number|has shape"  # transformers 5.0 leaves it to the shapes of the tensors
SIZE = "must be an integer from"
# What is changed, and a part of the message that must come; "" where the base is sound all the same.
CASES = {
    "10^7 layers": (config(num_hidden_layers=10**7), SIZE),
    "9,999 layers": (config(num_hidden_layers=9_999), "lacks .* tensors of a llama model with 9999 layers"),
    "hidden 10^9": (config(hidden_size=10**9), SIZE),
    "hidden 2^20": (config(hidden_size=2**20), "has shape .*; the config asks for"),
    "no heads": (config(num_attention_heads=0), SIZE),
    "65,536 heads": (config(num_attention_heads=2**16), HEADS),
    "negative key heads": (config(num_key_value_heads=-2), SIZE),
    "heads as a text": (config(num_attention_heads="4"), SIZE),
    "heads as a truth": (config(num_attention_heads=True), SIZE),
    "more heads than width": (config(num_attention_heads=64, num_key_value_heads=64), HEADS),
    "vocabulary 10^12": (config(vocab_size=10**12), SIZE),
    "vocabulary 2^28": (config(vocab_size=2**28), "has shape"),
    "vocabulary 1": (config(vocab_size=1), "has shape"),
    "head size 10^9": (config(head_dim=10**9), SIZE),
    "odd heads": (config(head_dim=7), "cannot be rotated|even rotary dimension"),
    "MLP 10^12": (config(intermediate_size=10**12), SIZE),
    "negative positions": (config(max_position_embeddings=-1), SIZE),
    "positions 10^18": (config(max_position_embeddings=10**18), SIZE),
    "theta NaN": (config(rope_parameters={"rope_type": "default", "rope_theta": NAN}), "theta is nan"),
    "theta 0": (config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "theta is 0"),
    "theta -1": (config(rope_parameters={"rope_type": "default", "rope_theta": -1.0}), "theta is -1"),
    "theta as a text": (config(rope_parameters={"rope_type": "default", "rope_theta": "x"}), "config.json: "),
    "RoPE as a list": (config(rope_parameters=[1, 2]), "config.json: "),
    "yarn theta 1": (
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}),
        "'yarn' needs a theta",
    ),
    "factor infinite": (
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": INFINITY}),
        "factor is inf",
    ),
    "epsilon NaN": (config(rms_norm_eps=NAN), "norm_epsilon is nan"),
    "10^9 labels": (config(num_labels=10**9), ""),
    "layers of Mistral": (config(model_type="mistral", num_hidden_layers=10**9), SIZE),
    "layers of Qwen": (config(model_type="qwen2", num_hidden_layers=10**9), SIZE),
    "window kinds": (
        config(model_type="qwen3", sliding_window=4, layer_types=["sliding_attention"] * 10**5),
        "config.json: ",
    ),
    "type as a list": (config(model_type=["llama"]), "architecture"),
    "config deep": (content("config.json", DEEP), "nested too deeply"),
    "config a list": (content("config.json", "[1]"), "not an object"),
    "config no UTF-8": (content("config.json", b"\xff\xfe{"), "config.json: "),
    "config 5 MB": (content("config.json", '{"a":"' + "a" * 5_000_000 + '"}'), "bytes; at most"),
    "index of integers": (content(INDEX, '{"weight_map": {"model.norm.weight": 3}}'), "'weight_map' must be"),
    "index of lists": (content(INDEX, '{"weight_map": {"model.norm.weight": ["a"]}}'), "'weight_map' must be"),
    "index deep": (content(INDEX, DEEP), "nested too deeply"),
    "index empty": (content(INDEX, '{"weight_map": {}}'), "'weight_map' must be"),
    "index outside": (content(INDEX, '{"weight_map": {"a": "../../../etc/passwd"}}'), "which does not exist"),
    "index with NUL": (content(INDEX, '{"weight_map": {"a": "a\\u0000b"}}'), "which does not exist"),
    "header 2^63": (header(json.dumps, 2**63), "truncated or damaged"),
    "header of 99 MB": (header(json.dumps, 99_000_000), "truncated or damaged"),
    "header cut": (header(lambda entries: json.dumps(entries)[:-20]), "truncated or damaged"),
    "header deep": (header(lambda entries: DEEP), "truncated or damaged"),
    "shapes huge": (shapes([2**62, 4]), "truncated or damaged"),
    "shapes negative": (shapes([-1, 4]), "truncated or damaged"),
    "shapes empty": (shapes([0, 2**40]), "truncated or damaged"),
    "nested repetitions": (split("(a+)+$"), "the tokenizer"),
    "nested repetitions of any": (split("(.*)*b|."), "the tokenizer|^$"),
    "nested repetitions of words": (split(r"(\w+\s?)+$"), "the tokenizer"),
    "repetition of repetitions": (split("((a{1000}){1000}){1000}"), "^$|the tokenizer"),
    "pattern unclosed": (split("(a"), "the tokenizer"),
    "normalizer doubles 40 times": (replaced(*[("a", "aa")] * 40), "more than 256 times longer"),
    "normalizer writes 1 MB": (replaced(("a", "b" * 10**6)), "more than 256 times longer"),
    "normalizer deep": (tokenizer(normalizer=json.loads('{"normalizers":[' * 200 + "]}" * 200)), "the tokenizer"),
    "tokenizer deep": (content("tokenizer.json", DEEP), "nested too deeply"),
    "tokenizer empty": (content("tokenizer.json", "{}"), "the tokenizer"),
    "tokenizer a number": (content("tokenizer.json", "7"), "not an object"),
    "tokenizer no model": (tokenizer(model=None), "the tokenizer"),
    "ids beyond": (
        tokenizer(added_tokens=[{"id": 2**31, "content": "question", "single_word": False, "lstrip": False,
                                 "rstrip": False, "normalized": False, "special": False}]),
        "the token 'question' has id",
    ),
    "tokenizer config deep": (content("tokenizer_config.json", DEEP), "nested too deeply"),
    "tokenizer config a list": (content("tokenizer_config.json", "[]"), "not an object"),
    "tokenizer class a path": (fields("tokenizer_config.json", tokenizer_class="../../own"), "^$|the tokenizer"),
    "chat template an integer": (fields("tokenizer_config.json", chat_template=3), "^$|the tokenizer"),
    "added tokens of texts": (fields("tokenizer_config.json", added_tokens_decoder={"x": 3}), "the tokenizer"),
}  # fmt: skip


def try_all(directories, stdin="y\n" * 1000):
    """What came of each directory but the first, which is sound, by its name."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.base_attempts", *map(str, directories)],
        input=stdin, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=600,
        errors="replace",
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (
        f"ended with {done.returncode} at {directories[len(results) + 1]}: {done.stderr[-2000:]}"
    )
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return {Path(result["directory"]).name: result for result in results}


def wrong(result):
    """Why a result breaks the rules that hold for every directory; empty if it does not."""
    if result["error"].startswith("TRACEBACK"):
        return f"{result['error']}: {result['message']}"
    return "too slow or too large" if result["seconds"] > SECONDS or result["mebibytes"] > BYTES >> 20 else ""


# How many copies of a base have a change in this file.
SHARD = "model-00001-of-00002.safetensors"
MUTATIONS = {"config.json": 45, "tokenizer.json": 45, "tokenizer_config.json": 45, INDEX: 20, SHARD: 45}
VALUES = (None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, NAN, INFINITY, "", "x", "\ud800", [], [[]], {}, {"a": 1})


def mutated_json(text, generator):
    """The text with one part of its value, at any depth, replaced, removed or put in twice."""
    owner, key, part = None, None, (whole := json.loads(text))
    while isinstance(part, dict | list) and part and (owner is None or generator.random() < 0.8):
        owner, key = part, generator.choice(list(part) if isinstance(part, dict) else range(len(part)))
        part = owner[key]
    action = generator.randrange(4)
    if action == 0:
        del owner[key]
    elif action == 1:
        owner[key] = [part, part]
    else:
        owner[key] = generator.choice(VALUES)
    return json.dumps(whole).encode()


def mutated_bytes(content, generator):
    """The bytes with some of the first thousand changed, or a part cut out."""
    content, at = bytearray(content), generator.randrange(min(len(content), 1000))
    if generator.randrange(2):
        content[at] = generator.randrange(256)
    else:
        del content[at : at + generator.choice((1, 8, 100, len(content)))]
    return bytes(content)


def with_code(directory, **changes):
    """Own classes that the directory asks to be imported, in every way that transformers has for it."""
    (directory / "own.py").write_text(CODE.format(marker=str(directory / "marker")))
    config(auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}, **changes)(directory)
    change = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    fields("tokenizer_config.json", **change)(directory)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("bases") / "sound", num_hidden_layers=1)


def mutated(directory):
    """Copies of a base in which one of the files that describe it has changed, with fixed seeds."""
    sound = write_tiny_checkpoint(directory / "sound", num_hidden_layers=1, shards=2)
    for file, count in MUTATIONS.items():
        for seed in range(count):
            generator, old = random.Random(seed), (sound / file).read_bytes()
            as_json = file.endswith(".json") and seed % 4
            copy = directory / f"{file} {seed}"
            copy.mkdir()
            for entry in sound.iterdir():
                (copy / entry.name).symlink_to(entry)
            (copy / file).unlink()
            (copy / file).write_bytes(mutated_json(old, generator) if as_json else mutated_bytes(old, generator))
            yield copy


@pytest.fixture(scope="module")
def results(sound, tmp_path_factory):
    """What came of all of them, in one process with "y" on its standard input."""
    directories = [shutil.copytree(sound, sound.with_name(name)) for name in (*CASES, "code", "code of its own")]
    for directory, (change, _) in zip(directories, CASES.values(), strict=False):
        change(directory)
    with_code(directories[-2])
    with_code(directories[-1], model_type="own")
    return try_all([sound, *directories, *mutated(tmp_path_factory.mktemp("mutated"))])


@pytest.mark.parametrize("name", CASES)
def test_hostile_bases_are_refused(name, results):
    result, message = results[name], CASES[name][1]
    assert wrong(result) == ""
    assert re.search(message or "^$", result["message"]), result


def test_mutated_bases_raise_errors_of_this_library_only(results):
    found = {name: result for name, result in results.items() if name.split(" ")[0] in MUTATIONS}
    assert {name: why for name, result in found.items() if (why := wrong(result))} == {}
    assert len(found) == sum(MUTATIONS.values())
    assert sum(bool(result["error"]) for result in found.values()) > 80


@pytest.mark.parametrize("stdin", ["yes", "closed"])
def test_code_of_a_base_is_neither_run_nor_asked_for(stdin, sound, results):
    if stdin == "closed":
        results = try_all([sound, *(sound.with_name(name) for name in ("code", "code of its own"))], stdin="")
    assert "trust_remote_code" in results["code"]["message"] and wrong(results["code"]) == ""
    assert "architecture 'own' is not supported" in results["code of its own"]["message"]
    assert not list(sound.parent.glob("*/marker"))
