"""The pages are true: links lead somewhere, commands parse, and the reference has what the package exports."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

from spt_jax.commands import options as command_options
from spt_jax.commands.program import COMMANDS
from spt_jax.commands.sweep import Sweep, plan_stages
from spt_jax.experiment.command_line import parse_job, parse_train
from spt_jax.prompts import METHODS
from tests.markdown import PAGES, ROOT, anchors, command_lines, links

DOCS = ROOT / "docs"
TEXT = "\n".join(page.read_text() for page in PAGES)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page: Path):
    for link in links(page):
        if not link.startswith(("https://", "http://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_files_that_are_named_exist():
    folders = r"\b((?:configs|colab|deploy|docs|benchmarks|scripts|tests|spt_jax/\w+)/[\w/-]+\.\w+)"
    named = set(re.findall(folders, TEXT))
    assert len(named) > 30 and [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_targets_of_make_that_are_named_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make (?:\w+=\S+ )*(\w+)`", TEXT))
    assert {"quickstart", "test", "docs"} <= named <= targets


def test_every_page_is_in_the_navigation():
    named = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)]
    assert sorted(named) == sorted(pages)


LINES = sorted({(name_of(page), tuple(words)) for page in PAGES for words in command_lines(page)})
WITH_OPTIONS = [pytest.param(words, id=f"{page}-{' '.join(words):.40}") for page, words in LINES if len(words) > 1]


@pytest.mark.parametrize("words", WITH_OPTIONS)
def test_commands_parse(words: tuple[str, ...]):
    """As the program parses them, without running them."""
    name, *options = words
    entry, options = COMMANDS[name], [option for option in options if option != "--help"]
    if name == "lm-eval":  # whose options are those of the harness
        return
    if options and re.fullmatch(r".+\.(json|ya?ml)", options[0]):  # a file of the reader's
        options[0] = "quickstart"
    if name == "train":
        parse_train(options)
    elif entry.job is not None:
        module = importlib.import_module(f"spt_jax.commands.{entry.module}")
        command = parse_job(getattr(module, entry.job), options, name)
        if isinstance(command, Sweep):
            command.validate()
            assert all(plan_stages(command, options))
    elif entry.options is not None:
        tyro.cli(getattr(command_options, entry.options), args=options, prog=name)
    else:
        assert name == "completion" and options in (["bash"], ["zsh"], ["fish"])


def test_every_command_is_shown():
    assert {words[0] for _, words in LINES} == {*COMMANDS, "--help"}


def test_every_method_is_named_and_has_a_config():
    assert [name for name in METHODS if f"\n## {name}\n" not in (DOCS / "methods.md").read_text()] == []
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert set(METHODS) - configs == {"prompt_tuning"}  # which is quickstart.py's


LAUNCHES = re.findall(r"train\.py (configs/[^\n]*(?:\n +--[^\n]*)*)", (DOCS / "clusters.md").read_text())


@pytest.mark.parametrize("line", LAUNCHES)
def test_launch_lines_parse(line: str):
    values = {"RESUME": "--resume", "JOB_COMPLETION_INDEX": "1", "i": "1"}
    line = re.sub(r"\\?\$(\w+)", lambda name: values.get(name[1], "x"), line.rstrip(' "&'))
    path, *words = shlex.split(line)
    command = parse_train([str(ROOT / path), *words])
    assert command.processes.several
