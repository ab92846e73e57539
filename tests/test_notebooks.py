"""The notebooks run from top to bottom on CPU, with small files and a tiny base where they need data from elsewhere.

They share one kernel, whose variables are deleted before each: half of a notebook's time is the imports of a new one.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from IPython.terminal.interactiveshell import TerminalInteractiveShell
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from spt_jax.testing import write_tiny_checkpoint
from tests.notebook_files import write_messages, write_prompts, write_quotes, write_tweets
from tests.quick import QUICK_FLAGS

COLAB = Path(__file__).parents[1] / "colab"


# Runs in the shared kernel before each notebook.
FRESH = """
import os
import matplotlib.pyplot

matplotlib.pyplot.close("all")
os.chdir({folder!r})
for name in [name for name in os.environ if name.startswith("SPT_JAX_NOTEBOOK_")]:
    del os.environ[name]
os.environ.update({settings!r})
%reset -f
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """A running kernel on one device."""
    manager = KernelManager()
    environment = {**os.environ, "PYTHONPATH": str(COLAB.parent), "XLA_FLAGS": QUICK_FLAGS}
    manager.start_kernel(env=environment, extra_arguments=["--HistoryManager.hist_file=:memory:"])
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def run(kernel: KernelManager, tmp_path: Path) -> Run:
    """Runs a notebook in the test's folder with settings, and returns what it prints."""

    def run(name: str, **settings: object) -> str:
        notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
        variables = {f"SPT_JAX_NOTEBOOK_{setting}": str(value) for setting, value in settings.items()}
        fresh = nbformat.v4.new_code_cell(FRESH.format(folder=str(tmp_path), settings=variables))
        notebook.cells.insert(0, fresh)
        client = NotebookClient(notebook, timeout=300, km=kernel)
        try:
            client.execute()
        finally:
            if client.kc is not None:
                client.kc.stop_channels()
        return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))

    return run


def test_quickstart(tmp_path: Path, run: Run) -> None:
    printed = run("quickstart", STEPS=4)
    before, after = (line for line in printed.splitlines() if line.startswith(("soft prompt", "accuracy after")))
    assert before.split()[3] == after.split()[-1], "a reloaded prompt scores as it did before it was saved"
    assert (tmp_path / "topic_prompt" / "prompt.safetensors").stat().st_size > 20 * 256 * 4


def losses(line: str) -> tuple[float, float]:
    """Returns the numbers in `loss 5.6 -> 4.2`."""
    first, last = line.rsplit("loss ", 1)[1].split(" -> ")
    return float(first), float(last)


def test_twitter_complaints(tmp_path: Path, run: Run) -> None:
    write_tweets(tmp_path / "tweets.csv")
    base = write_tiny_checkpoint(tmp_path / "model", "bloom")
    printed = run("twitter_complaints", BASE=base, DATA="tweets.csv", STEPS=30)
    first, last = losses(next(line for line in printed.splitlines() if line.startswith("loss")))
    assert last < first
    assert "the same answers after reloading: True" in printed
    assert (tmp_path / "complaints_prompt" / "prompt.safetensors").stat().st_size > 8 * 36 * 4


def test_quotes(tmp_path: Path, run: Run) -> None:
    write_quotes(tmp_path / "quotes.jsonl")
    write_prompts(tmp_path / "prompts.csv")
    base = write_tiny_checkpoint(tmp_path / "model", "bloom")
    printed = run("quotes", BASE=base, DATA=tmp_path, STEPS=12)
    assert {line.split(":")[0] for line in printed.splitlines() if "loss" in line} == {"prompts.csv", "quotes.jsonl"}
    assert "the same texts after reloading: True" in printed


def test_own_data(tmp_path: Path, run: Run) -> None:
    write_messages(tmp_path / "mine.csv")
    printed = run("own_data", DATA="mine.csv", STEPS=2)
    assert "24 records, classes: bank, calendar, movie, music, recipe, weather" in printed
    for problem in (
        "a column that is missing: train: record 4 has no field 'message'",
        "a class without a verbalizer: train: record 4: label 'musik' has no verbalizer; did you mean 'music'?",
        "an empty cell: train: field 'message' of record 4 is null",
        "a list: train: record 4: the field 'message' is a list",
        "record 1 has no field 'mesage'; did you mean 'message'?",
    ):
        assert problem in printed
    assert "the same answers after loading: True" in printed
    assert (tmp_path / "messages_prompt" / "prompt.safetensors").stat().st_size > 20 * 256 * 4


def test_choosing(tmp_path: Path, run: Run) -> None:
    base = write_tiny_checkpoint(tmp_path / "model", max_position_embeddings=512)
    settings = {"BASE": base, "STEPS": 2, "LENGTHS": "2 4", "RECORDS": 25}
    printed = run("choosing", **settings)
    rows = [line.split() for line in printed.splitlines()]
    trials = {(row[0], row[1]): float(row[2]) for row in rows if len(row) == 3 and row[0] in ("2", "4")}
    assert set(trials) == {("2", "0"), ("2", "1"), ("4", "0"), ("4", "1")}
    results = json.loads((tmp_path / "lengths" / "results.json").read_text())
    means = [(trials["2", "0"] + trials["2", "1"]) / 2, (trials["4", "0"] + trials["4", "1"]) / 2]
    assert [setting["validation"]["mean"] for setting in results["settings"]] == pytest.approx(means, abs=1e-3)
    length = int(results["chosen"]["settings"]["method.length"])
    trained = {row[0]: row[-4] for row in rows if row[:1] in (["prompt"], ["prefix"]) and row[1] == "tuning"}
    assert trained["prompt"] == str(32 * length)
    assert (tmp_path / "compared" / "compare.json").exists()


