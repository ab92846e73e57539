"""Chat templates, rendered with limits on time and memory.

A chat template is a program in Jinja that comes with a tokenizer. Jinja's sandbox keeps it from files and from Python's
own objects, but bounds neither time nor memory: nested loops run for days, and doubled strings fill the machine. So
templates are rendered in a process of their own, which the system ends when it exceeds its limits. It is started at the
first chat and serves all that follow.
"""

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spt_jax.errors import ConfigError

SECONDS = 10  # for one chat
MEMORY_BYTES = 512 << 20  # beside what Python and the libraries take
TEXT_CHARACTERS = 4 << 20  # of a rendered chat
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORKER = Path(__file__).with_name("rendering_worker.py")


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A chat as the tokenizer's own template writes it: the text of transformers' `apply_chat_template`.

    May be called from any thread.

    Args:
      tokenizer: has a chat template.
      messages: mappings with "role" and "content", and whatever else the template reads; all of it JSON.
      add_generation_prompt: end with the header of an assistant's turn.

    Returns:
      The text, and the characters (from, to) of it that an assistant says, in order: those inside the template's
      `{% generation %}` blocks; none where it has no such blocks.

    Raises:
      ConfigError: there is no template, or it refuses the chat, is wrong, or exceeds its time, memory or length.
    """
    try:
        template = tokenizer.get_chat_template()
        request = {
            "chat_template": template,
            "conversations": [[{k: v for k, v in turn.items() if v is not None} for turn in messages]],
            "add_generation_prompt": add_generation_prompt,
            "return_assistant_tokens_mask": _GENERATION.search(template) is not None,
            **tokenizer.special_tokens_map,
        }
        line = json.dumps(request)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the chat cannot be rendered: {error}") from error
    answer = _worker.ask(line)
    if answer is None:
        raise ConfigError(
            f"the tokenizer's chat template was stopped after {SECONDS} seconds, or at {MEMORY_BYTES >> 20} MiB"
        )
    if "error" in answer:
        raise ConfigError(f"the tokenizer's chat template: {answer['error']}")
    return answer["text"], [(first, last) for first, last in answer["spoken"]]


class _Worker:
    """The process that renders; started when it is needed, and again after it was ended by a limit or a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, line: str) -> dict[str, Any] | None:
        """The answer to one request; None when the process was ended by its limits."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            answer = b""
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line.encode() + b"\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
            except BaseException:  # an interrupt: the answer to this request must not become that of the next
                self.close()
                raise
            if not answer.endswith(b"\n"):
                self.close()
                return None
            return json.loads(answer)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.close()
            limits = [str(limit) for limit in (SECONDS, MEMORY_BYTES, TEXT_CHARACTERS)]
            # A session of its own: the terminal's interrupt is for the program, which ends the process by its pipe.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER), *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._owner = os.getpid()
            assert self._process.stdout is not None
            if self._process.stdout.readline() != b"ready\n":
                raise ConfigError("the process that renders chat templates could not be started")
        return self._process

    def close(self) -> None:
        """Ends the process, if this one started it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


_worker = _Worker()
atexit.register(_worker.close)
