"""A saved prompt is small, whole or not there, read without trust, and refuses another base."""

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from spt_jax.bases.base import FrozenBase
from spt_jax.bases.families import FAMILIES
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError
from spt_jax.models import memory
from spt_jax.prompts import PrefixTuning, PromptTuning, initializers
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.storage import load_prompt, read_prompt, save_prompt
from spt_jax.prompts.virtual import Head, VirtualPrefix, VirtualPrompt
from spt_jax.runtime.sharding import MeshConfig, make_mesh, replicated
from spt_jax.testing import tiny_base
from tests.disks import small_disk

LENGTH, WIDTH = 6, 32
METHOD = PromptTuning(length=LENGTH)
TEMPLATE = Template(
    prompt="<soft:4>{text}\nKind of question:<soft:2>",
    target=" {label}",
    virtual_tokens=LENGTH,
    verbalizers={"person": "H", "location": "L é", "a": "\n"},
    truncate="text",
    keep="end",
)
HEAD_ARRAYS = jnp.zeros((WIDTH, 2)), jnp.zeros(2)
FILES = ["prompt.json", "prompt.safetensors"]


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return tiny_base()


@pytest.fixture(scope="module")
def other_base() -> FrozenBase:
    return tiny_base(seed=1, num_hidden_layers=2, tie_word_embeddings=True)


def some_prompt(seed: int = 0, shape: tuple[int, ...] = (LENGTH, WIDTH)) -> VirtualPrompt:
    return VirtualPrompt(jax.random.normal(jax.random.key(seed), shape))


@pytest.fixture
def saved(tmp_path, base) -> Path:
    return save_prompt(tmp_path / "prompt", base, METHOD, some_prompt(), TEMPLATE, extra={"accuracy": 0.5})


def rewrite(directory: Path, tensors=None, **changes) -> None:
    """Changes both files as someone would who computes the SHA-256 anew. Dotted names reach into the JSON."""
    info = json.loads((directory / "prompt.json").read_text())
    if tensors is not None:
        content = safetensors.numpy.save(tensors)
        (directory / "prompt.safetensors").write_bytes(content)
        info["sha256"] = hashlib.sha256(content).hexdigest()
    for name, value in changes.items():
        *path, last = name.split("__")
        place = info
        for key in path:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value
    (directory / "prompt.json").write_text(json.dumps(info))


