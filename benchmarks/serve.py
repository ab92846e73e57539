"""Measures serving: many prompts against one and the bare base, batched requests against sequential ones, PEFT.

    python benchmarks/serve.py                 # everything, about 7 minutes on two idle cores; needs torch and peft
    python benchmarks/serve.py --only load     # or a part: curve, batching, peft, load

All parts use the starter with greedy decoding and untrained prompts of 20 virtual tokens, which cost as much as trained
ones.

curve: the engine's tokens per second with 1, 10, 100 and 1,000 prompts and with none, interleaved; programs compiled
  meanwhile (none); the time to the first token with and without a prompt.
batching: 16 requests at once against one after another, interleaved.
peft: the same 16 requests against PEFT's `generate` for one prompt in one batch, its best case.
load: 10,000 requests over HTTP from 64 clients with mixed prompts and lengths, some of which are abandoned before their
  answer; a prompt added meanwhile; the startup time of a server with 1,000 prompts, and its memory.

Writes JSON, and the curve as a plot.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

THREADS = 2
LENGTH = 20
SLOTS = 16
COUNTS = (1, 10, 100, 1000)
TEXTS = ("Where is my parcel?", "play some jazz", "what will it be like outside tomorrow", "book a table for two")
PARTS = ("curve", "batching", "peft", "load")


def write_prompts(folder: Path, count: int) -> None:
    """Writes prompts of one length, each a noisy copy of rows of the vocabulary."""
    import jax
    import numpy as np

    import spt_jax

    base, method = spt_jax.load_base("starter"), spt_jax.PromptTuning(length=LENGTH)
    rows = method.init_params(jax.random.key(0), base)
    template = spt_jax.Template(prompt="<soft><bos>{text}", target="{label}", virtual_tokens=LENGTH)
    noise = np.random.default_rng(0)
    for number in range(count):
        moved = jax.tree.map(lambda a: a + 0.02 * noise.standard_normal(a.shape).astype(np.float32), rows)
        virtual = method.materialize(moved, base.model)
        spt_jax.save_prompt(folder / f"p{number:04d}", base, method, virtual, template)


def bank_of(folder: Path) -> Any:
    """Returns a bank of all prompts, already encoded. No answer ends before its limit, so all need the same work."""
    import spt_jax

    base = spt_jax.load_base("starter")
    base.tokenizer.eos_token = None
    bank = spt_jax.PromptBank(base)
    for own in sorted(folder.iterdir()):
        bank.load(own.name, own)
        bank.held(own.name)
    return bank


def requests_of(bank: Any, names: Sequence[str | None], count: int, new_tokens: int) -> list[Any]:
    """Returns requests that cycle through the prompts and the texts, and end after `new_tokens` tokens."""
    import spt_jax

    sampling = spt_jax.SamplingConfig(max_new_tokens=new_tokens)
    return [
        spt_jax.Request(bank.request_ids(names[i % len(names)], {"text": TEXTS[i % len(TEXTS)]}), name, sampling)
        for i in range(count)
        for name in [names[i % len(names)]]
    ]


def rate(engine: Any, requests: Sequence[Any]) -> float:
    """Returns the new tokens per second."""
    start = time.perf_counter()
    answers = engine.generate(requests)
    return sum(len(answer.ids) for answer in answers) / (time.perf_counter() - start)


def interleaved(runs: int, ways: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Runs every way once per round, starting each round with a different way; the first round is discarded."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        first = run % len(ways)
        for name in [*ways][first:] + [*ways][:first]:
            value = ways[name]()
            if run:
                found[name].append(value)
    return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def share(found: dict[str, list[float]], name: str, of: str) -> float:
    """Returns the median over rounds of the ratio of two ways, so that a slow moment affects both."""
    return statistics.median(own / other for own, other in zip(found[name], found[of], strict=True))


def first_token(engine: Any, request: Any) -> float:
    """Returns the milliseconds until a single request has its first token."""
    start = time.perf_counter()
    ticket = engine.submit(request)
    while not ticket.ids:
        engine.step()
    seconds = time.perf_counter() - start
    engine.cancel(ticket)
    return 1000 * seconds


def curve(bank: Any, runs: int) -> dict[str, Any]:
    """Measures tokens per second over the number of prompts, and times to the first token."""
    import jax

    import spt_jax

    engine, compiled = spt_jax.Engine(bank, slots=SLOTS), []
    names = bank.names
    ways: dict[str, Callable[[], float]] = {
        "0": lambda: rate(engine, requests_of(bank, [None], 1024, 16)),
        **{str(n): lambda n=n: rate(engine, requests_of(bank, names[:n], 1024, 16)) for n in COUNTS},
    }
    for way in ways.values():
        way()

    def listen(name: str, _: float, **details: Any) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        rates = interleaved(runs, ways)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    bare, soft = (requests_of(bank, [name], 1, 8)[0] for name in (None, names[0]))
    firsts = interleaved(50, {"base": lambda: first_token(engine, bare), "prompt": lambda: first_token(engine, soft)})
    return {
        "tokens_per_second": medians(rates),
        "tokens_per_second_of_runs": rates,
        "share_of_one_prompt": {name: share(rates, name, "1") for name in rates},
        "share_of_the_base": {name: share(rates, name, "0") for name in rates},
        "programs_compiled_meanwhile": compiled,
        "first_token_milliseconds": medians(firsts),
        "first_token_ratio": share(firsts, "prompt", "base"),
        "prompt_bytes_on_the_device": bank.device_bytes,
    }


def batching(bank: Any, runs: int) -> dict[str, Any]:
    """Measures 16 requests at once against one after another."""
    import spt_jax

    many, one = spt_jax.Engine(bank, slots=SLOTS), spt_jax.Engine(bank, slots=1)
    requests = requests_of(bank, bank.names[:SLOTS], SLOTS, 64)
    found = interleaved(runs, {"together": lambda: rate(many, requests), "in turn": lambda: rate(one, requests)})
    return {"tokens_per_second": medians(found), "ratio": share(found, "together", "in turn")}


def peft_rates(folder: Path) -> None:
    """Prints PEFT's tokens per second for the same prompt and texts as a batch, once for every line of input."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spt_jax.bases.base import STARTER

    torch.set_num_threads(THREADS)
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STARTER), folder).eval()
    texts = [TEXTS[i % len(TEXTS)] for i in range(SLOTS)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)

    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)
        print(SLOTS * 64 / (time.perf_counter() - start), flush=True)


