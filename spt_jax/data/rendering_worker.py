"""Renders chat templates within limits, one request per line. `rendering.render_chat` runs it as a process.

Run as `rendering_worker.py SECONDS BYTES CHARACTERS`. Requests and answers are JSON. SIGALRM's default action kills the
process when a request exceeds its time. Running out of memory raises MemoryError, or also kills the process.
"""

import json
import resource
import signal
import sys
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

MESSAGE_CHARACTERS = 500


def main() -> None:
    """Answers requests until the input ends."""
    seconds, memory, characters = map(int, sys.argv[1:])
    _limit_memory(memory)
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(seconds)
        answer = json.dumps(_answer(line, characters))
        signal.alarm(0)
        print(answer, flush=True)


def _limit_memory(more: int) -> None:
    """Limits the address space to its current size plus `more` bytes; only on Linux, which reports the size."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))


def _answer(line: str, characters: int) -> dict[str, Any]:
    try:
        (text,), spoken = render_jinja_template(**json.loads(line))
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it recurses too deeply"}
    except Exception as error:  # from the template's `raise_exception`, or any error in the template
        return {"error": str(error)[:MESSAGE_CHARACTERS] or type(error).__name__}
    if len(text) > characters:
        return {"error": f"it writes {len(text):,} characters; at most {characters:,} are allowed"}
    return {"text": text, "spoken": spoken[0] if spoken else []}


if __name__ == "__main__":
    main()
