"""Checks of a prompt's directory before the server reads it."""

from pathlib import Path

from spt_jax.errors import SptError


class RefusedError(SptError):
    """A request that is answered with an error.

    Attributes:
      status: the HTTP status.
      code: the error code, as in OpenAI's API.
      param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def checked_directory(root: Path, name: str, max_bytes: int) -> Path:
    """Returns a prompt's directory, which exists, is inside the directory of prompts and is not too large.

    Args:
      root: the directory of prompts.
      name: the name of the prompt and of its directory.
      max_bytes: the greatest total size of its files.

    Raises:
      RefusedError: it is not so.
    """
    root = root.resolve()
    folder = root / name
    if not folder.resolve().is_relative_to(root):
        raise RefusedError(403, f"{name!r} leads out of the directory of prompts")
    files = list(folder.iterdir()) if folder.is_dir() else []
    if not files:
        raise RefusedError(404, f"there is no prompt directory {name!r} on the server", code="model_not_found")
    if any(not path.resolve().is_relative_to(root) for path in files):
        raise RefusedError(403, f"{name!r} leads out of the directory of prompts")
    if any(path.exists() and not (path.is_file() or path.is_dir()) for path in files):
        raise RefusedError(400, f"prompt {name!r} contains something that is not a regular file", code="invalid_prompt")
    total = sum(path.stat().st_size for path in files if path.is_file())
    if total > max_bytes:
        raise RefusedError(413, f"prompt {name!r} has {total} bytes; --max-prompt is {max_bytes} bytes")
    return folder
