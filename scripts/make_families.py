"""Writes the table of docs/families.md from the families' docstrings and the cases of the tests.

python scripts/make_families.py            # rewrites the table
python scripts/make_families.py --check    # fails if the table is not that of the code
"""

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spt_jax.bases.families import FAMILIES  # noqa: E402
from tests.golden.cases import CASES  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
START = "| `model_type` | architecture | models, and what differs from Llama | variants compared with transformers |\n"


def table() -> str:
    """Returns the table, a row per family."""
    lines = [START, "|---|---|---|---|\n"]
    for name, family in sorted(FAMILIES.items()):
        about = " ".join((inspect.getdoc(type(family)) or "").split())
        cases = [case.name.removeprefix(name).strip() for case in CASES if case.family == name]
        lines.append(
            f"| `{name}` | {family.architecture} | {about} | {'; '.join(case or 'default' for case in cases)} |\n"
        )
    return "".join(lines)


def page(text: str) -> str:
    """Returns the page with the table of the code.

    Raises:
      ValueError: the page has no table.
    """
    before, found, rest = text.partition("| `model_type` |")
    if not found:
        raise ValueError(f"{PAGE}: no table of families")
    rows = rest.splitlines(keepends=True)
    after = next((i for i, row in enumerate(rows) if i and not row.startswith("|")), len(rows))
    return before + table() + "".join(rows[after:])


def main() -> int:
    text = PAGE.read_text()
    expected = page(text)
    if "--check" in sys.argv[1:]:
        return int(text != expected)
    PAGE.write_text(expected)
    return 0


if __name__ == "__main__":
    sys.exit(main())