def listing(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_what_was_saved_comes_back(saved, base):
    prompt = load_prompt(saved, base)
    assert (prompt.method, prompt.template) == (METHOD, TEMPLATE)
    # The order of the verbalizers is the order of the labels.
    assert list(prompt.template.verbalizers) == list(TEMPLATE.verbalizers)
    assert prompt.virtual.tokens.dtype == jnp.float32
    assert np.asarray(prompt.virtual.tokens).tobytes() == np.asarray(some_prompt().tokens).tobytes()
    assert prompt.info["format"] == 1
    assert prompt.info["extra"] == {"accuracy": 0.5}
    assert prompt.info["base"]["id"] == "tiny-llama"
    assert prompt.info["base"]["dtype"] == "float32"
    assert prompt.info["versions"]["jax"] == importlib.metadata.version("jax")
    assert prompt.fingerprint == base.fingerprint
    assert read_prompt(saved).template == prompt.template


def test_two_files_that_others_can_read(saved):
    assert listing(saved) == FILES
    tensors = safetensors.numpy.load_file(saved / "prompt.safetensors")
    assert list(tensors) == ["tokens"]
    np.testing.assert_array_equal(tensors["tokens"], some_prompt().tokens)
    assert listing(saved.parent) == ["prompt"]


def test_the_same_prompt_gives_the_same_bytes(tmp_path, base):
    first, second = (save_prompt(tmp_path / name, base, METHOD, some_prompt(), TEMPLATE) for name in "ab")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_the_size_is_the_tokens_and_less_than_8_kb(tmp_path, base):
    layers = list(range(1000, 1126))  # As many as the largest models have, in both lists that name layers.
    config = {**base.fingerprint.config, "no_rope_layers": layers, "window_layers": layers}
    base = dataclasses.replace(base, fingerprint=dataclasses.replace(base.fingerprint, config=config))
    directory = save_prompt(tmp_path / "prompt", base, METHOD, some_prompt(), TEMPLATE)
    assert sum((directory / name).stat().st_size for name in FILES) < 4 * LENGTH * WIDTH + 8192


@pytest.mark.parametrize(
    "init",
    [
        initializers.vocabulary(50),
        initializers.uniform(1.0),
        initializers.text("Is this ▁spam? \n"),
        initializers.labels(["good", "bad"]),
        initializers.file("rows.npy"),
        initializers.prompt("some/prompt"),
    ],
    ids=lambda init: init.name,
)
def test_every_initializer_is_remembered(tmp_path, base, init):
    method = PromptTuning(length=LENGTH, init=init)
    directory = save_prompt(tmp_path / "prompt", base, method, some_prompt(), TEMPLATE)
    assert read_prompt(directory).method == method


def test_an_array_that_a_prompt_started_from_is_not_stored(tmp_path, base):
    method = PromptTuning(length=LENGTH, init=initializers.array(np.full((LENGTH, WIDTH), 7.0, np.float32)))
    directory = save_prompt(tmp_path / "prompt", base, method, some_prompt(), TEMPLATE)
    init = read_prompt(directory).method.init
    assert init.name == "array"
    assert len(init.rows) == 0
    assert "rows" not in (directory / "prompt.json").read_text()


def test_a_prompt_starts_from_a_saved_one(saved, base):
    rows = initialize(initializers.prompt(saved), jax.random.key(1), base, LENGTH)
    np.testing.assert_array_equal(rows, some_prompt().tokens)


def test_parameters_go_to_every_device_of_the_mesh(saved):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    prompt = load_prompt(saved, tiny_base(mesh=mesh))
    assert prompt.virtual.tokens.sharding == replicated(mesh)
    np.testing.assert_array_equal(prompt.virtual.tokens, some_prompt().tokens)


def test_precision_and_place_of_the_base_do_not_matter(saved):
    base = dataclasses.replace(tiny_base(dtype="bfloat16"), name="elsewhere", revision="v2")
    np.testing.assert_array_equal(load_prompt(saved, base).virtual.tokens, some_prompt().tokens)


def test_another_base_is_refused_with_every_field_that_differs(saved, other_base):
    with pytest.raises(CheckpointError) as error:
        load_prompt(saved, other_base)
    message = str(error.value)
    assert "trained on another base, 'tiny-llama'" in message
    for part in ("layers is 3 here, 2 there", "tied is False here, True there", "weights is ", "force=True"):
        assert part in message
    assert "tokenizer" not in message
    assert "width" not in message


def test_another_tokenizer_is_another_base(saved, base):
    other = tiny_base(add_bos=False)
    assert other.fingerprint.weights == base.fingerprint.weights
    with pytest.raises(CheckpointError, match=r"another base, 'tiny-llama', not 'tiny-llama': tokenizer is \S+ here"):
        load_prompt(saved, other)


def test_force_accepts_another_base_that_fits(saved, other_base):
    with pytest.warns(UserWarning, match=r"layers is 3 here, 2 there.*Using it anyway \(force=True\)"):
        prompt = load_prompt(saved, other_base, force=True)
    np.testing.assert_array_equal(prompt.virtual.tokens, some_prompt().tokens)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"hidden_size": 64}, "width"), ({"tokenizer": "sentencepiece"}, "vocab_size")],
    ids=["width", "vocabulary"],
)
def test_a_base_of_another_size_cannot_be_forced(saved, options, named):
    other = tiny_base(**options)
    for force in (False, True):
        with pytest.raises(CheckpointError, match=f"force=True does not help: the {named} must be the same"):
            load_prompt(saved, other, force=force)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": PromptTuning(length=5)}, r"'tokens' is float32 \(6, 32\); it must be float32 \(5, 32\)"),
        ({"virtual": some_prompt(shape=(LENGTH, 16))}, r"'tokens' is float32 \(6, 16\); it must be float32 \(6, 32\)"),
        ({"virtual": VirtualPrompt(some_prompt().tokens, head=Head(*HEAD_ARRAYS))}, "unknown key 'head/bias'"),
        ({"virtual": VirtualPrompt()}, "the tensor 'tokens' is missing"),
        ({"virtual": VirtualPrompt(jnp.zeros((LENGTH, WIDTH), jnp.bfloat16))}, "'tokens' is bfloat16"),
        ({"virtual": VirtualPrompt(some_prompt().tokens.at[2, 3].set(jnp.nan))}, "'tokens' holds values that are not"),
        ({"virtual": VirtualPrompt(some_prompt().tokens.at[0, 0].set(-jnp.inf))}, "not finite"),
        (
            {"template": dataclasses.replace(TEMPLATE, prompt="<soft>{text}", virtual_tokens=7)},
            "places 7 virtual tokens, the method has 6",
        ),
        ({"extra": {"f1": float("nan")}}, "`extra` must be JSON with finite numbers"),
        ({"extra": {"command": Path("train.py")}}, "`extra` must be JSON"),
    ],
)
def test_what_is_no_prompt_is_not_saved(tmp_path, base, changes, message):
    arguments = {"method": METHOD, "virtual": some_prompt(), "template": TEMPLATE, **changes}
    with pytest.raises(CheckpointError, match=message):
        save_prompt(tmp_path / "prompt", base, **arguments)
    assert listing(tmp_path) == []


