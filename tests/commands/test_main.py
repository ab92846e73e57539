"""`spt-jax`: what it prints for a saved prompt, and how it fails."""

import json

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.__main__ import main
from spt_jax.evaluation.inspection import nearest_tokens
from spt_jax.testing import tiny_base, write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/ and two prompts: of a classifier and of a generator with two fields."""
    folder = tmp_path_factory.mktemp("saved")
    write_tiny_checkpoint(folder / "model", "llama")
    base = spt_jax.load_base(folder / "model")
    method = spt_jax.PromptTuning(length=3)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    classify = spt_jax.Template(
        prompt="<soft>{text}\n", target="{label}", virtual_tokens=3, verbalizers={"good": "H", "bad": "L"}
    )
    speak = spt_jax.Template(prompt="<soft>{a} and {b}", target="{c}", virtual_tokens=3)
    spt_jax.save_prompt(folder / "classify", base, method, virtual, classify)
    spt_jax.save_prompt(folder / "speak", base, method, virtual, speak)
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": t, "label": "good"}) + "\n" for t in ("a", "b c")))
    (folder / "wrong.jsonl").write_text(json.dumps({"text": "a", "label": "no"}) + "\n")
    return folder


def test_an_import_names_a_missing_source_before_it_loads_the_base(folder, capsys):
    words = ["--source", str(folder / "clasify"), "--base", str(folder / "none"), "--output", str(folder / "imported")]
    assert main(["import", *words]) == 1
    said = capsys.readouterr().err
    assert f"{folder / 'clasify'}: no such file or directory; did you mean '{folder / 'classify'}'?" in said


def test_an_import_of_rows_says_what_they_lack(folder, capsys):
    rows, output = folder / "rows.npy", folder / "from_rows"
    assert main(["export", "--prompt", str(folder / "classify"), "--format", "npy", "--output", str(rows)]) == 0
    words = ["import", "--source", str(rows), "--base", str(folder / "model"), "--output"]
    assert main([*words, str(output)]) == 0
    assert "note: a .npy file has no template and no classes" in capsys.readouterr().out
    assert main([*words, str(output), "--template-prompt", "<soft>{text}"]) == 0
    assert "note: " not in capsys.readouterr().out


def test_generate_names_the_class(folder, capsys):
    assert main(["generate", "--prompt", str(folder / "classify"), "a message", "another"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and set(lines) <= {"good", "bad"}


def test_generate_takes_fields(folder, capsys):
    line = ["generate", "--prompt", str(folder / "speak"), "--max-new-tokens", "4", "--fields", "a=the", "b=question"]
    assert main(line) == 0
    assert main(line) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :], "greedy answers repeat"


def test_evaluate_writes_what_it_prints(folder, capsys, tmp_path):
    output = tmp_path / "metrics.json"
    line = ["evaluate", "--prompt", str(folder / "classify"), "--data", str(folder / "test.jsonl")]
    assert main([*line, "--hard-prompt", r"{text}\nIt is", "--output", str(output)]) == 0
    shown, results = capsys.readouterr().out, json.loads(output.read_text())
    assert set(results) == {"soft_prompt", "no_prompt", r"hard prompt '{text}\nIt is'"}
    assert f"{results['soft_prompt']['accuracy']:.3f}" in shown and "no prompt" in shown


def test_a_template_without_fields_needs_no_text(folder, capsys):
    base = spt_jax.load_base(folder / "model")
    method = spt_jax.PromptTuning(length=3)
    virtual = method.materialize(method.init_params(jax.random.key(0), base), base.model)
    template = spt_jax.Template(prompt="<soft>", target="{poem}", virtual_tokens=3)
    spt_jax.save_prompt(folder / "alone", base, method, virtual, template)
    assert main(["generate", "--prompt", str(folder / "alone"), "--max-new-tokens", "2"]) == 0
    assert main(["generate", "--prompt", str(folder / "alone"), "a text"]) == 2


def test_inspect(folder, capsys):
    assert main(["inspect", "--prompt", str(folder / "classify"), "--nearest", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" 1.00") >= 3, "rows that start as tokens are nearest to themselves"
    assert main(["inspect", "--prompt", str(folder / "classify"), "--offline"]) == 0
    assert "prompt_tuning: 3 virtual tokens" in capsys.readouterr().out


def test_nearest_tokens_is_cosine():
    table = np.asarray([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    (best,) = nearest_tokens(np.asarray([[0.1, 5.0]]), table, 2)
    assert [i for i, _ in best] == [1, 2]
    assert best[1][1] == pytest.approx((0.1 + 5) / (np.sqrt(2) * np.hypot(0.1, 5)))


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (["generat"], 2, "did you mean 'generate'"),
        (["generate", "--prompt", "{}/speak", "text"], 2, "fields a, b"),
        (["generate", "--prompt", "{}/speak", "--fields", "x=1"], 2, "no field 'x'"),
        (["generate", "--prompt", "{}/classify"], 2, "at least one text"),
        (["generate", "--prompt", "{}/nothing", "text"], 1, "nothing"),
        (["evaluate", "--prompt", "{}/speak", "--data", "{}/test.jsonl"], 1, "no field 'a'"),
        (["evaluate", "--prompt", "{}/classify", "--data", "{}/wrong.jsonl"], 1, "wrong.jsonl: record 1: label 'no'"),
    ],
)
def test_errors(folder, capsys, line, code, message):
    assert main([word.format(folder) for word in line]) == code
    assert message in capsys.readouterr().err


def test_another_base_is_refused_with_the_field(folder, capsys, tmp_path):
    write_tiny_checkpoint(tmp_path / "other", "llama", seed=5)
    assert main(["generate", "--prompt", str(folder / "classify"), "--base", str(tmp_path / "other"), "x"]) == 1
    assert "weights" in capsys.readouterr().err
    assert tiny_base("llama").fingerprint.weights == spt_jax.load_base(folder / "model").fingerprint.weights
