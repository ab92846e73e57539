"""Renders chat templates, one request a line, within limits: the process behind `rendering.render_chat`.

Run as `rendering_worker.py SECONDS BYTES CHARACTERS`. Requests and answers are JSON. A request that exceeds its time
ends the process by the alarm's default action; memory fails in Python, or ends it too.
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
    """Bounds the address space to what is taken already and `more`; where the system tells how much that is."""
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
        return {"error": "it calls itself without end"}
    except Exception as error:  # the template's own `raise_exception`, and whatever is wrong in it
        return {"error": str(error)[:MESSAGE_CHARACTERS] or type(error).__name__}
    if len(text) > characters:
        return {"error": f"it writes {len(text):,} characters; at most {characters:,} are read"}
    return {"text": text, "spoken": spoken[0] if spoken else []}


if __name__ == "__main__":
    main()
