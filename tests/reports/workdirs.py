"""Work directories as the commands leave them, small and written by hand, with a hostile text in every place."""

import json
from pathlib import Path

MARKUP = '<img src="http://example.com/x.png" onerror="window.broken = true"></td></script>'
CLASSES = ("good", f"bad {MARKUP}")
CONFIG = {
    "base": {"path": f"model {MARKUP}"},
    "data": {"prompt": f"<soft>{{text}} {MARKUP}", "target": "{label}", "verbalizers": dict.fromkeys(CLASSES, "yes")},
    "method": {"name": "prompt_tuning"},
    "inputs": {"data": {f"train {MARKUP}": ["ab12"]}},
}
FACTS = {
    "device": f"cpu {MARKUP}",
    "versions": {"jax": "0.10.2"},
    "command": f"spt-jax train x --data.prompt '{MARKUP}'",
    "date": "2026-01-02T03:04:05+00:00",
    "git_commit": "0123456789ab",
    "nearest_tokens": [[[MARKUP, 0.5], ["\u2581jazz", 0.25]], [["a", 0.75], ["b", 0.125]]],
}
# For each record: the right class, and the classes that the soft and the written prompt predict.
ANSWERS = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 0), (1, 1, 0), (1, 0, 0)]


def write(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def class_facts(guess: int) -> dict:
    """`class_report` of these answers, counted by hand."""
    counts = [[0, 0, 0], [0, 0, 0]]
    for answer in ANSWERS:
        counts[answer[0]][answer[guess]] += 1
    scores = {name: {"precision": 0.5, "recall": 0.25, "f1": 0.125, "records": 3} for name in CLASSES}
    return {"names": list(CLASSES), "confusion": counts, "scores": scores}


def predictions(name: str, guess: int) -> list[dict]:
    return [
        {
            "prompt": name,
            "record": number,
            "fields": {"text": f"record {number} {MARKUP}"},
            "label": CLASSES[answer[0]],
            "prediction": CLASSES[answer[guess]],
        }
        for number, answer in enumerate(ANSWERS, 1)
    ]


def write_run(workdir: Path) -> Path:
    soft, hard = ({"accuracy": a, "accuracy_interval": [0.2, 0.9], "loss": 0.5, "examples": 6} for a in (4 / 6, 0.5))
    scores = {"soft_prompt": soft, "hard_prompt": {**hard, "text": f"Is it {MARKUP}?"}, "no_prompt": None}
    against = {
        "measure": "accuracy",
        "ahead": 1 / 6,
        "ahead_interval": [-0.2, 0.6],
        "p_bootstrap": 0.4,
        "p_mcnemar": 0.625,
    }
    results = {
        "validation": scores,
        "test": scores,
        "classes": {"soft_prompt": class_facts(1), "hard_prompt": class_facts(2), "no_prompt": None},
        "soft_against_written": against,
        "steps": 120,
        "best_step": 80,
        "trainable_parameters": 640,
        "prompt_bytes": 12_345,
        **FACTS,
    }
    write(workdir / "config.json", CONFIG)
    write(workdir / "results.json", results)
    losses = [{"step": step, "loss": 2 / step} for step in range(1, 121)]
    validated = [{"step": step, "validation": {"accuracy": step / 200}} for step in range(20, 121, 20)]
    write(workdir / "metrics.jsonl", *losses, *validated)
    write(workdir / "predictions.jsonl", *predictions("soft_prompt", 1), *predictions("hard_prompt", 2))
    return workdir


def write_comparison(workdir: Path) -> Path:
    names = f"soft prompt: out/{MARKUP}", f"hand-written: {MARKUP}", "linear probe"
    costs = {"trainable_parameters": None, "bytes": 7_654, "train_seconds": 1.0, "test_seconds": 2.0}
    shared = {"records": 6, "measure": "accuracy", "accuracy_interval": [0.2, 0.8], "extra_tokens": 3.0, **costs}
    table: list[dict[str, object]] = [
        {"name": name, "accuracy": value, **shared} for name, value in zip(names, (0.75, 0.5, 0.25), strict=True)
    ]
    for row in table[1:]:
        row |= {"ahead": 0.25, "ahead_interval": [0.1, 0.4], "p_bootstrap": 0.03, "p_mcnemar": 0.04}
    write(workdir / "config.json", {"config": CONFIG})
    write(workdir / "compare.json", {"table": table, "classes": {names[0]: class_facts(1)}, **FACTS})
    write(workdir / "predictions.jsonl", *predictions(names[0], 1), *predictions(names[1], 2))
    return workdir


def write_sweep(workdir: Path) -> Path:
    """Four trials of one population, of which the third one is chosen and the others were halved."""
    rate = "optimizer.learning_rate"
    estimate = {"mean": 0.75, "standard_error": 0.1, "interval": [0.55, 0.95]}
    chosen = {"settings": {rate: "0.3"}, "trials": [3], "validation": estimate, "test": estimate}
    rows = [
        {
            "trial": number,
            rate: number / 10,
            "seed": 0,
            "status": "finished" if number == 3 else f"halved at step 4 {MARKUP}",
            "steps": 16 if number == 3 else 4,
            "best_step": 4,
            "validation.accuracy": number / 8,
            "test.accuracy": 0.5,
        }
        for number in (1, 2, 3, 4)
    ]
    results = {
        "measure": "accuracy",
        "settings": [chosen],
        "chosen": {**chosen, "trial": 3, "reason": "the highest mean on validation"},
        "ensemble": None,
        "trials": 4,
        "steps": 28,
        "classes": {"split": "test", **class_facts(1)},
        **FACTS,
    }
    write(workdir / "config.json", {**CONFIG, "sweep": {"halving": True}})
    write(workdir / "results.json", results)
    write(workdir / "trials.jsonl", *({"settings": {}, "seed": 0, "row": row} for row in rows))
    write(workdir / "populations" / "001" / "members.json", [1, 2, 3, 4])
    lines = [{"step": 4, "validation": {str(i): {"accuracy": 0.2 + 0.1 * i}}} for i in range(4)]
    lines += [{"step": step, "validation": {"2": {"accuracy": step / 20}}} for step in (8, 12, 16)]
    write(workdir / "populations" / "001" / "metrics.jsonl", *lines)
    own = [{**line, "split": "test"} for line in predictions("x", 1)]
    write(workdir / "trials" / "003" / "predictions.jsonl", *own)
    return workdir


WRITERS = {"run": write_run, "comparison": write_comparison, "sweep": write_sweep}
