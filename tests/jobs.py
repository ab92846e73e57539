"""A small classification job for `train.py`: its files, its command line, and what it left."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training import single

ROOT = Path(__file__).parents[1]
# Fields of results.json and metrics.jsonl that differ between two runs of one job.
MEASURED = ("train_seconds", "compile_seconds", "examples_per_second", "tokens_per_second", "flops_utilization",
            "peak_memory_bytes", "command", "date")  # fmt: skip


def unmeasured(value: object) -> object:
    """A value of JSON without the fields that differ between two runs of one job, at any depth."""
    if isinstance(value, dict):
        return {name: unmeasured(field) for name, field in value.items() if name not in MEASURED}
    return [unmeasured(element) for element in value] if isinstance(value, list | tuple) else value


def history(workdir: Path) -> object:
    """The lines of metrics.jsonl, without what is measured."""
    return unmeasured([json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()])


@contextlib.contextmanager
def stopped_at_batch(number: int, by: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """Inside it, this process gets a signal when a run places its batch of this number, from 1."""
    place, calls = single.place_batch, []

    def place_and_stop(batch, mesh):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), by)
        return place(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "place_batch", place_and_stop)
        yield


WORDS = {"good": ("good", "nice", "fine", "great"), "bad": ("bad", "poor", "awful", "sad")}


def write_task(folder: Path) -> None:
    """A tiny checkpoint in model/, and a task that a word decides."""
    write_tiny_checkpoint(folder / "model", "llama")
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("validation", 20), ("test", 30)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                label = str(rng.choice(list(WORDS)))
                words = [str(rng.choice(["the", "a", "was", "is"])) for _ in range(rng.integers(1, 6))]
                file.write(
                    json.dumps({"text": " ".join([*words, str(rng.choice(WORDS[label]))]), "label": label}) + "\n"
                )


def words(files: Path, workdir: Path, *more: str) -> list[str]:
    flags = {
        "--workdir": workdir,
        "--base.path": files / "model",
        "--method.length": 4,
        "--data.train": files / "train.jsonl",
        "--data.validation": files / "validation.jsonl",
        "--data.test": files / "test.jsonl",
        "--data.prompt": r"<soft>{text}\n",
        "--data.target": "{label}",
        "--train.steps": 40,
        "--train.batch-size": 8,
        "--train.evaluate-every": 10,
        "--train.checkpoint-every": 20,
    }
    line = [str(ROOT / "configs" / "local_files.py")]
    for name, value in flags.items():
        line += [name, str(value)]
    return [
        *line,
        "--data.verbalizers",
        "good=H",
        "bad=L",
        "--data.hard-prompt",
        r"{text}\nIt was",
        r"Is {text} good?\n",
        *more,
    ]


def arrays(workdir: Path) -> np.ndarray:
    return load_file(workdir / "prompt" / "prompt.safetensors")["tokens"]


def losses(workdir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