def test_a_prompt_is_replaced_as_a_whole(saved, base):
    template = dataclasses.replace(TEMPLATE, keep="start")
    save_prompt(saved, base, METHOD, some_prompt(1), template)
    prompt = load_prompt(saved, base)
    assert prompt.template == template
    np.testing.assert_array_equal(prompt.virtual.tokens, some_prompt(1).tokens)
    assert (listing(saved.parent), listing(saved)) == (["prompt"], FILES)


def test_a_directory_with_other_things_is_not_replaced(tmp_path, base):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match=r"work: holds 'thesis.tex', so it is not a prompt directory"):
        save_prompt(tmp_path / "work", base, METHOD, some_prompt(), TEMPLATE)
    with pytest.raises(CheckpointError, match="the prompt was not saved"):
        save_prompt(tmp_path / "work" / "thesis.tex", base, METHOD, some_prompt(), TEMPLATE)
    assert (listing(tmp_path), listing(tmp_path / "work")) == (["work"], ["thesis.tex"])


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_any_point_leaves_what_was_there(tmp_path, base, monkeypatch, call, exists):
    directory = tmp_path / "prompt"
    if exists:
        save_prompt(directory, base, METHOD, some_prompt(), TEMPLATE)
    original = getattr(os, call)
    for failing in range(2 if call == "fsync" or exists else 1):  # Two files to sync, two directories to rename.
        calls = []

        def fails(*args, failing=failing, calls=calls):
            calls.append(args)
            if len(calls) == failing + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args)

        monkeypatch.setattr(os, call, fails)
        with pytest.raises(CheckpointError, match=r"not saved .No space left on device.; previous content"):
            save_prompt(directory, base, METHOD, some_prompt(1), TEMPLATE)
        monkeypatch.undo()
        assert listing(tmp_path) == (["prompt"] if exists else [])
        if exists:
            np.testing.assert_array_equal(load_prompt(directory, base).virtual.tokens, some_prompt().tokens)


