"""Measures the engine with many prompts on one base: tokens per second, time to the first token, memory."""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.accelerator_stages import device
from benchmarks.accelerator_stages.process import Record, Task
from benchmarks.accelerator_stages.workload import FIRST_ID, Workload, prompt_rows, random_base, workload
from benchmarks.serve import first_token, medians, rate, share

LENGTH, OWN_IDS = 20, 30  # lengths of a prompt, and of a request after it
BOS_ID = 1


def sizes(tiny: bool) -> tuple[int, int, int, tuple[int, ...]]:
    """Returns slots, requests per round, new tokens of each, and numbers of prompts in ascending order."""
    return (2, 4, 2, (1, 3)) if tiny else (64, 192, 64, (1, 10, 100, 1000))


def own_ids(of: Workload, number: int) -> np.ndarray:
    """Returns the ids of a request after its prompt."""
    return np.random.default_rng(number).integers(FIRST_ID, of.model["vocab_size"], OWN_IDS).astype(np.int32)


def fill_bank(base: Any, count: int) -> Any:
    """Returns a bank of random, untrained prompts, which cost as much as trained ones; all are still on the host."""
    import dataclasses

    import spt_jax
    from spt_jax.prompts.storage import SavedPrompt

    bank, method = spt_jax.PromptBank(base), spt_jax.PromptTuning(length=LENGTH)
    template = spt_jax.Template(prompt="<soft><bos>{text}", target="{label}", virtual_tokens=LENGTH)
    info = {"base": {"fingerprint": dataclasses.asdict(base.fingerprint)}}
    rows, random = prompt_rows(LENGTH, base.config.width), np.random.default_rng(0)
    for number in range(count):
        moved = rows + np.float32(0.02) * random.standard_normal(rows.shape, np.float32)
        bank.add(f"p{number:04d}", SavedPrompt(method, spt_jax.VirtualPrompt(tokens=moved), template, info))
    return bank


def requests_of(of: Workload, names: Sequence[str | None], count: int, new_tokens: int) -> list[Any]:
    """Returns requests that cycle through the prompts; None names the bare base."""
    import spt_jax

    sampling = spt_jax.SamplingConfig(max_new_tokens=new_tokens)
    virtual = of.model["vocab_size"] + np.arange(LENGTH, dtype=np.int32)
    found = []
    for number in range(count):
        name = names[number % len(names)]
        front = np.asarray([BOS_ID], np.int32) if name is None else np.append(virtual, np.int32(BOS_ID))
        found.append(spt_jax.Request(np.concatenate([front, own_ids(of, number)]), name, sampling))
    return found


def put_on_device(bank: Any, names: Sequence[str], until: float) -> int:
    """Computes prompts' keys and values until `time.time()` exceeds `until`; returns how many are on the device."""
    for number, name in enumerate(names):
        if number and time.time() > until:
            return number
        bank.held(name)
    return len(names)


def run(task: Task, record: Record) -> None:
    """Options: leave (seconds to leave before the deadline)."""
    import jax

    import spt_jax
    from spt_jax.runtime import measure
    from spt_jax.testing import tiny_tokenizer

    of, (slots, requests, new_tokens, counts) = workload(task.tiny), sizes(task.tiny)
    end = task.deadline - task.options["leave"]
    start, clock = time.perf_counter(), measure.compile_clock()
    record.update(framework="spt_jax", slots=slots, new_tokens=new_tokens, facts=device.facts(), at="weights")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None  # every answer has its full length
    base = random_base(of, tokenizer=tokenizer)
    record.update(at="compilation", loaded_bytes=measure.peak_memory_bytes())
    bank = fill_bank(base, counts[-1])
    engine = spt_jax.Engine(bank, slots=slots, context=LENGTH + 1 + OWN_IDS + new_tokens + 32)
    names = bank.names

    def warm() -> None:
        for name in (names[0], None):
            engine.warm(bank.held(name), len(requests_of(of, [name], 1, 1)[0].ids))

    admission = threading.Thread(target=warm)
    admission.start()
    if not task.tiny:
        engine.warm_decoding()
    admission.join()
    for name in (names[0], None):  # one run of each kind; also raises errors that the thread had
        engine.generate(requests_of(of, [name], slots, new_tokens))
    record.update(at="prompts", start_seconds=round(time.perf_counter() - start, 2), compile_seconds=round(clock(), 2))

    prompts_start = time.time()
    held = put_on_device(bank, names, prompts_start + 0.5 * (end - prompts_start))
    counts = [count for count in counts if count <= held]
    record.update(
        at="rates",
        prompts_on_the_device=held,
        seconds_per_prompt=(time.time() - prompts_start) / held,
        prompt_bytes=bank.device_bytes,
    )
    ways: dict[str, Callable[[], float]] = {
        "0": lambda: rate(engine, requests_of(of, [None], requests, new_tokens)),
        **{
            str(n): lambda n=n: rate(engine, requests_of(of, names[:n], requests, new_tokens)) for n in reversed(counts)
        },
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    before, rounds, longest = clock(), 0, 0.0
    while rounds < (1 if task.tiny else 7) and time.time() + longest < end:
        round_start = time.time()
        order = [*ways][rounds % len(ways) :] + [*ways][: rounds % len(ways)]
        for name in order:
            rates[name].append(ways[name]())
        rounds, longest = rounds + 1, max(longest, time.time() - round_start)
        record.update(
            tokens_per_second=medians(rates),
            tokens_per_second_of_rounds=rates,
            share_of_one_prompt={name: share(rates, name, "1") for name in rates},
            share_of_the_base={name: share(rates, name, "0") for name in rates},
            compile_seconds_meanwhile=round(clock() - before, 2),
            peak_bytes=measure.peak_memory_bytes(),
        )
    if not rounds:
        raise TimeoutError("no time was left to measure rates")
    record.update(at="first tokens")
    firsts: dict[str, list[float]] = {"base": [], "prompt": []}
    for number in range(2 if task.tiny else 20):
        for kind, name in (("base", None), ("prompt", names[number % held])):
            firsts[kind].append(first_token(engine, requests_of(of, [name], 1, 8)[0]))
    record.update(
        at="end",
        first_token_milliseconds={kind: statistics.median(values) for kind, values in firsts.items()},
        peak_bytes=measure.peak_memory_bytes(),
    )
    jax.block_until_ready(base.params)