def against_peft(bank: Any, prompts: Path, runs: int) -> dict[str, Any]:
    """Measures this library and PEFT, interleaved, in separate processes."""
    import spt_jax

    engine = spt_jax.Engine(bank, slots=SLOTS)
    requests = requests_of(bank, bank.names[:1], SLOTS, 64)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--prompt", str(prompts / "p0000"), "--output", folder]
        export = [sys.executable, "-m", "spt_jax", "export", *words]
        subprocess.run(export, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
        command = [sys.executable, __file__, "--peft-of", folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdin is not None and other.stdout is not None
            stdin, stdout = other.stdin, other.stdout

            def theirs() -> float:
                print(file=stdin, flush=True)
                return float(stdout.readline())

            found = interleaved(runs, {"spt_jax": lambda: rate(engine, requests), "peft": theirs})
            stdin.close()
    return {"tokens_per_second": medians(found), "ratio": share(found, "spt_jax", "peft")}


def plot(path: Path, found: dict[str, Any]) -> None:
    """Plots tokens per second over the number of prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, pane = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    rates = found["tokens_per_second_of_runs"]
    middle = [found["tokens_per_second"][str(n)] for n in COUNTS]
    spread = [[abs(m - end(rates[str(n)])) for n, m in zip(COUNTS, middle, strict=True)] for end in (min, max)]
    pane.errorbar(COUNTS, middle, yerr=spread, marker="o", capsize=3, color="#1f5fa8", label="distinct prompts, P = 20")
    bare = found["tokens_per_second"]["0"]
    pane.axhline(bare, color="#555555", linestyle=":", label="the bare base")
    pane.set(xscale="log", xlabel="prompts in the mixture", ylabel="tokens per second")
    pane.set_ylim(0, 1.15 * max(*middle, bare))
    pane.set_xticks(COUNTS, [f"{n:,}" for n in COUNTS])
    pane.legend(loc="lower left")
    pane.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--peft-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    common.use_cores(THREADS)
    if options.peft_of is not None:
        peft_rates(options.peft_of)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    path = common.RESULTS / f"serve_{common.machine_name(THREADS)}.json"
    others = set(PARTS) - set(options.only)
    report = json.loads(path.read_text()) if others and path.exists() else {"benchmark": "serve"}
    origin = {  # stored with each part, since parts may be measured separately
        "machine": common.machine(THREADS),
        "versions": common.versions(("spt_jax", "jax", "fastapi", "uvicorn", "peft", "torch", "transformers")),
        "commit": common.commit(),
    }
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts"
        write_prompts(prompts, max(COUNTS))
        bank = bank_of(prompts) if set(options.only) - {"load"} else None
        for part in options.only:
            if part == "curve":
                report[part] = curve(bank, options.runs)
                plot(path.with_suffix(".png"), report[part])
            elif part == "batching":
                report[part] = batching(bank, options.runs)
            elif part == "peft":
                report[part] = against_peft(bank, prompts, options.runs)
            else:
                from benchmarks.load import load

                report[part] = load(prompts, options.requests)
            report[part] |= origin
            if part == "load" and any(name.startswith(("wrong", "failed")) for name in report[part]["outcomes"]):
                raise SystemExit(f"some requests were answered wrongly or failed: {report[part]['outcomes']}")
            print(part, json.dumps({k: v for k, v in report[part].items() if not k.endswith("_of_runs")}, indent=1))
            common.write_json(path, report)


if __name__ == "__main__":
    main()
