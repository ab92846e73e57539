"""Writes the tables of docs/families.md and docs/encoder_decoders.md from docstrings and the cases of the tests.

python scripts/make_families.py            # rewrites the tables
python scripts/make_families.py --check    # fails if the tables are not those of the code
"""

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spt_jax.bases.families import ENCODER_DECODERS, FAMILIES  # noqa: E402
from tests.encoder_decoders import VARIANTS  # noqa: E402
from tests.golden.cases import CASES  # noqa: E402

PAGES = {
    "families.md": (
        FAMILIES,
        [(case.family, case.name) for case in CASES],
        "| `model_type` | architecture | models, and what differs from Llama | variants compared with transformers |\n",
    ),
    "encoder_decoders.md": (
        ENCODER_DECODERS,
        [(family, name) for name, (family, _) in VARIANTS.items()],
        "| `model_type` | architecture | models | variants compared with transformers |\n",
    ),
}


def table(families: Mapping[str, Any], cases: Sequence[tuple[str, str]], start: str) -> str:
    """Returns a table, a row per family.

    Args:
      families: the families.
      cases: family and name of each case.
      start: the first line.
    """
    lines = [start, "|---|---|---|---|\n"]
    for name, family in sorted(families.items()):
        about = " ".join((inspect.getdoc(type(family)) or "").split())
        own = [case.removeprefix(name).strip() for of_family, case in cases if of_family == name]
        lines.append(
            f"| `{name}` | {family.architecture} | {about} | {'; '.join(case or 'default' for case in own)} |\n"
        )
    return "".join(lines)


def page(text: str, rows: str) -> str:
    """Returns the page with the table of the code.

    Args:
      text: the page.
      rows: the table.

    Raises:
      ValueError: the page has no table.
    """
    before, found, rest = text.partition("| `model_type` |")
    if not found:
        raise ValueError("a page has no table of families")
    lines = rest.splitlines(keepends=True)
    after = next((i for i, line in enumerate(lines) if i and not line.startswith("|")), len(lines))
    return before + rows + "".join(lines[after:])


def main() -> int:
    differs = False
    for name, parts in PAGES.items():
        file = ROOT / "docs" / name
        text = file.read_text()
        expected = page(text, table(*parts))
        differs |= text != expected
        if "--check" not in sys.argv[1:]:
            file.write_text(expected)
    return int(differs and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
