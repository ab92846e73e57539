"""When and from which source a result was made."""

import datetime
import subprocess
from pathlib import Path

GIT_SECONDS = 5.0


def provenance(folder: Path | None = None) -> dict[str, str | None]:
    """Returns the date (UTC, ISO 8601) and the commit of the git repository around a folder.

    Args:
      folder: any directory of the repository; default the current one.

    Returns:
      "date", and "git_commit" with `+changes` if tracked files differ from the commit; None outside of a repository,
      or without git.
    """
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"date": date, "git_commit": git_commit(folder or Path.cwd())}


def git_commit(folder: Path) -> str | None:
    """Returns the commit of the repository around a folder, as in `provenance`."""
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    # git runs a program that the repository's settings may name to find changes; the empty setting prevents it.
    changes = _git(folder, "-c", "core.fsmonitor=", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if changes else commit


def _git(folder: Path, *words: str) -> str | None:
    """Returns the output of git; None if it fails, is missing or takes too long."""
    try:
        ended = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None
