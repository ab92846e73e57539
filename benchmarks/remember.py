"""Measures a remembered text against the same text in each request: first tokens, answers, log-probabilities.

    python benchmarks/remember.py                        # the starter and 150 tokens, about a minute on two cores
    python benchmarks/remember.py --base PATH --tokens 2000 --chat

The text is the beginning of this repository's documentation. A server has the base and the remembered text as a prompt;
both ways are asked the same questions, in turns, with greedy decoding and float32. Writes JSON.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common

THREADS = 2
ROOT = Path(__file__).parents[1]
QUESTIONS = ("What is a soft prompt?", "Which devices work?", "How are prompts saved?", "What does it cost?")


def text_of(base: str, tokens: int) -> str:
    """Returns the beginning of the documentation, without markup, with about this number of tokens."""
    import spt_jax

    whole = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    whole = "\n".join(line for line in whole.split("\n") if not re.search("[<{]", line))
    tokenizer = spt_jax.load_base(base).tokenizer
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"][:tokens]
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rpartition("\n")[0] + "\n"


def body(text: str | None, question: str, *, chat: bool) -> dict[str, Any]:
    """Returns a request: with the text in it or, if that is None, for the prompt that has it."""
    common_fields = {"model": "base" if text else "text", "temperature": 0, "max_tokens": 24, "stream": True}
    if not chat:
        return {**common_fields, "prompt": f"{text or ''}\nQuestion: {question}\nAnswer:"}
    system = [{"role": "system", "content": text}] if text else []
    return {**common_fields, "messages": [*system, {"role": "user", "content": question}]}


def ask(url: str, request: dict[str, Any]) -> tuple[float, str]:
    """Returns the milliseconds until the first token of an answer, and the answer."""
    path = "/v1/chat/completions" if "messages" in request else "/v1/completions"
    begin, first, answer = time.perf_counter(), None, ""
    with httpx.stream("POST", url + path, json=request, timeout=600) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if piece and first is None:
                first = 1000 * (time.perf_counter() - begin)
            answer += piece
    assert first is not None, f"no answer to {request}"
    return first, answer


def differences(base_path: str, text: str, folder: Path) -> dict[str, float]:
    """Returns the largest difference of an answer's log-probabilities after the prefix and after the text itself."""
    import numpy as np

    import spt_jax

    base = spt_jax.load_base(base_path, dtype="float32")
    prompt = spt_jax.load_prompt(folder, base)
    # Without the empty field, the text would be a lead that is encoded apart, as the prefix was.
    inline = spt_jax.Template(prompt=f"{{empty}}{text}{{text}}", target="{target}")
    both = []
    for template, virtual in ((prompt.template, prompt.virtual), (inline, None)):
        asked = [f"\nQuestion: {question}\nAnswer:" for question in QUESTIONS]
        records = [{"text": one, "empty": "", "target": " It is a small set of vectors."} for one in asked]
        encoder = spt_jax.Encoder(template, base.tokenizer, base.layout.vocab_size, base.layout.max_positions)
        taken = 0 if virtual is None else virtual.prefix_length
        data = spt_jax.make_evaluation_set(base, encoder, records, taken=taken)
        both.append([own["log_probability"] for own in spt_jax.evaluate(base, data, virtual).predictions])
    return {"largest_difference": float(np.abs(np.subtract(*both)).max()), "largest": float(np.abs(both).max())}


def measure(base: str, tokens: int, runs: int, *, chat: bool) -> dict[str, Any]:
    """Returns the figures of one base."""
    text = text_of(base, tokens)
    words = [sys.executable, "-m", "spt_jax"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(text)
        output = ["--base", base, "--dtype", "float32"]
        begin = time.perf_counter()
        files = ["--text", str(folder / "text.txt"), "--output", str(folder / "prompts/text")]
        subprocess.run(
            [*words, "remember", *output, *files, *(["--chat-system"] if chat else [])],
            check=True,
            env=environment,
            cwd=folder,
        )
        seconds = time.perf_counter() - begin
        info = json.loads((folder / "prompts/text/prompt.json").read_text())["extra"]["remembered"]
        served = ["--prompts", str(folder / "prompts"), "--name", "base", "--port", "0", "--strict"]
        slots = ["--slots", "1", "--context", str(info["tokens"] + 160)]
        command = [*words, "serve", *output, *served, *slots]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = next(line.strip() for line in process.stdout if re.match(r"http://\S+", line))
            firsts: dict[str, list[float]] = {"text in the request": [], "remembered": []}
            same = True
            for run in range(runs + 1):  # the first round compiles
                for question in QUESTIONS:
                    answers = []
                    for way, own in (("text in the request", text), ("remembered", None)):
                        milliseconds, answer = ask(url, body(own, question, chat=chat))
                        answers.append(answer)
                        if run:
                            firsts[way].append(milliseconds)
                    same &= answers[0] == answers[1]
        finally:
            process.terminate()
            process.wait(60)
        found = {} if chat else {"log_probabilities": differences(base, text, folder / "prompts/text")}
        size = (folder / "prompts/text/prompt.safetensors").stat().st_size
    middle = {way: statistics.median(values) for way, values in firsts.items()}
    return {
        "base": Path(base).name,
        "chat": chat,
        "tokens": info["tokens"],
        "bytes": size,
        "seconds_to_remember": seconds,
        "milliseconds_to_first_token": middle,
        "times_sooner": middle["text in the request"] / middle["remembered"],
        "same_answers": same,
        "answers": len(QUESTIONS),
        **found,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--chat", action="store_true", help="the text is the system turn of a chat")
    parser.add_argument("--output", type=Path, help="the JSON file; default in benchmarks/results")
    options = parser.parse_args(argv)
    common.use_cores(THREADS)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    report = {
        "benchmark": "remember",
        "machine": common.machine(THREADS),
        "versions": common.versions(("spt_jax", "jax", "transformers")),
        "commit": common.commit(),
        **measure(options.base, options.tokens, options.runs, chat=options.chat),
    }
    print(json.dumps({k: v for k, v in report.items() if k not in ("machine", "versions")}, indent=1))
    kind = f"{report['base']}{'_chat' if options.chat else ''}"
    common.write_json(options.output or common.RESULTS / f"remember_{kind}_{common.machine_name(THREADS)}.json", report)


if __name__ == "__main__":
    main()
