"""Damaged prompts, PEFT directories and arrays: whatever a file holds, it is read or refused by an error of ours."""

import hashlib
import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.errors import SptError
from spt_jax.evaluation.inspection import describe_prompt
from spt_jax.interop import import_npy, import_peft
from spt_jax.interop.peft import default_template
from spt_jax.prompts import (
    DeepPrompts,
    LlamaAdapter,
    PrefixTuning,
    PrefixTuningPlus,
    PromptTuning,
    RepresentationFinetuning,
    initializers,
)
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.storage import load_prompt, read_prompt, save_prompt
from spt_jax.testing import tiny_base
from tests.hostile.mutations import changed_file, limits, mutated_bytes
from tests.interop.test_interop import head_directory, noise, peft_directory

P, D = 4, 32
ROUNDS = 60
CLASSES = {"a": "yes", "b": "no"}
PROMPTS = {
    "tokens": (PromptTuning(length=P), {"prompt": "<soft:2>{text}<soft:2>", "truncate": "text"}),
    "prefix": (PrefixTuning(length=P), {"prompt": "{text}"}),
    "head": (DeepPrompts(length=P, classes=2), {"prompt": "{text}", "head": "classification", "verbalizers": CLASSES}),
    "gated": (LlamaAdapter(length=P, layers=2), {"prompt": "{text}"}),
    "linear": (PrefixTuningPlus(), {"prompt": "{text}"}),
    "edits": (RepresentationFinetuning(rank=2), {"prompt": "{text}"}),
}


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def read_or_refused(attempt: Callable[[], object], label: str) -> bool:
    """Whether a file was read; any error but ours, or one too long or damaged to print, fails the test."""
    try:
        with limits():
            attempt()
    except SptError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {str(error)[:500]}") from error
    else:
        return True
    message.encode()
    assert len(message) < 5000, f"{label}: a message of {len(message)} characters: {message[:500]}"
    return False


def use(base, template: Template) -> None:
    encoder = Encoder(template, base.tokenizer, base.config.vocab_size, 64)
    encoder.prompt_ids(
        dict.fromkeys(template.prompt_fields, "Hello") | {"messages": [{"role": "user", "content": "a"}]}
    )


@pytest.mark.parametrize("name", list(PROMPTS))
def test_prompts(name, base, tmp_path):
    method, options = PROMPTS[name]
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    template = Template(target="{label}", virtual_tokens=method.token_count, **options)
    sound = save_prompt(tmp_path / "sound", base, method, virtual, template, extra={"command": ["train.py"]})
    assert read_prompt(sound).template == template

    def attempt(folder: Path) -> None:
        describe_prompt(read_prompt(folder))
        use(base, load_prompt(folder, base).template)

    for seed in range(ROUNDS):
        rng, folder = random.Random(seed), tmp_path / "damaged"
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        tensors, info = folder / "prompt.safetensors", folder / "prompt.json"
        changed_file(rng.choice((tensors, info, info)), rng)
        if rng.random() < 0.9:  # as someone would who computes the sum anew
            old, new = (hashlib.sha256(f.read_bytes()).hexdigest() for f in (sound / tensors.name, tensors))
            info.write_bytes(info.read_bytes().replace(old.encode(), new.encode()))
        read_or_refused(lambda folder=folder: attempt(folder), f"{name}, seed {seed}")


def peft_directories(folder: Path) -> dict[str, Path]:
    tasks = {"prefix_task_cols": noise(3, P, 2), "prefix_task_rows": noise(3, 2, D)}
    adapter = {
        f"base_model.model.model.layers.{i}.self_attn.adaption_{part}": noise(*shape)
        for i in (1, 2)
        for part, shape in (("prompt", (1, P, D)), ("gate", (1,)))
    }
    counts = {"num_tasks": 3, "num_ranks": 2}
    sizes = {"adapter_len": P, "adapter_layers": 2}
    rows = {"prompt_embeddings": noise(P, D)}
    return {
        "tokens": peft_directory(folder / "tokens"),
        "tasks": peft_directory(folder / "tasks", rows | tasks, peft_type="MULTITASK_PROMPT_TUNING", **counts),
        "adapter": peft_directory(folder / "adapter", adapter, peft_type="ADAPTION_PROMPT", **sizes),
        "head": head_directory(folder / "head", "SEQ_CLS", "score", 3, bias=False),
    }


@pytest.mark.parametrize("name", ["tokens", "tasks", "adapter", "head"])
def test_peft_directories(name, base, tmp_path):
    sound, task = peft_directories(tmp_path)[name], 1 if name == "tasks" else None
    import_peft(sound, base, task=task)

    def attempt(folder: Path) -> None:
        method, _ = import_peft(folder, base, task=task)
        prompt = default_template(base, method)
        use(base, Template(prompt=prompt, target="{target}", virtual_tokens=method.token_count))

    for seed in range(ROUNDS):
        rng, folder = random.Random(seed), tmp_path / "damaged"
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        changed_file(folder / rng.choice(("adapter_config.json", "adapter_model.safetensors")), rng)
        read_or_refused(lambda folder=folder: attempt(folder), f"{name}, seed {seed}")


def test_arrays(base, tmp_path):
    content = io.BytesIO()
    np.save(content, noise(P, D))
    path, was_read = tmp_path / "rows.npy", 0
    shapes = [
        "(4, 32)",
        "(-4, 32)",
        "(4, -32)",
        "(10**9, 32)",
        f"({10**18}, 0)",
        "(" * 90 + ")" * 90,
        "[4]",
        "(4.0, 32)",
    ]
    kinds = ["<f4", "<f8", ">f2", "|O", "<U9", "|V9", "[('a', '<f4')]", "<M8[s]", "<c8", "<f16", "", "f4,f4"]
    for seed in range(2 * ROUNDS):
        rng, damaged = random.Random(seed), content.getvalue()
        if rng.random() < 0.5:
            damaged = damaged.replace(b"(4, 32)", rng.choice(shapes).encode())
            damaged = damaged.replace(b"<f4", rng.choice(kinds).encode())
        if rng.random() < 0.7:
            damaged = mutated_bytes(damaged[:140], rng) + damaged[140:]
        path.write_bytes(damaged)
        was_read += read_or_refused(lambda: import_npy(path, base), f"import, seed {seed}")
        start = initializers.file(path)
        read_or_refused(lambda start=start: initialize(start, jax.random.key(0), base, P), f"start, seed {seed}")
    assert 0 < was_read < 2 * ROUNDS


def test_declared_sizes_cost_nothing(base, tmp_path):
    """A small file that declares gigabytes, for every kind that says how long it is."""
    for name, config in {
        "zero": {"num_virtual_tokens": 0},
        "huge": {"num_virtual_tokens": 10**9},
        "ranks": {"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 10**5, "num_ranks": 32},
        "adapter": {"peft_type": "ADAPTION_PROMPT", "adapter_len": 10**9, "adapter_layers": 3},
    }.items():
        tensors = {"prompt_embeddings": np.zeros((10**9, 0), np.float32)}
        folder = peft_directory(tmp_path / name, tensors, **config)
        task = 0 if name == "ranks" else None
        assert not read_or_refused(lambda folder=folder, task=task: import_peft(folder, base, task=task), name)
