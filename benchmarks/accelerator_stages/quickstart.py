"""Runs the shipped task end to end: `train.py configs/quickstart.py` in a temporary work directory."""

import json
import tempfile
import time
from pathlib import Path

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import ROOT, Record, Task

FIGURES = ("train_seconds", "compile_seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes")

TINY = ["--train.steps", "4", "--train.batch-size", "8", "--data.limit", "16", "--data.hard-prompt", "Topic of {text}:"]


def run(task: Task, record: Record) -> None:
    """Trains in this process and records the results. The prompt must be better than the best hand-written one."""
    import train

    record.update(**device.facts())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = [str(ROOT / "configs" / "quickstart.py"), "--workdir", str(Path(folder) / "run")]
        words += TINY if task.tiny else []
        code = train.main(words)
        if code:
            raise RuntimeError(f"train.py ended with exit code {code}")
        results = json.loads((Path(folder) / "run" / "results.json").read_text())
    accuracies = {name: metrics["accuracy"] for name, metrics in results["test"].items()}
    soft, hard = accuracies["soft_prompt"], accuracies["hard_prompt"]
    record.update(
        wall_seconds=round(time.perf_counter() - start, 2),
        accuracy=accuracies,
        **{name: results[name] for name in FIGURES},
        summary=f"test accuracy {soft:.3f}, {hard:.3f} with the best hand-written prompt",
    )
    if not task.tiny and soft <= hard:
        record.update(status="failed", error=f"the trained prompt is no better than a hand-written one: {accuracies}")
