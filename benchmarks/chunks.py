"""Measures how long running requests wait for a token while a long request comes in, for several sizes of chunks.

    python benchmarks/chunks.py                                          # the starter
    python benchmarks/chunks.py --base PATH --tokens 1500 --chunks 0 128 256 512

Short requests decode without pause. After a few tokens of theirs a request of `--tokens` ids is submitted, and all run
to their ends. Chunk 0 runs the long request in one call. Prints one line of JSON per chunk: medians over the rounds of
the longest gap between two calls that gave the short requests tokens, the time to the long request's first token, and
the time of the whole round, in seconds of wall time and of processor time of all threads, and whether all answers are
those of the first chunk of the list.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def requests_of(vocab_size: int, running: int, tokens: int, new_tokens: int) -> list[Any]:
    """Returns the long request, then the short ones, with random ids."""
    import spt_jax

    random, sampling = np.random.default_rng(0), spt_jax.SamplingConfig(max_new_tokens=new_tokens)
    lengths = [tokens, *[12] * running]
    return [spt_jax.Request(random.integers(5, vocab_size, n).astype(np.int32), None, sampling) for n in lengths]


def measure(engine: Any, requests: Sequence[Any]) -> tuple[dict[str, float], list[list[int]]]:
    """Runs one round; returns its times, and the answers."""
    long, *short = requests
    tickets = [engine.submit(request) for request in short]
    while not all(len(ticket.ids) > 1 for ticket in tickets):
        engine.step()
    began = last = time.perf_counter(), time.process_time()
    tickets.insert(0, engine.submit(long))
    gaps, first, counts = [], None, 0
    while not engine.idle:
        engine.step()
        now = time.perf_counter(), time.process_time()
        if first is None and tickets[0].ids:
            first = now
        if counts < (counts := sum(len(ticket.ids) for ticket in tickets[1:])):
            gaps.append((now[0] - last[0], now[1] - last[1]))
            last = now
    assert first is not None
    found = {}
    for place, name in enumerate(("wall", "cpu")):
        found |= {
            f"gap_{name}": max(gap[place] for gap in gaps),
            f"first_{name}": first[place] - began[place],
            f"total_{name}": now[place] - began[place],
        }
    return found, [ticket.ids for ticket in tickets]


def main() -> None:
    """Measures all chunks alternately."""
    import spt_jax

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 64, 128, 256, 512])
    parser.add_argument("--running", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = spt_jax.load_base(options.base, dtype="float32")
    bank, slots = spt_jax.PromptBank(base), options.running + 1
    requests = requests_of(base.layout.vocab_size, options.running, options.tokens, options.new_tokens)
    context = options.tokens + options.new_tokens
    engines = {chunk: spt_jax.Engine(bank, slots=slots, context=context, chunk=chunk) for chunk in options.chunks}
    answers = {chunk: measure(engine, requests)[1] for chunk, engine in engines.items()}  # also compiles
    rounds: dict[int, list[dict[str, float]]] = {chunk: [] for chunk in engines}
    for turn in range(options.rounds):
        for chunk in options.chunks[:: -1 if turn % 2 else 1]:
            rounds[chunk].append(measure(engines[chunk], requests)[0])
    for chunk, own in rounds.items():
        found = {name: round(statistics.median(one[name] for one in own), 3) for name in own[0]}
        print(json.dumps({"chunk": chunk, **found, "same": answers[chunk] == answers[options.chunks[0]]}), flush=True)


if __name__ == "__main__":
    main()
