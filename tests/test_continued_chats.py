"""Distillation of a text as system turn where the chat template writes another one by default."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import spt_jax
import train
from spt_jax.data.encoder import encoder_for
from spt_jax.data.remembered import remembered_system
from spt_jax.data.templates import MESSAGES, Template
from spt_jax.errors import ConfigError, DataError
from spt_jax.evaluation.after_text import ids_after_text
from spt_jax.experiment.distillation import with_answers
from spt_jax.experiment.self_study import self_study
from spt_jax.inference.forward import run_stream
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.models.attention import Stream
from spt_jax.prompts.initializers import Initializer
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from spt_jax.training.objectives import Distillation
from tests.chat_layouts import LAYOUTS

TEXT = "The question is a text of the world. The answer is good and positive.\n"
ASKED = [[{"role": "user", "content": text}] for text in ("Hello", "The world?", "good")]
ANSWERED = [{MESSAGES: [*turns, {"role": "assistant", "content": "the answer"}]} for turns in ASKED]


@pytest.fixture(scope="module")
def base():
    bare = tiny_base("llama", vocab_size=420, max_position_embeddings=512)
    return dataclasses.replace(bare, tokenizer=LAYOUTS["qwen2"].tokenizer())


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def template_of(base) -> Template:
    return remembered_system(base, TEXT).template


def test_the_teacher_reads_the_chat_with_the_text_as_system_turn(base, text_file):
    template = template_of(base)
    text = Distillation(text=text_file, chat_system=True, system_rest=template.system).text_ids(base)
    plain, own = encoder_for(base, Template(prompt=f"{{{MESSAGES}}}")), encoder_for(base, template)
    for turns in ASKED:
        whole = plain.prompt_ids({MESSAGES: [{"role": "system", "content": TEXT}, *turns]})
        np.testing.assert_array_equal(ids_after_text(base, text, own.prompt_ids({MESSAGES: turns})), whole)


def test_a_prefix_that_holds_the_text_agrees_with_it(base, text_file, tmp_path):
    """The template of the remembered prompt is that of the training; nothing is left to learn."""
    remembered = spt_jax.remember(base, TEXT, chat_system=True, progress=False)
    remembered.save(tmp_path / "remembered")
    method = spt_jax.PrefixTuning(
        length=len(remembered_system(base, TEXT).ids),
        init=Initializer(name="prompt", path=str(tmp_path / "remembered")),
    )
    result = spt_jax.fit(
        base, method, template_of(base), ANSWERED, validation=ANSWERED, steps=1, batch_size=2, learning_rate=1e-9,
        objective=Distillation(text=text_file, chat_system=True), progress=False,
    )  # fmt: skip
    metrics = result.validation
    assert metrics["agreement"] == 1.0 and abs(metrics["kl_to_text"]) < 1e-5


def test_questions_of_a_self_study_follow_the_text(base, text_file):
    template = template_of(base)
    objective = Distillation(
        text=text_file, chat_system=True, system_rest=template.system, study=3, answer_tokens=4, study_tokens=8
    )
    study = self_study(base, encoder_for(base, template), objective, objective.text_ids(base), 4)
    assert [[turn["role"] for turn in record[MESSAGES]] for record in study.train] == [["user", "assistant"]] * 3


def test_the_ways_are_named(base, text_file):
    with pytest.raises(ConfigError, match=r"by default; leave out chat_system, or train a prefix with data.continues"):
        Distillation(text=text_file, chat_system=True).text_ids(base)
    given = Distillation(text=text_file, chat_system=True, system_rest="no")
    with pytest.raises(ConfigError, match=r"loss.system_rest is 'no'; it follows from data.system"):
        spt_jax.fit(base, spt_jax.PrefixTuning(length=2), template_of(base), ANSWERED, steps=1, objective=given)
    with pytest.raises(ConfigError, match=r"data.system is 'no', but what is left of the system turn .* set data"):
        Distillation(text=text_file, chat_system=True, system_rest="no").text_ids(base)


@pytest.mark.parametrize(
    ("chat", "problem"),
    [("Hello", "must be a list of turns"), (["Hello"], "needs 'role' and 'content'; this one is 'Hello'")],
)
def test_a_chat_that_is_none_is_named_before_answers_are_generated(base, text_file, chat, problem):
    template = template_of(base)
    objective = Distillation(text=text_file, chat_system=True, system_rest=template.system, answer_tokens=4)
    text, records = objective.text_ids(base), [{MESSAGES: ASKED[0]}, {MESSAGES: chat}]
    with pytest.raises(DataError, match=rf"record 2: .*{problem}"):
        with_answers(base, encoder_for(base, template), objective, text, records, 4)


def test_a_chat_that_goes_on_after_an_answer_is_answered(base, text_file):
    encoder = encoder_for(base, template_of(base))
    objective = Distillation(text=text_file, chat_system=True, system_rest=encoder.template.system, answer_tokens=4)
    longer = [*ANSWERED[0][MESSAGES], *ASKED[1]]
    records = [{MESSAGES: longer}, ANSWERED[2]]
    found = with_answers(base, encoder, objective, objective.text_ids(base), records, 4)
    whole = encoder_for(base, Template(prompt=f"{{{MESSAGES}}}"))
    ids = whole.prompt_ids({MESSAGES: [{"role": "system", "content": TEXT}, *longer]})
    (answer,) = generate(base, [ids], None, SamplingConfig(max_new_tokens=4, end_ids=whole.end_ids))
    assert found == [{MESSAGES: [*longer, {"role": "assistant", "content": answer.text.strip()}]}, ANSWERED[2]]


def greedy(base, example) -> list[int]:
    """Returns the most probable ids at the targets of an example."""
    ids = jnp.asarray(example.ids)[None]
    stream = Stream(jnp.arange(ids.shape[1])[None], jnp.ones_like(ids), jnp.zeros_like(ids))
    hidden, _ = run_stream(base.model, None, ids, stream)
    at = np.flatnonzero(example.predicted) - 1
    return np.asarray(base.model.logits(hidden)[0, at].argmax(-1)).tolist()


def test_a_run_answers_chats_and_compares_with_the_base_alone(base, text_file, tmp_path):
    write_tiny_checkpoint(tmp_path / "model", "llama", vocab_size=420, max_position_embeddings=512)
    base.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({MESSAGES: turns}) + "\n" for turns in ASKED))
    line = ["local_files", "--workdir", str(tmp_path / "run"), "--base.path", str(tmp_path / "model")]
    line += [word for split in ("train", "test") for word in (f"--data.{split}", str(tmp_path / "chats.jsonl"))]
    line += ["--data.prompt", f"{{{MESSAGES}}}", "--data.continues", "--data.system", template_of(base).system]
    line += ["--method.name", "prefix_tuning", "--method.length", "2", "--train.steps", "1", "--train.batch-size", "2"]
    line += ["--loss.over", "distillation", "--loss.text", text_file, "--loss.chat-system", "--loss.answer-tokens", "5"]
    line += ["--evaluation.max-new-tokens", "5"]
    assert train.main(line) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert results["with_text"]["exact_match"] == 1.0
    loaded = spt_jax.load_base(str(tmp_path / "model"), dtype="float32")
    encoder, system = encoder_for(loaded, Template(prompt=f"{{{MESSAGES}}}")), {"role": "system", "content": TEXT}
    same: list[bool] = []
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    answers = [line["reference"] for line in lines if line["prompt"] == "no_prompt"]
    for turns, answer in zip(ASKED, answers, strict=True):
        chat = [*turns, {"role": "assistant", "content": answer}]
        alone, after = (encoder.encode({MESSAGES: own}, 0) for own in (chat, [system, *chat]))
        same += np.equal(greedy(loaded, alone), greedy(loaded, after)).tolist()
    assert results["no_prompt"]["agreement"] == pytest.approx(np.mean(same), abs=1e-6)
