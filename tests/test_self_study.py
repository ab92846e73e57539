"""Self-study: the base writes questions about a text and answers them, and a run trains on them."""

import dataclasses
import json
from pathlib import Path

import pytest

import spt_jax
import train
from spt_jax.__main__ import main
from spt_jax.data.encoder import encoder_for
from spt_jax.data.remembered import system_ids, text_ids
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import CheckpointError, ConfigError, DataError
from spt_jax.evaluation.after_text import ids_after_text
from spt_jax.experiment import shared_studies
from spt_jax.experiment.self_study import SEEDS, _normalized, _problem, read_study, self_study, write_study
from spt_jax.experiment.shared_studies import study_key
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from spt_jax.training.objectives import Distillation
from tests.chat_layouts import LAYOUTS
from tests.jobs import ROOT, arrays, history, stopped_at_batch

TEXT = "The question is a text of the world. The answer is good and positive.\n"
TEMPLATE = Template(prompt="<soft>{question}: ", target=" {answer}", virtual_tokens=3)
LAST = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_tiny_checkpoint(folder / "model", "llama", max_position_embeddings=512)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return spt_jax.load_base(str(folder / "model"), dtype="float32")


def objective(folder, **options) -> Distillation:
    sizes = {"study": 10, "answer_tokens": 4, "study_tokens": 10, **options}
    return Distillation(text=str(folder / "text.txt"), **sizes)


def test_questions_are_different_and_answered_after_the_text(folder, base):
    encoder, text = encoder_for(base, TEMPLATE), text_ids(base, TEXT)
    study = self_study(base, encoder, objective(folder, study_validation=2), text, 8)
    assert len(study.train) == 10 and len(study.validation) == 2 and len(study.kinds) == 12
    assert set(study.kinds) == set(SEEDS)
    questions = [_normalized(record["question"]) for record in (*study.train, *study.validation)]
    assert len(set(questions)) == 12 and all(questions)
    record = study.train[0]
    prompt = ids_after_text(base, text, encoder.prompt_ids(record))
    alone = generate(base, [prompt], None, SamplingConfig(max_new_tokens=4, end_ids=encoder.end_ids))[0]
    assert record["answer"] == alone.text.strip()
    again = self_study(base, encoder, objective(folder, study_validation=2), text, 5)
    assert again == study, "the batch size changes nothing"


def test_the_base_reads_the_text_and_the_seed_when_it_asks(folder, base):
    """The first question is what the base samples after the text and the line that asks for it."""
    study = self_study(
        base, encoder_for(base, TEMPLATE), objective(folder, study_kinds=("facts",)), text_ids(base, TEXT), 8
    )
    options = {"max_new_tokens": 10, "temperature": 1.0, "seed": 0, "stop": ("\n",)}
    written = [
        generate(base, [f"{TEXT}\n\n{seed[0].upper()}{seed[1:]} above:"], None, SamplingConfig(**options))[0].text
        for seed in SEEDS["facts"]
    ]
    assert study.train[0]["question"] in [text.strip() for text in written]


def test_chats_get_turns(folder):
    base = tiny_base("llama", vocab_size=420, max_position_embeddings=512)
    base = dataclasses.replace(base, tokenizer=LAYOUTS["llama3"].tokenizer())
    text = system_ids(base, TEXT)
    study = self_study(
        base, encoder_for(base, Template(prompt=f"<soft>{{{MESSAGES}}}", virtual_tokens=2)),
        objective(folder, study=3, chat_system=True), text, 4,
    )  # fmt: skip
    for record in study.train:
        assert [turn["role"] for turn in record[MESSAGES]] == ["user", "assistant"]
        assert all(turn["content"] for turn in record[MESSAGES])


def test_a_base_that_repeats_itself_is_refused_with_the_numbers(folder, base):
    greedy = objective(folder, study=40, study_temperature=0.0, study_kinds=("facts",))
    with pytest.raises(DataError, match=r"wrote \d+ different questions .* in 160 attempts .* repeated.* ask for 40"):
        self_study(base, encoder_for(base, TEMPLATE), greedy, text_ids(base, TEXT), 32)


@pytest.mark.parametrize(
    ("question", "problem"),
    [
        (" ?!", "empty"),
        ("who is it", None),
        ("Who  was the Bear?", "repeated"),
        ("the fox the fox the fox the fox", "looping"),
        ("what did the fox say to the bear", None),
    ],
)
def test_questions_that_are_left_out(question, problem):
    assert _problem(question, ["who was the bear"]) == problem


def test_a_damaged_file_is_refused(tmp_path, folder, base):
    study = self_study(base, encoder_for(base, TEMPLATE), objective(folder, study=3), text_ids(base, TEXT), 8)
    path = tmp_path / "study.jsonl"
    write_study(path, study)
    assert read_study(path) == study
    lines = dataclasses.replace(study, train=({"question": "a\u2028b\x85c\u2029d", "answer": "e\rf\n"},))
    write_study(path, dataclasses.replace(lines, kinds=("facts",)))
    assert read_study(path).train == lines.train
    for damage in ("{", '{"split": "test", "kind": "facts", "record": {}}', '{"split": "train"}'):
        path.write_text(damage + "\n")
        with pytest.raises(CheckpointError, match=r"study.jsonl: damaged"):
            read_study(path)


