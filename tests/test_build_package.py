"""The package that is built for PyPI, where README.md has no repository beside it."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from tests.jobs import ROOT

PATH = ROOT / "scripts" / "build_package.py"
SPEC = importlib.util.spec_from_file_location("build_package", PATH)
assert SPEC is not None and SPEC.loader is not None
build_package = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build_package)
ADDRESS = "https://example.org/owner/name"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small project with the files that are copied."""
    root = tmp_path / "root"
    (root / "spt_jax" / "__pycache__").mkdir(parents=True)
    (root / "spt_jax" / "__init__.py").touch()
    (root / "LICENSE").touch()
    (root / "pyproject.toml").write_text('[project]\nname = "spt_jax"\nversion = "1.2.0"\n')
    (root / "README.md").write_text("![curves](docs/a.png), [start](docs/start.md#install), [here](#top)\n")
    monkeypatch.setattr(build_package, "ROOT", root)
    return root


def test_links_get_the_address_of_the_project(source: Path, tmp_path: Path):
    with open(source / "pyproject.toml", "a") as file:
        file.write(f'[project.urls]\nRepository = "{ADDRESS}/"\n')
    copy = tmp_path / "copy"
    copy.mkdir()
    build_package.copy_source(copy, release=True)
    image, start = f"{ADDRESS}/raw/v1.2.0/docs/a.png", f"{ADDRESS}/blob/v1.2.0/docs/start.md#install"
    assert (copy / "README.md").read_text() == f"![curves]({image}), [start]({start}), [here](#top)\n"
    assert "(docs/a.png)" in (source / "README.md").read_text()
    assert {path.name for path in copy.iterdir()} == set(build_package.CONTENTS)
    assert not (copy / "spt_jax" / "__pycache__").exists()


def test_a_project_without_an_address_is_not_released(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    for name, release in (("first", True), ("second", False)):
        copy = tmp_path / name
        copy.mkdir()
        if release:
            with pytest.raises(SystemExit, match=r"no Repository in .*; add it"):
                build_package.copy_source(copy, release=True)
        else:
            build_package.copy_source(copy, release=False)
            assert (copy / "README.md").read_text() == (source / "README.md").read_text()
    assert "do not upload this package" in capsys.readouterr().err


def test_no_relative_link_of_the_readme_is_left():
    text = build_package.absolute_links((ROOT / "README.md").read_text(), ADDRESS, "1.2.0")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(targets) > 20 and all(target.startswith("https://") for target in targets)
    for target in targets:
        kind, _, path = target.removeprefix(f"{ADDRESS}/").partition("/v1.2.0/")
        assert kind in ("raw", "blob") and (ROOT / path.partition("#")[0]).exists()
    assert not re.search(r"<img|^\[[^\]]+\]:", text, re.MULTILINE)  # which would need absolute addresses, too


def test_the_contents_are_those_that_the_project_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "spt_jax"} == set(build_package.CONTENTS)
