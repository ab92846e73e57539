"""Measures requests under long prompts whose memory the slots share (`serve --shared`), against copies in the slots.

    python benchmarks/shared.py                                        # the starter, 128 positions
    python benchmarks/shared.py --base PATH --positions 1024 --prompts 1 4 16

All requests run at once, decode greedily, and are divided evenly over the prompts, which are random prefixes. Prints
one line of JSON per number of prompts: tokens per second and milliseconds to the first token of a request that comes
when there are no others, in medians of wall time over alternating rounds; the memory of the slots in MiB; the ratios of
shared to copied; and how many answers are the same.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def bank_of(base: Any, positions: int, count: int) -> Any:
    """Returns a bank with `count` random prefixes of this length."""
    import jax

    import spt_jax

    bank, method = spt_jax.PromptBank(base), spt_jax.PrefixTuning(length=positions)
    template = spt_jax.Template(prompt="{text}", target="{target}")
    for number in range(count):
        virtual = method.materialize(method.init_params(jax.random.key(number), base), base.model)
        with tempfile.TemporaryDirectory() as name:
            spt_jax.save_prompt(Path(name) / "prompt", base, method, virtual, template)
            bank.add(f"p{number}", spt_jax.load_prompt(Path(name) / "prompt", base))
    return bank


def measure(engine: Any, requests: Sequence[Any]) -> tuple[dict[str, float], list[list[int]]]:
    """Runs one round; returns tokens per second, milliseconds to a first token, and the answers."""
    began = time.perf_counter()
    ticket = engine.submit(requests[0])
    while not ticket.ids:
        engine.step()
    first = time.perf_counter() - began
    engine.cancel(ticket)
    began = time.perf_counter()
    answers = [answer.ids for answer in engine.generate(requests)]
    rate = sum(map(len, answers)) / (time.perf_counter() - began)
    return {"tokens_per_second": rate, "first_token_ms": 1000 * first}, answers


def main() -> None:
    """Measures all numbers of prompts."""
    import spt_jax

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--positions", type=int, default=128)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = spt_jax.load_base(options.base, dtype="float32")
    random, sampling = np.random.default_rng(0), spt_jax.SamplingConfig(max_new_tokens=options.new_tokens)
    for count in options.prompts:
        bank = bank_of(base, options.positions, count)
        requests = [
            spt_jax.Request(random.integers(5, base.layout.vocab_size, 12).astype(np.int32), f"p{i % count}", sampling)
            for i in range(options.requests)
        ]
        own = 12 + options.new_tokens
        engines = {
            "copied": spt_jax.Engine(bank, slots=options.requests, context=options.positions + own),
            "shared": spt_jax.Engine(bank, slots=options.requests, context=own, shared=count * options.positions),
        }
        answers = {name: measure(engine, requests)[1] for name, engine in engines.items()}  # also compiles
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for turn in range(options.rounds):
            for name in list(engines)[:: -1 if turn % 2 else 1]:
                rounds[name].append(measure(engines[name], requests)[0])
        found = {
            name: {key: round(statistics.median(one[key] for one in own), 1) for key in own[0]}
            | {"slots_mib": round(engines[name].slot_bytes / 2**20, 1)}
            for name, own in rounds.items()
        }
        ratios = {key: round(found["shared"][key] / found["copied"][key], 3) for key in found["shared"]}
        same = sum(own == other for own, other in zip(answers["shared"], answers["copied"], strict=True))
        line = {"prompts": count, **found, "ratios": ratios, "same_answers": f"{same} of {len(requests)}"}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
