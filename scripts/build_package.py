"""Builds the wheel and the source archive in dist/, with links of README.md that work on PyPI.

python scripts/build_package.py [--release]

PyPI shows README.md without the repository, so that relative links and images are broken there. Where `[project.urls]`
of pyproject.toml has a `Repository`, they are made absolute in a copy, from which the package is built.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTENTS = ("spt_jax", "pyproject.toml", "README.md", "LICENSE")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def absolute_links(text: str, repository: str, version: str) -> str:
    """Returns Markdown whose relative links and images have the address that GitHub gives files of a tag.

    Args:
      text: the Markdown, as in README.md.
      repository: the address of the repository.
      version: the version, whose tag is the same with a `v` before it.
    """

    def replace(found: re.Match[str]) -> str:
        image, words, target = found.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:|#", target):
            return found[0]
        return f"{image}[{words}]({repository.rstrip('/')}/{'raw' if image else 'blob'}/v{version}/{target})"

    return _LINK.sub(replace, text)


def copy_source(folder: Path, release: bool) -> None:
    """Copies what the package is built from, with absolute links in README.md where the address is known.

    Args:
      folder: an empty directory.
      release: whether to refuse a project without an address.

    Raises:
      SystemExit: it has none.
    """
    for name in CONTENTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    if repository is None:
        problem = (
            "pyproject.toml has no Repository in [project.urls], so that the links of README.md do not work on PyPI"
        )
        if release:
            sys.exit(f"error: {problem}; add it (CONTRIBUTING.md, Releases)")
        print(f"note: {problem}; do not upload this package", file=sys.stderr)
        return
    readme = folder / "README.md"
    readme.write_text(
        absolute_links(readme.read_text(encoding="utf-8"), repository, project["version"]), encoding="utf-8"
    )


def main() -> None:
    """Builds the package."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--release", action="store_true", help="refuse a project without an address")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy_source(Path(folder), options.release)
        subprocess.run([sys.executable, "-m", "build", "--outdir", str(ROOT / "dist"), folder], check=True)


if __name__ == "__main__":
    main()
