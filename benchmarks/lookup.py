"""Measures decoding with drafts from earlier text (`serve --lookup`) against plain decoding, alternately.

    python benchmarks/lookup.py                                  # the starter, 1, 4 and 16 requests
    python benchmarks/lookup.py --base PATH --requests 1 4       # another base

`repeating` asks for text that the request has, `other` for new text; decoding is greedy. Figures are tokens per second
of processor time of all threads, so other work on the machine distorts them little. Prints one line of JSON per
measurement: medians over the rounds, their ratio, and how many answers are the same.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
SENTENCE = "{name} met a red fox near the old mill and gave it {number} small apples. "
TASKS = {"repeating": SENTENCE * 2 + "{name} met", "other": "{name} went to the park with {number} friends. They"}


def requests_of(bank: Any, task: str, count: int, new_tokens: int) -> list[Any]:
    """Returns greedy requests of a task to the bare base, whose texts differ."""
    import spt_jax

    sampling = spt_jax.SamplingConfig(max_new_tokens=new_tokens)
    texts = [TASKS[task].format(name=NAMES[i % len(NAMES)], number=i + 2) for i in range(count)]
    return [spt_jax.Request(bank.request_ids(None, {"text": text}), None, sampling) for text in texts]


def measure(engine: Any, requests: Sequence[Any]) -> tuple[float, list[list[int]]]:
    """Returns the new tokens per second of processor time, and the answers."""
    start = time.process_time()
    answers = [answer.ids for answer in engine.generate(requests)]
    return sum(map(len, answers)) / (time.process_time() - start), answers


def main() -> None:
    """Measures both tasks at each number of requests."""
    import spt_jax

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--lookup", type=int, default=4)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bank = spt_jax.PromptBank(spt_jax.load_base(options.base, dtype="float32"))
    for count in options.requests:
        engines = {
            name: spt_jax.Engine(bank, slots=count, context=192, lookup=most)
            for name, most in (("plain", 0), ("lookup", options.lookup))
        }
        for task in TASKS:
            requests = requests_of(bank, task, count, options.new_tokens)
            answers = {name: measure(engine, requests)[1] for name, engine in engines.items()}  # also compiles
            rates: dict[str, list[float]] = {name: [] for name in engines}
            for turn in range(options.rounds):
                for name in [*engines][:: -1 if turn % 2 else 1]:
                    rates[name].append(measure(engines[name], requests)[0])
            middle = {name: round(statistics.median(own), 1) for name, own in rates.items()}
            ratios = [own / other for own, other in zip(rates["lookup"], rates["plain"], strict=True)]
            same = sum(own == other for own, other in zip(answers["lookup"], answers["plain"], strict=True))
            found = {"task": task, "requests": count, **middle, "ratio": round(statistics.median(ratios), 2)}
            print(json.dumps({**found, "same_answers": same}), flush=True)


if __name__ == "__main__":
    main()
