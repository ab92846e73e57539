"""Prints which packages of this environment differ from a lock file: `compare_lock.py requirements.txt`."""

import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


def locked_versions(lock: Path) -> dict[str, str]:
    """The versions by name in the lines of a lock file that apply to this Python and system."""
    lines = (line.partition("#")[0].strip() for line in lock.read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {
        canonicalize_name(r.name): str(r.specifier).removeprefix("==")
        for r in requirements
        if r.marker is None or r.marker.evaluate()
    }


def main() -> None:
    locked = locked_versions(Path(sys.argv[1]))
    installed = {canonicalize_name(d.name): Version(d.version).public for d in importlib.metadata.distributions()}
    installed.pop("spt-jax", None)
    different = [name for name in sorted(installed) if locked.get(name) != installed[name]]
    print(f"{len(different)} of {len(installed)} packages differ from {sys.argv[1]}")
    for name in different:
        print(f"  {name}: {locked.get(name, 'not locked')} -> {installed[name]}")


if __name__ == "__main__":
    main()