def test_an_interrupt_leaves_nothing(tmp_path, base, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_prompt(tmp_path / "prompt", base, METHOD, some_prompt(), TEMPLATE)
    assert listing(tmp_path) == []


def test_a_full_disk_leaves_the_prompt_before(tmp_path, base):
    with small_disk(tmp_path / "disk", 200_000) as disk:
        directory = save_prompt(disk / "prompt", base, METHOD, some_prompt(), TEMPLATE)
        method, template = PromptTuning(length=2000), Template(prompt="<soft>{a}", target="{b}", virtual_tokens=2000)
        with pytest.raises(CheckpointError, match=r"the prompt was not saved .No space left on device"):
            save_prompt(directory, base, method, some_prompt(shape=(2000, WIDTH)), template)
        assert listing(disk) == ["prompt"]
        np.testing.assert_array_equal(load_prompt(directory, base).virtual.tokens, some_prompt().tokens)


def test_a_save_that_was_cut_off_between_its_renames_is_found_and_mended(saved, base):
    saved.rename(saved.with_name(".prompt.old"))
    with pytest.raises(CheckpointError, match=r"a save was interrupted, the previous prompt is .*\.prompt\.old"):
        load_prompt(saved, base)
    save_prompt(saved, base, METHOD, some_prompt(1), TEMPLATE)
    assert listing(saved.parent) == ["prompt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format version 2 is unknown; this library knows 1"),
        ({"format": True}, "format version True is unknown"),
        ({"format": None}, "format version None is unknown"),
        ({"licence": "MIT"}, "unknown key 'licence'"),
        ({"base__model": "x"}, "base: unknown key 'model'"),
        ({"base__fingerprint__weigths": "x"}, "base.fingerprint: unknown key 'weigths'; did you mean 'weights'"),
        ({"template__prompts": "x"}, "template: unknown key 'prompts'; did you mean 'prompt'"),
        ({"method__lenght": 3}, "method: unknown key 'lenght'; did you mean 'length'"),
        ({"method__init__rows": [[1.0]]}, "method.init: unknown key 'rows'"),
        ({"method__name": "prompt_tunning"}, "unknown method 'prompt_tunning'; did you mean 'prompt_tuning'"),
        ({"method__name": ["prompt_tuning"]}, "unknown method"),
        ({"base": None}, "'base' is missing"),
        ({"sha256": None}, "'sha256' is missing"),
        ({"template__prompt": None}, "template: 'prompt' is missing"),
        ({"base__fingerprint__version": 3}, "base.fingerprint.version is 3; this library knows 2"),
        ({"template__prompt": f"<soft:{'9' * 5000}>"}, r"prompt\.json: "),
        ({"template__prompt": "<soft>\ud83d{text}"}, "half of a surrogate pair is not a character"),
        ({"template__verbalizers": {"\ud83d": "a"}}, "half of a surrogate pair is not a character"),
        ({"base__fingerprint__config__width": 0}, "config.width is 0; it must be at least 1"),
        ({"base__fingerprint__config__layers": -3}, "config.layers is -3; it must be at least 1"),
        ({"base__fingerprint__config__width": None}, "base.fingerprint.config.width is None; expected int"),
        ({"base__fingerprint__config__layers": 10**9}, "config.layers is 1000000000; it must be at most 65536"),
        ({"base__fingerprint__config__heads": "4"}, "base.fingerprint.config.heads is '4'; expected int"),
        ({"base__fingerprint__config__heads": 3}, "config: 3 query heads cannot share 2 key/value heads evenly"),
        ({"method__length": "6"}, "method.length is '6'; expected int"),
        ({"method__length": True}, "method.length is True; expected int"),
        ({"method__length": 0}, "a soft prompt has at least 1 virtual token"),
        ({"method__init__labels": ["a", 1]}, r"method.init.labels is 1; expected str"),
        ({"method__init__scale": "1"}, "method.init.scale is '1'; expected float"),
        ({"method__init__scale": 10**400}, r"method.init.scale is 1000.*000; expected float"),
        ({"template__keep": "middle"}, "template.keep is 'middle'; expected"),
        ({"template__verbalizers": {"a": 1}}, "template.verbalizers.a is 1; expected str"),
        ({"template__verbalizers": ["a"]}, "template.verbalizers is"),
        ({"template__prompt": "{text"}, "lone '{' at character 0"),
        ({"template__prompt": "{text}"}, "has no <soft>"),
        ({"template": ["x"]}, "template is .'x'.; expected dict"),
        ({"sha256": "0" * 64}, "prompt.safetensors: damaged, or not the file that prompt.json was written with"),
        ({"tensors": {"tokens": np.zeros((LENGTH, WIDTH), np.float16)}}, "'tokens' is float16 .*must be float32"),
        ({"tensors": {"tokens": np.zeros((LENGTH, WIDTH), np.float64)}}, "'tokens' is float64"),
        ({"tensors": {"tokens": np.full((LENGTH, WIDTH), np.nan, np.float32)}}, "not finite"),
        ({"tensors": {"tokens": np.zeros((LENGTH + 1, WIDTH), np.float32)}}, r"\(7, 32\); it must be"),
        ({"tensors": {"tokens": np.zeros((LENGTH * WIDTH,), np.float32)}}, r"it must be float32 \(6, 32\)"),
        ({"tensors": {"other": np.zeros((LENGTH, WIDTH), np.float32)}}, "unknown key 'other'"),
        ({"tensors": {}}, "'tokens' is missing"),
    ],
)
def test_nothing_is_trusted(saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        read_prompt(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "format": 1,\n "method" {}\n}', "prompt.json, line 3, column 11: Expecting ':' delimiter"),
        (b"", "prompt.json, line 1"),
        (b"[1]", "holds .1., not a JSON object"),
        (b'{"format": 1, "format": 1}', "the key 'format' occurs twice"),
        (b'{"format": "\xff"}', "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "nested too deeply"),
        (b'{"format": NaN}', "NaN is not a JSON value"),
        (b" " * (9 << 20), "9,437,184 bytes; at most 8,388,608 are read"),
    ],
    ids=["syntax", "empty", "list", "twice", "utf-8", "deep", "nested", "NaN", "large"],
)
def test_json_that_is_none_is_refused_with_its_place(saved, content, message):
    (saved / "prompt.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_prompt(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize("size", [0, 4, 20, -1, 1])
def test_a_tensor_file_of_the_wrong_size_is_refused(saved, size):
    path = saved / "prompt.safetensors"
    content = path.read_bytes()
    damaged = content + b"\0" if size == 1 else content[:size]
    path.write_bytes(damaged)
    rewrite(saved, sha256=hashlib.sha256(damaged).hexdigest())
    with pytest.raises(CheckpointError, match=r"prompt\.safetensors: missing, truncated or damaged"):
        read_prompt(saved)


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory$"):
        read_prompt(tmp_path / "nowhere")
    (saved / "prompt.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"prompt\.safetensors: missing"):
        read_prompt(saved)


@pytest.mark.parametrize("width", [0, 32])
def test_a_billion_declared_rows_cost_nothing(saved, base, width):
    """What the JSON declares is compared with the base and with the tensors' header before any array is made."""
    rewrite(
        saved,
        {"tokens": np.zeros((10**9, 0), np.float32)},
        method__length=10**9,
        template__prompt="<soft>{text}",
        template__virtual_tokens=10**9,
        base__fingerprint__config__width=width,
    )
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_prompt, lambda folder: load_prompt(folder, base, force=True)):
        with pytest.raises(
            CheckpointError, match=r"width is 0; it must be at least 1|\(1000000000, 0\); it must be float32"
        ):
            read(saved)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # KiB


def test_another_base_is_refused_before_the_arrays_are_read(saved, other_base):
    (saved / "prompt.safetensors").unlink()
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_prompt(saved, other_base)


def test_what_is_not_the_directory_says_what_it_is(saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"is a file; give the directory .*/prompt$"):
        read_prompt(saved / "prompt.safetensors")
    with pytest.raises(CheckpointError, match=r"not a prompt directory; did you mean '.*/prompt'\?$"):
        read_prompt(saved.parent)
    with pytest.raises(CheckpointError, match=r"/none: no such directory$"):
        read_prompt(tmp_path / "none")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it is a PEFT adapter: convert it with .* import"):
        read_prompt(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_of_every_family_is_read_without_its_base(family, tmp_path):
    base = tiny_base(family)
    shapes = memory.spec(base.layout.attention_groups, LENGTH)
    virtual = VirtualPrompt(prefix=VirtualPrefix(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)))
    template = Template(prompt="{text}", target="{label}")
    directory = save_prompt(tmp_path / "prompt", base, PrefixTuning(length=LENGTH), virtual, template)
    saved = read_prompt(directory)
    assert saved.layout == base.layout
    jax.tree.map(np.testing.assert_array_equal, saved.virtual, virtual)
