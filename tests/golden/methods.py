"""What every method computed in version 0.1: five steps of training, scores, generated ids, and the saved prompts.

    python -m tests.golden.methods

writes `prompts/` and `methods.safetensors` again. `tests/test_golden.py` compares with them.
"""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import safetensors.numpy

from spt_jax.bases.base import FrozenBase
from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.evaluation.evaluate import make_evaluation_set, score
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts import METHODS, Method, PromptParams
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import CrossEntropy, VerbalizerCrossEntropy
from spt_jax.training.step import init_state, make_train_step

PROMPTS = Path(__file__).parent / "prompts"
NUMBERS = Path(__file__).parent / "methods.safetensors"
FAMILIES = ("llama", "gemma2")
STEPS = 5
# The methods of version 0.1.
NAMES = (
    "prompt_tuning", "prefix_tuning", "p_tuning", "residual_prompt_tuning", "low_rank_prompt_tuning",
    "decomposed_prompt_tuning", "cpt", "llama_adapter", "deep_prompts", "multitask_prompt_tuning",
)  # fmt: skip

# Options beside the length, for methods that need some to be built or to show an effect.
OPTIONS: dict[str, dict] = {
    "prefix_tuning": {"sink": 1},
    "decomposed_prompt_tuning": {"span": 12, "rank": 3},
    "deep_prompts": {"classes": 3},
    "cpt": {"kinds": (1, 2, 2, 3, 4)},
    "multitask_prompt_tuning": {"tasks": ("first", "second"), "rank": 2},
}
LABELS = {"person": "H", "place": "L", "number": "N"}
TEXTS = ("Hello world", "the kind", "of a text", "is good", "What is the answer to it?", "42")
RECORDS = [
    {"text": text, "label": list(LABELS)[i % len(LABELS)], "task": ("first", "second")[i % 2]}
    for i, text in enumerate(TEXTS)
]


def method_of(name: str) -> Method:
    """A method with 5 virtual tokens."""
    return METHODS[name](length=5, **OPTIONS.get(name, {}))


def template_of(method: Method) -> Template:
    """The template that the method is trained with: virtual tokens, if any, on both sides of the text."""
    tasks = getattr(method, "tasks", ())
    soft = ("<soft:3>", "<soft:2>") if method.token_count else ("", "")
    return Template(
        prompt=f"{soft[0]}Question: {{text}}\nKind:{soft[1]}",
        target="{label}",
        virtual_tokens=method.token_count,
        verbalizers=LABELS,
        task="task" if tasks else None,
        tasks=tasks,
        head=getattr(method, "head", None) or "language_model",
    )


def trained(name: str, base: FrozenBase) -> tuple[dict[str, np.ndarray], PromptParams]:
    """Losses and gradient norms of five steps and the parameters after them: by name, and as they are."""
    method = method_of(name)
    template = template_of(method)
    encoder = Encoder(template, base.tokenizer, base.config.vocab_size, base.config.max_positions)
    examples = encoder.encode_all(RECORDS)
    plan = plan_batches(examples, lead=encoder.leads(examples), batch_size=len(examples))
    has_head = template.head != "language_model"
    objective = CrossEntropy() if has_head else VerbalizerCrossEntropy(choices=len(LABELS))
    optimizer = optax.sgd(0.3, momentum=0.9)
    state = init_state(jax.random.key(0), base, method, optimizer)
    step = make_train_step(base, method, optimizer, objective)
    batch = place_batch(pack(examples, plan), base.mesh)
    metrics = []
    for _ in range(STEPS):
        state, values = step(state, batch)
        metrics.append((float(values["loss"]), float(values["gradient_norm"])))
    numbers = {"metrics": np.asarray(metrics, np.float32)}
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    numbers |= {f"params{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    return numbers, state.params


def answers(folder: Path, base: FrozenBase) -> dict[str, np.ndarray]:
    """Scores of the classes for every record by a saved prompt and, unless it has a head, the ids that it generates."""
    saved = load_prompt(folder, base)
    encoder = Encoder(saved.template, base.tokenizer, base.config.vocab_size, base.config.max_positions)
    numbers = {"scores": score(base, make_evaluation_set(base, encoder, RECORDS), saved.virtual)}
    if saved.virtual.head is None:
        prompts = [encoder.prompt_ids(record) for record in RECORDS]
        continued = generate(base, prompts, saved.virtual, SamplingConfig(max_new_tokens=6))
        ids = np.full((len(prompts), 6), -1, np.int32)
        log_probabilities = np.zeros((len(prompts), 6), np.float32)
        for i, answer in enumerate(continued):
            ids[i, : len(answer.ids)] = answer.ids
            log_probabilities[i, : len(answer.ids)] = answer.log_probabilities
        numbers |= {"ids": ids, "log_probabilities": log_probabilities}
    return numbers


def main() -> None:
    """Writes the prompts and the numbers."""
    shutil.rmtree(PROMPTS, ignore_errors=True)
    numbers = {}
    for family in FAMILIES:
        base = tiny_base(family)
        for name in NAMES:
            own, params = trained(name, base)
            numbers |= {f"{family}/{name}/{key}": value for key, value in own.items()}
            method = method_of(name)
            virtual = method.materialize(params, base.model)
            for part, (single, prompt) in method.artifacts(virtual, params).items():
                folder = PROMPTS / family / (f"{name}_{part}" if part else name)
                folder.parent.mkdir(parents=True, exist_ok=True)
                save_prompt(folder, base, single, prompt, _single(template_of(method)))
                key = f"{family}/{folder.name}"
                numbers |= {f"{key}/{key_}": value for key_, value in answers(folder, base).items()}
    safetensors.numpy.save_file(numbers, NUMBERS)


def _single(template: Template) -> Template:
    """The template of one task's own prompt."""
    return Template(
        prompt=template.prompt,
        target=template.target,
        virtual_tokens=template.virtual_tokens,
        verbalizers=template.verbalizers,
        head=template.head,
    )


if __name__ == "__main__":
    sys.exit(main())
