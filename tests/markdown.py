"""What the tests read in the pages: links, headings, and commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ASSIGNMENT = re.compile(r"\w+=\S*")


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> list[str]:
    """The targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as repositories and the site name them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in plain if "  " not in heading}


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words after `spt-jax` of each command in a page's blocks and text. `python train.py` is `spt-jax train`."""
    text = page.read_text()
    for language, block in FENCE.findall(text):
        if language in ("", "bash"):
            for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
                if "spt-jax" in line:
                    yield from (words[1:] for words in commands(line) if words[0] == "spt-jax")
                elif line.startswith("python train.py") and "$" not in line:
                    yield from (["train", *words[2:]] for words in commands(line))
    for span in re.findall(r"`spt-jax ([^`]+)`", prose(page)):
        yield shlex.split(span)


def commands(line: str) -> Iterator[list[str]]:
    """The commands of a line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set("();<>|&"):
            if command:
                yield command
            command = []
        elif command or not ASSIGNMENT.fullmatch(word):
            command.append(word)
