"""Checks of generation, serving, populations and resumed runs on the device.

Generation is compared with the CPU, the engine with answers one by one, a population with separate runs of its members,
and a killed and resumed run with an uninterrupted one.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import spt_jax
from benchmarks.accelerator_stages import resumed_run
from benchmarks.accelerator_stages.process import run_process
from benchmarks.accelerator_stages.right_models import (
    accelerator,
    moved_base,
    on_device,
    prompt_batch,
    prompt_params,
    reference_base,
)
from spt_jax.inference.answers import Generated
from spt_jax.inference.generation import SamplingConfig
from spt_jax.prompts import PrefixTuning, PromptTuning
from spt_jax.prompts.storage import SavedPrompt
from spt_jax.runtime.sharding import replicated
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.optimizers import OptimizerConfig, make_optimizer, resolve_optimizer
from spt_jax.training.population import make_population_step, stack_batches
from spt_jax.training.step import TrainState, make_train_step
from tests.examples import VIRTUAL, random_examples
from tests.family import moved_params

GREEDY, SAMPLED = SamplingConfig(max_new_tokens=7), SamplingConfig(max_new_tokens=9, temperature=1.3, seed=5)
PROMPTS = {
    "front": (PromptTuning(length=3), "<soft>{text}\n"),
    "end": (PromptTuning(length=5), "Say {text}\n<soft>"),
    "keys": (PrefixTuning(length=4), "A word: {text}\n"),
}
RESUME_SECONDS = 600.0  # longer than the stage


def answers_apart(ours: Sequence[Generated], theirs: Sequence[Generated]) -> dict[str, float]:
    """Returns the number of different answers, and the largest difference in log-probabilities between equal ones."""
    same = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.ids == b.ids]
    gaps = [np.abs(np.subtract(a.log_probabilities, b.log_probabilities)).max() for a, b in same]
    return {"differing_answers": len(ours) - len(same), "log_probabilities": float(max(gaps, default=0.0))}


def generation() -> Mapping[str, float]:
    """Checks greedy answers with a prompt."""
    method, reference = PromptTuning(length=VIRTUAL), reference_base("llama")
    rows = prompt_params("llama")["tokens"]
    prompts = [example.ids for example in random_examples("choices", 3)]

    def answers(base: Any) -> list[Generated]:
        with on_device(base.mesh.devices.flat[0]):
            virtual = method.materialize({"tokens": rows}, base.model)
            return spt_jax.generate(base, prompts, virtual, GREEDY)

    return answers_apart(answers(moved_base(reference, accelerator())), answers(reference))


def engine(names: Sequence[str] = tuple(PROMPTS)) -> Mapping[str, float]:
    """Checks a mixture of prompts, lengths and sampling configs against each request by itself."""
    base = moved_base(reference_base("llama"), accelerator())
    with on_device(accelerator()):
        bank = spt_jax.PromptBank(base)
        info = {"base": {"fingerprint": dataclasses.asdict(base.fingerprint)}}
        for name in names:
            method, prompt = PROMPTS[name]
            virtual = method.materialize(moved_params(method, base), base.model)
            template = spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=method.token_count)
            bank.add(name, SavedPrompt(method, virtual, template, info))
        requests = []
        for number, text in enumerate(["a question", "the"]):
            for place, name in enumerate([*names, None]):
                ids = bank.request_ids(name, {"text": text}) if name else np.asarray([1, 40, 41 + number], np.int32)
                requests.append(spt_jax.Request(ids, name, (GREEDY, SAMPLED)[(number + place) % 2]))
        ours = spt_jax.Engine(bank, slots=3).generate(requests)
        theirs = []
        for request in requests:
            virtual = None if request.prompt is None else bank.entry(request.prompt).virtual
            theirs += spt_jax.generate(base, [request.ids], virtual, request.sampling)
    return answers_apart(ours, theirs)


def population() -> Mapping[str, float]:
    """Checks two steps of three members against separate runs."""
    base, method = moved_base(reference_base("llama"), accelerator()), PromptTuning(length=VIRTUAL)
    config, steps, members = resolve_optimizer(OptimizerConfig(name="adam", learning_rate=0.01), "llama"), 4, 3
    with on_device(accelerator()):
        optimizer, batch = make_optimizer(config, steps), prompt_batch(base, True)
        stacked = stack_batches([jax.tree.map(np.asarray, batch)] * members)

        def fresh(member: int) -> TrainState:
            params = {"tokens": jnp.asarray(prompt_params("llama")["tokens"] + np.float32(0.01 * member))}
            state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
            return jax.device_put(state, replicated(base.mesh))

        together = make_population_step(base, method, config, steps, CrossEntropy())
        step = make_train_step(base, method, optimizer)
        states, singles = [fresh(member) for member in range(members)], [fresh(member) for member in range(members)]
        rates = jnp.full(members, config.learning_rate, jnp.float32)
        loss = 0.0
        for _ in range(2):
            states, metrics = together(states, rates, stacked)
            for member in range(members):
                singles[member], own = step(singles[member], batch)
                loss = max(loss, abs(float(metrics["loss"][member]) / float(own["loss"]) - 1))
        pairs = zip(states, singles, strict=True)
        apart = [jnp.abs(a.params["tokens"] - b.params["tokens"]).max() for a, b in pairs]
    return {"loss": loss, "prompt": float(max(apart))}


def resume() -> Mapping[str, float]:
    """Compares a run that is killed in another process and resumed here with an uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "killed"
        uninterrupted = resumed_run.train(Path(folder) / "whole")
        killed = run_process(
            resumed_run.__name__,
            Path(folder) / "killed.json",
            seconds=RESUME_SECONDS,
            tiny=False,
            log=Path(folder) / "log",
            options={"workdir": str(workdir)},
        )
        if "exit code -9" not in killed.get("error", ""):
            raise RuntimeError(f"the run was not killed: {killed}")
        resumed = resumed_run.train(workdir, resume=True)
    first = min(resumed.losses)
    if not 1 < first <= resumed_run.KILL_AT + 1:
        raise RuntimeError(f"the run resumed at step {first}")
    pairs = [(uninterrupted.losses[step], loss) for step, loss in resumed.losses.items()]
    pairs += zip(uninterrupted.prompt.tolist(), resumed.prompt.tolist(), strict=True)
    return {"differing_numbers": sum(a != b for a, b in pairs)}