def words(folder: Path, workdir: Path, *more: str) -> list[str]:
    line = [str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir), "--base.path", str(folder / "model")]
    line += ["--data.prompt", TEMPLATE.prompt, "--data.target", TEMPLATE.target, "--method.length", "3"]
    line += ["--train.steps", str(LAST), "--train.evaluate-every", "3", "--train.batch-size", "4"]
    line += ["--loss.over", "distillation", "--loss.text", str(folder / "text.txt"), "--loss.top-k", "9"]
    line += ["--loss.study", "8", "--loss.study-validation", "3", "--loss.study-tokens", "8"]
    return [*line, "--loss.answer-tokens", "4", *more]


def test_a_run_without_data_trains_on_its_questions_and_resumes(folder, tmp_path, monkeypatch):
    assert train.main(words(folder, tmp_path / "run")) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "self_study.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 8 + ["validation"] * 3
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation"]["soft_prompt"]["examples"] == 3
    workdir = tmp_path / "stopped"
    with stopped_at_batch(2):
        assert train.main(words(folder, workdir)) == 143

    def never(*_, **__):
        raise AssertionError("a resumed run reads its questions")

    monkeypatch.setattr("spt_jax.experiment.shared_studies.self_study", never)
    assert train.main(words(folder, workdir, "--resume")) == 0
    assert history(workdir) == history(tmp_path / "run")
    assert arrays(workdir).tobytes() == arrays(tmp_path / "run").tobytes()
    saved = (workdir / "self_study.jsonl").read_text()
    assert saved == (tmp_path / "run" / "self_study.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"study": -1}, "loss.study is -1"),
        ({"study": 0, "study_validation": 2}, "it needs loss.study"),
        ({"answer_tokens": 0}, "it needs loss.answer_tokens"),
        ({"study_kinds": ()}, "at least one kind"),
        ({"study_kinds": ("facts", "facts")}, "none twice"),
        ({"study_tokens": 0}, "loss.study_tokens is 0"),
        ({"study_temperature": float("nan")}, "loss.study_temperature"),
    ],
)
def test_options_out_of_range(folder, options, problem):
    with pytest.raises(ConfigError, match=problem):
        objective(folder, **options)


def test_two_sources_of_validation_records_are_refused(folder, tmp_path, capsys):
    both = "--loss.study-validation", "2", "--data.validation", str(folder / "text.txt")
    assert train.main(words(folder, tmp_path / "run", *both)) == 2
    assert "loss.study_validation and data.validation both give validation records" in capsys.readouterr().err


def test_a_template_with_two_fields_is_refused(folder, base):
    template = Template(prompt="<soft>{question} {more}: ", target=" {answer}", virtual_tokens=3)
    with pytest.raises(ConfigError, match="into the only field"):
        self_study(base, encoder_for(base, template), objective(folder), text_ids(base, TEXT), 8)


def test_trials_of_a_sweep_share_their_questions(folder, tmp_path, monkeypatch, capsys):
    calls, write = [], shared_studies.self_study

    def counted(*inputs):
        calls.append(1)
        return write(*inputs)

    monkeypatch.setattr(shared_studies, "self_study", counted)
    workdir = tmp_path / "sweep"
    line = ["sweep", str(ROOT / "configs" / "local_files.py"), "--workdir", str(workdir)]
    line += ["--base.path", str(folder / "model"), "--data.prompt", "<soft>{question}: ", "--data.target", "{answer}"]
    line += ["--train.steps", "1", "--train.batch-size", "4", "--loss.over", "distillation", "--loss.study", "6"]
    line += ["--loss.text", str(folder / "text.txt"), "--loss.study-validation", "2", "--loss.study-tokens", "10"]
    line += ["--loss.answer-tokens", "4", "--over", "method.length=2,3", "--seeds", "0", "1"]
    line += ["--evaluation.generate", "1"]
    assert main(line) == 0, capsys.readouterr().err
    (file,) = (workdir / "self_studies").iterdir()
    assert len(calls) == 1 and len(read_study(file).train) == 6
    (workdir / "results.json").unlink()
    assert main([*line, "--resume"]) == 0 and len(calls) == 1
    file.write_text("{")
    assert main([*line, "--resume"]) == 1
    assert "damaged" in capsys.readouterr().err


def test_studies_are_shared_if_nothing_they_depend_on_differs(folder, base):
    text, own = text_ids(base, TEXT), objective(folder)
    key = study_key(base, encoder_for(base, TEMPLATE), own, text)
    longer = dataclasses.replace(TEMPLATE, virtual_tokens=9)
    assert study_key(base, encoder_for(base, longer), dataclasses.replace(own, temperature=2.0), text) == key
    others = [
        study_key(base, encoder_for(base, dataclasses.replace(TEMPLATE, target="{answer}")), own, text),
        study_key(base, encoder_for(base, TEMPLATE), objective(folder, study=11), text),
        study_key(base, encoder_for(base, TEMPLATE), objective(folder, answer_tokens=5), text),
        study_key(base, encoder_for(base, TEMPLATE), own, text[1:]),
        study_key(base, encoder_for(base, TEMPLATE, max_length=100), own, text),
    ]
    assert len({key, *others}) == 6


def test_fit_needs_no_records_beside_a_study(folder, base, capsys):
    options = {"steps": 1, "batch_size": 2, "progress": False}
    own = objective(folder, study=4, study_validation=2)
    result = spt_jax.fit(base, spt_jax.PromptTuning(length=3), TEMPLATE, [], objective=own, **options)
    assert result.validation["examples"] == 2 and capsys.readouterr().err == ""
    with pytest.raises(DataError, match="train: no records"):
        spt_jax.fit(base, spt_jax.PromptTuning(length=3), TEMPLATE, [], objective=objective(folder, study=0), **options)
