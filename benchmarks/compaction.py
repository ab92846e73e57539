"""Measures compacted texts against truncated ones and randomly kept keys.

    python benchmarks/compaction.py                                          # the starter, 128 tokens to 32 positions
    python benchmarks/compaction.py --base PATH --tokens 1000 --positions 128

The measure is the mean KL divergence of the next token's distribution from that after the whole text: over 128 tokens
that follow the text in its source, and over 96 tokens from its middle that follow it once more. Writes JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.remember import text_of

THREADS = 2
SEEDS = 3


def divergences(base: Any, ids: Any, whole: Any) -> Callable[[Any], float]:
    """Returns the mean KL divergence for ids after a memory, from those after `whole`."""
    import jax
    import jax.numpy as jnp

    from spt_jax.models.attention import Prefix, Stream
    from spt_jax.models.layout import SELF

    @jax.jit
    def predicted(model: Any, memory: Any) -> Any:
        count = memory[SELF].keys.shape[1]
        places = (count + jnp.arange(len(ids)))[None]
        stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places), ids=jnp.asarray(ids)[None])
        hidden, _ = model.run(model.embed(jnp.asarray(ids)[None]), stream, Prefix(memory, jnp.arange(count)))
        return jax.nn.log_softmax(model.logits(hidden)[0])

    expected = predicted(base.model, whole)
    return lambda memory: float((jnp.exp(expected) * (expected - predicted(base.model, memory))).sum(-1).mean())


def measure(path: str, tokens: int, positions: int) -> dict[str, Any]:
    """Returns the figures of one base."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import spt_jax
    from spt_jax.models.layout import SELF
    from spt_jax.models.memory import KeysValues
    from spt_jax.prompts.compaction import compact, moved
    from spt_jax.prompts.prefix_tuning import memory_of_rows

    base = spt_jax.load_base(path, dtype="float32")
    ids = np.asarray(base.tokenizer(text_of(path, tokens + 300))["input_ids"][: tokens + 128], np.int32)
    ids, following = ids[:tokens], ids[tokens:]
    measures = {"following": following, "repeated": ids[tokens // 3 :][:96]}

    def remembered(part: Any) -> Any:
        return memory_of_rows(base.model, base.model.embed(jnp.asarray(part)), jnp.asarray(part))

    whole = remembered(ids)

    def kept(places: Any) -> Any:
        own = whole[SELF]
        return {
            SELF: KeysValues(moved(own.keys[:, places], base.config.rope, positions - tokens), own.values[:, places])
        }

    compact(base, ids, whole, positions)
    begin = time.perf_counter()
    compacted = jax.block_until_ready(compact(base, ids, whole, positions))
    seconds = time.perf_counter() - begin
    draws = [np.random.default_rng(seed).choice(tokens - 1, positions - 1, replace=False) + 1 for seed in range(SEEDS)]
    ways = {
        "compacted": compacted,
        "first tokens": remembered(ids[:positions]),
        "BOS or first token, and last tokens": remembered(np.r_[ids[:1], ids[tokens - positions + 1 :]]),
        **{f"random keys and the first {i}": kept(np.r_[0, np.sort(draw)]) for i, draw in enumerate(draws)},
    }
    found = {name: divergences(base, own, whole) for name, own in measures.items()}
    return {
        "tokens": tokens,
        "positions": positions,
        "seconds": seconds,
        "kl": {way: {name: one(memory) for name, one in found.items()} for way, memory in ways.items()},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results")
    options = parser.parse_args(argv)
    common.use_cores(THREADS)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    report = {
        "benchmark": "compaction",
        "machine": common.machine(THREADS),
        "versions": common.versions(("spt_jax", "jax", "transformers")),
        "commit": common.commit(),
        "base": Path(options.base).name,
        **measure(options.base, options.tokens, options.positions),
    }
    print(json.dumps({k: v for k, v in report.items() if k not in ("machine", "versions")}, indent=1))
    name = f"compaction_{report['base']}_{common.machine_name(THREADS)}.json"
    common.write_json(options.output or common.RESULTS / name, report)


if __name__ == "__main__":
    main()
