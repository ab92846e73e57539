"""Trains LoRA through PEFT on the data and steps of a run, for `spt-jax compare --others LoRA=DIRECTORY`.

    python benchmarks/lora.py configs/quickstart.py --workdir out/lora [--rates 0.001 0.003 0.01]

Takes the same options as train.py, and the rates, whose default is here. Records are formatted with the run's template
without virtual tokens. The loss is over the verbalizers, and Adam's learning rate decays linearly to 0. Validation
chooses among the rates and, within each run, among all evaluations. Writes facts.json and predictions.jsonl. Needs
torch and peft.
"""

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spt_jax.bases.base import local_directory
from spt_jax.data.examples import Example
from spt_jax.errors import ConfigError
from spt_jax.evaluation.evaluate import EvaluationSet, from_scores
from spt_jax.evaluation.predictions import predictions_jsonl
from spt_jax.experiment.command_line import parse_train
from spt_jax.experiment.config import resolve
from spt_jax.experiment.run import load_experiment
from spt_jax.studies.comparison import FACTS_FILE, PREDICTIONS_FILE, Facts

RATES = (1e-3, 3e-3, 1e-2)
RANK, ALPHA = 8, 16


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns the ids of rows padded on the left, their mask, and their positions."""
    import torch

    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    for own, row in zip(ids, rows, strict=True):
        own[length - len(row) :] = row
    padding = length - np.asarray([[len(row)] for row in rows])
    places = np.arange(length) - padding
    arrays = {"input_ids": ids, "attention_mask": (places >= 0).astype(int), "position_ids": places.clip(0)}
    return {name: torch.tensor(array) for name, array in arrays.items()}


def class_scores(model: Any, examples: Sequence[Example]) -> Any:
    """Returns the log-probabilities [B, C] of the classes' tokens after each prompt."""
    import torch

    choices = [choice.tolist() for choice in examples[0].choices]
    # The first row of an example also shows the first token of every class.
    longer = [number for number, choice in enumerate(choices) if len(choice) > 1]
    tails = [choices[number][:-1] for number in longer] or [[]]
    rows = [[*example.ids.tolist(), *tail] for tail in tails for example in examples]
    outputs = model(**padded(rows), logits_to_keep=max(map(len, tails)) + 1)
    logs = torch.log_softmax(outputs.logits.float(), dim=-1).unflatten(0, (len(tails), len(examples)))
    found = []
    for number, choice in enumerate(choices):
        tail = longer.index(number) if number in longer else 0
        first = -1 - len(tails[tail])  # from the end: where the first token of a class is predicted
        found.append(sum(logs[tail, :, first + place, token] for place, token in enumerate(choice)))
    return torch.stack(found, dim=1)


def scores(model: Any, data: EvaluationSet) -> np.ndarray:
    """Returns the class scores of all records, in order."""
    import torch

    model.eval()
    with torch.no_grad():
        found = [class_scores(model, data.examples[start : start + 64]) for start in range(0, len(data.examples), 64)]
    model.train()
    return torch.cat(found).numpy()


def batches(examples: Sequence[Example], size: int, steps: int, seed: int) -> Iterator[list[Example]]:
    """Yields batches of examples, in a new order in every epoch."""
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += rng.permutation(len(examples)).tolist()
        yield [examples[i] for i in order[:size]]
        del order[:size]


def train(folder: Path, examples: Sequence[Example], validation: EvaluationSet, config: Any, rate: float) -> Any:
    """Trains at one rate; returns the best model, its validation metrics, and the seconds of all steps."""
    import peft
    import torch
    import transformers

    torch.manual_seed(config.seed)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    best, metrics, seconds = None, {"accuracy": -1.0}, 0.0
    model.train()
    for step, batch in enumerate(batches(examples, config.batch_size, config.steps, config.seed), 1):
        start_time = time.perf_counter()
        labels = torch.tensor([example.label for example in batch])
        loss = torch.nn.functional.cross_entropy(class_scores(model, batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start_time
        if step % config.evaluate_every == 0 or step == config.steps:
            now = from_scores(validation, list(scores(model, validation))).metrics
            print(f"rate {rate}: step {step}, validation accuracy {now['accuracy']:.3f}", flush=True)
            if now["accuracy"] > metrics["accuracy"]:
                best, metrics = copy.deepcopy(model), now
    return best, metrics, seconds


def main(argv: Sequence[str]) -> None:
    """Trains, evaluates on the test records, and writes the results."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--rates", type=float, nargs="+", default=RATES)
    own, others = options.parse_known_args(argv)
    command = parse_train(others)
    experiment = load_experiment(resolve(command.config))
    config, records = experiment.config, (experiment.train, experiment.validation, experiment.test)
    if records[1] is None or records[2] is None or not experiment.template.verbalizers:
        raise ConfigError("this benchmark needs validation and test records, and verbalizers")
    template = experiment.template.bare()
    examples = experiment.encoder(template).encode_all(records[0])
    validation, test = (experiment.evaluation_set(own, template) for own in records[1:])  # type: ignore[arg-type]
    folder = local_directory(config.base.path, config.base.revision)
    runs = [train(folder, examples, validation, config.train, rate) for rate in own.rates]
    model, metrics, seconds = max(runs, key=lambda run: run[1]["accuracy"])
    start_time = time.perf_counter()
    result = from_scores(test, list(scores(model, test)))
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    facts = Facts(
        trainable_parameters=numbers,
        bytes=4 * numbers,
        train_seconds=round(seconds, 2),
        test_seconds=round(time.perf_counter() - start_time, 2),
    )
    command.workdir.mkdir(parents=True, exist_ok=True)
    (command.workdir / PREDICTIONS_FILE).write_text(predictions_jsonl({"LoRA": result.predictions}))
    (command.workdir / FACTS_FILE).write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n")
    print(f"validation {metrics['accuracy']:.3f}, test {result.metrics['accuracy']:.3f}; written to {command.workdir}")


if __name__ == "__main__":
    main(sys.argv[1:])