def test_serve_and_export(tmp_path: Path, run: Run) -> None:
    base = write_tiny_checkpoint(tmp_path / "model")
    printed = run("serve_and_export", BASE=base, STEPS=3)
    assert "models: ['model', 'capitals', 'routing']" in printed
    assert "as without the server: True" in printed
    assert "an unknown prompt: 404" in printed
    assert "capitals: ['adapter_config.json', 'adapter_model.safetensors']" in printed
    assert "routing is refused: " in printed
    assert "the same rows: True" in printed
    assert "(10, 32) True" in printed
    assert "prefix is refused: " in printed


def test_own_objective(tmp_path: Path, run: Run) -> None:
    base = write_tiny_checkpoint(tmp_path / "model")
    printed = run("own_objective", BASE=base, STEPS=4, RECORDS=10)
    assert ", the same: True" in printed
    assert "the last vectors" in printed
    assert "their average" in printed


def test_cartridge(tmp_path: Path, run: Run) -> None:
    printed = run("cartridge", STEPS=8)
    assert "\nthe same: True" in printed
    lines = [line for line in printed.splitlines() if line.startswith("16 positions")]
    before, after = (float(line.split()[-2]) for line in lines)
    assert after < before
    assert "the same loss after loading: True" in printed


def test_remember(tmp_path: Path, run: Run) -> None:
    printed = run("remember")
    assert "\nthe same: True" in printed
    assert "positions become 16" in printed
    assert "the same after loading: True" in printed
    line = next(line for line in printed.splitlines() if "of the joint text" in line)
    positions, joint = (int(word) for word in line.split() if word.isdigit())
    assert positions == joint > 50
    odds = {line[:15].strip(): float(line.split()[-1]) for line in printed.splitlines() if "log-odds" in line}
    apart = {name: abs(value - odds["the joint text"]) for name, value in odds.items()}
    assert apart["composed"] < apart["the first text"]


def test_new_tokens_and_tasks(tmp_path: Path, run: Run) -> None:
    printed = run("new_tokens_and_tasks", STEPS=2, RECORDS=12)
    assert f"{2 * 256} trained parameters, accuracy 0." in printed
    assert (tmp_path / "marked" / "prompt.safetensors").stat().st_size < 2 * 256 * 4 + 1000
    assert "20 virtual tokens, the last 10 those of the first task: True" in printed
    assert printed.count("accuracy 0.") + printed.count("accuracy 1.") == 4


def test_distillation(tmp_path: Path, run: Run) -> None:
    printed = run("distillation", STEPS=12, RECORDS=200, STUDY=6)
    lines = [line for line in printed.splitlines() if "KL divergence" in line]
    assert len(lines) == 2
    for line in lines:
        first, last = (float(word) for word in line.split() if "0." in word)
        assert last < first
    assert len((tmp_path / "studied" / "self_study.jsonl").read_text().splitlines()) == 6
    assert printed.count("accuracy 0.") == 3
    assert "saved: ['prompt.json', 'prompt.safetensors']" in printed


def test_preferences(tmp_path: Path, run: Run) -> None:
    printed = run("preferences", STEPS=12, RECORDS=16)
    first, last = losses(next(line for line in printed.splitlines() if line.startswith("loss")))
    assert last < first
    assert "win rate 0.547 without a prompt" in printed
    assert "saved: ['prompt.json', 'prompt.safetensors']" in printed


def test_rewards(tmp_path: Path, run: Run) -> None:
    printed = run("rewards", STEPS=2)
    assert "[1.0, 0.0]" in printed
    assert "mean reward 0." in printed
    assert "saved: ['prompt.json', 'prompt.safetensors']" in printed


def test_accelerator(tmp_path: Path, run: Run) -> None:
    base = write_tiny_checkpoint(tmp_path / "model", "qwen3", max_position_embeddings=512)
    printed = run("accelerator", BASE=base, STEPS=3, RECORDS=20, BATCH=4)
    assert "base in float32" in printed
    sizes = {
        words[0]: int(words[1].replace(",", ""))
        for words in map(str.split, printed.splitlines())
        if words[2:3] == ["MiB"]
    }
    assert set(sizes) == {"none", "dots", "full"}
    assert sizes["none"] >= sizes["dots"] >= sizes["full"] > 0
    assert "the same answers after loading: True" in printed


NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_install_cell_keeps_the_runtime_s_jax(path: Path) -> None:
    """The cell runs with a shell in place of IPython's, in which the package is missing."""
    shell = TerminalInteractiveShell()
    commands: list[str] = []
    assert shell.magics_manager is not None
    shell.magics_manager.register_function(commands.append, magic_name="pip")
    source = nbformat.read(path, as_version=4).cells[1].source
    shell.run_cell(source.replace('find_spec("spt_jax")', 'find_spec("spt_jax_missing")')).raise_error()
    (command,) = commands
    package, *kept = command.split()[2:]
    assert package in ("spt_jax", "spt_jax[serve]")
    assert set(kept) == {f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_have_no_errors(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not outputs or all(cell.execution_count for cell in cells if cell.cell_type == "code")
    if not outputs and not any("starter" in cell.source for cell in cells):
        assert "stored without outputs" in cells[0].source  # nobody has run it on its base yet
