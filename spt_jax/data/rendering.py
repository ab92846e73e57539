"""Chat templates, rendered with limits on time and memory.

A chat template is a Jinja program that comes with a tokenizer. Jinja's sandbox keeps it from reading files and from
reaching Python internals, but limits neither time nor memory: nested loops can run for days, and repeatedly doubled
strings can fill the memory. Templates are therefore rendered in a separate process, which the operating system kills
when it exceeds its limits. The process is started for the first chat and reused for all later ones.
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

from spt_jax.bases.tokenizer import Tokenizer
from spt_jax.errors import ConfigError

SECONDS = 10  # per chat
MEMORY_BYTES = 512 << 20  # in addition to what Python and the libraries use
TEXT_CHARACTERS = 4 << 20  # per rendered chat
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WORKER = Path(__file__).with_name("rendering_worker.py")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a chat with the tokenizer's template; the text equals that of transformers' `apply_chat_template`.

    Thread-safe.

    Args:
      tokenizer: a tokenizer with a chat template.
      messages: mappings with "role", "content" and any other keys that the template reads. All values must be
        JSON-serializable.
      add_generation_prompt: whether to end with the header of an assistant turn.

    Returns:
      The text, and the character spans (start, end) inside the template's `{% generation %}` blocks, in order. There
      are no spans if the template has no such blocks.

    Raises:
      ConfigError: there is no template, the template rejects the chat or is invalid, or rendering exceeds its limit on
        time, memory or length.
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
            f"the tokenizer's chat template was stopped after {SECONDS} seconds, or because it used more than"
            f" {MEMORY_BYTES >> 20} MiB"
        )
    if "error" in answer:
        raise ConfigError(f"the tokenizer's chat template: {answer['error']}")
    return answer["text"], [(first, last) for first, last in answer["spoken"]]


class _Worker:
    """The rendering process. It is started on first use, and restarted after a limit killed it or after a fork."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, line: str) -> dict[str, Any] | None:
        """Returns the answer to one request, or None if the process was killed by its limits."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            answer = b""
            try:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line.encode() + b"\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
            except BaseException:  # on an interrupt: this answer must not be read as the answer to the next request
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
            # In a new session, the process does not receive the terminal's interrupt: it ends when its pipe closes.
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
        """Kills the rendering process, if the current process started it."""
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
