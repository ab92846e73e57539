"""Every method of the family with options, parameters and examples that have something to show, on a tiny base."""

import dataclasses
from typing import Any

import jax
import numpy as np

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import Batch, multiples, pack, place_batch, plan_batches
from spt_jax.data.examples import Example
from spt_jax.prompts import METHODS
from spt_jax.training.objectives import CrossEntropy, Objective, VerbalizerCrossEntropy
from tests.examples import HEAD, VIRTUAL, VOCAB, random_examples

# Options beside the length, for methods that need some to be built or to have anything to show.
OPTIONS: dict[str, dict] = {
    "prefix_tuning": {"sink": 1},
    "decomposed_prompt_tuning": {"span": 12, "rank": 3},
    "deep_prompts": {"classes": 3, "sink": 1},
    "trained_tokens": {"ids": (5, 17, 40, 99, 120)},
    "cpt": {"kinds": (1, 2, 2, 3, 4)},
    "multitask_prompt_tuning": {"tasks": ("first", "second"), "rank": 2},
    "lopa": {"rank": 2, "hidden": 8},
}


# Options of the tiny base of a method that needs recurrent layers.
BASES: dict[str, dict] = {"state_tuning": {"family": "qwen3_5_text"}}


def has_length(name: str) -> bool:
    """Whether the method has virtual tokens or positions, whose number is its option `length`."""
    return any(field.name == "length" for field in dataclasses.fields(METHODS[name]))


def method_of(name: str) -> Any:
    length = {"length": VIRTUAL} if has_length(name) else {}
    return METHODS[name](**{**length, **OPTIONS.get(name, {})})


def moved_params(method: Any, base: FrozenBase, seed: int = 1) -> Any:
    """Parameters as after some training: zeros and ones, which hide mistakes, are moved away from."""
    params = method.init_params(jax.random.key(seed), base)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def fit_ids(method: Any, ids: np.ndarray) -> np.ndarray:
    """Ids without virtual ones for a method that has no token rows."""
    return ids if method.token_count else ids[ids < VOCAB]


def tasks_of(method: Any) -> int:
    return len(getattr(method, "tasks", ()))


def task_of(method: Any, index: int) -> int:
    """Which prompt an example is for: they take turns."""
    return index % max(1, tasks_of(method))


def has_head(method: Any, base: FrozenBase) -> bool:
    return method.spec(base.layout).head is not None


def examples_of(method: Any, base: FrozenBase) -> list[Example]:
    """Twelve examples that share `HEAD`, with three choices, or with three classes for a head."""
    examples = [(e, fit_ids(method, e.ids), task_of(method, e.index)) for e in random_examples("choices", 12)]
    plain = [
        dataclasses.replace(e, ids=ids, predicted=np.zeros(len(ids), bool), prompt=task) for e, ids, task in examples
    ]
    if method.per_input:
        plain = [e.reading(causal=True) for e in plain]
    if not has_head(method, base):
        return plain
    return [
        dataclasses.replace(e, choices=(), reads=np.asarray([len(e.ids) - 1]), classes=np.asarray([e.label]))
        for e in plain
    ]


def objective_of(method: Any, base: FrozenBase) -> Objective:
    return CrossEntropy() if has_head(method, base) else VerbalizerCrossEntropy(choices=3)


def batch_of(method: Any, base: FrozenBase, *, shared: bool, packing: bool, microbatches: int = 1) -> Batch:
    """The examples, placed on the base's mesh."""
    examples = examples_of(method, base)
    lead = len(fit_ids(method, HEAD)) if shared and not method.per_input else 0
    plan = plan_batches(
        examples,
        lead=[lead] * tasks_of(method) or lead,
        batch_size=len(examples),
        packing=packing,
        **multiples(base.mesh, microbatches),
    )
    return place_batch(pack(examples, plan), base.mesh)
