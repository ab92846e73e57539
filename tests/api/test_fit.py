"""`fit` trains what the command line trains, on records in memory, with any objective, optimizer and callback."""

import dataclasses
import functools
import re
import time
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spt_jax
from spt_jax.api.fit import _optimizer
from spt_jax.data.encoder import encoder_for
from spt_jax.errors import ConfigError, DataError
from spt_jax.runtime import progress
from spt_jax.runtime.waits import spoken
from spt_jax.testing import tiny_base
from spt_jax.training.config import given
from tests.examples import loss_alone
from tests.jobs import unmeasured, write_task

TEMPLATE = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", verbalizers={"good": "H", "bad": "L"})
METHOD = spt_jax.PromptTuning(length=4)
OPTIONS = {"steps": 12, "batch_size": 8, "evaluate_every": 4, "progress": False}


class Recorder(spt_jax.Callback):
    def __init__(self, end=None):
        self.losses, self.validations, self.prompts, self.end = [], [], [], end

    def trained(self, step, metrics):
        self.losses.append(metrics["loss"])

    def validated(self, step, metrics):
        self.validations.append(step)

    def improved(self, step, prompt):
        self.prompts.append((step, prompt))

    def ends(self):
        return self.end is not None and len(self.losses) >= self.end


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_task(folder)
    return folder


@pytest.fixture(scope="module")
def base(task: Path) -> spt_jax.FrozenBase:
    return spt_jax.load_base(task / "model")


@pytest.fixture(scope="module")
def split(task: Path):
    return {name: spt_jax.read_records(str(task / f"{name}.jsonl")) for name in ("train", "validation")}


@pytest.fixture(scope="module")
def told() -> Recorder:
    """What the callback of `result` was told."""
    return Recorder()


@pytest.fixture(scope="module")
def result(base, split, told) -> spt_jax.FitResult:
    validation = split["validation"]
    return spt_jax.fit(base, METHOD, TEMPLATE, split["train"], validation=validation, callbacks=[told], **OPTIONS)


def same(one: spt_jax.FitResult, other: spt_jax.FitResult) -> bool:
    return np.asarray(one.prompt.virtual.tokens).tobytes() == np.asarray(other.prompt.virtual.tokens).tobytes()


def test_a_stream_and_an_optax_transformation_give_the_same_prompt_silently(base, split, result, capsys):
    stream = datasets.Dataset.from_list(split["train"]).to_iterable_dataset()
    resolved = spt_jax.resolve_optimizer(spt_jax.OptimizerConfig(), base.config.family)
    given = {"optimizer": spt_jax.make_optimizer(resolved, 12), "validation": split["validation"]}
    assert same(spt_jax.fit(base, METHOD, TEMPLATE, stream, **given, **OPTIONS), result)
    assert capsys.readouterr() == ("", "")


def test_a_run_in_a_work_directory_is_resumed_bit_for_bit(base, split, result, tmp_path: Path):
    class Failing(spt_jax.Callback):
        def trained(self, step, metrics):
            if step == 7:
                raise RuntimeError("out of power")

    options = {**OPTIONS, "validation": split["validation"], "workdir": tmp_path / "run"}
    with pytest.raises(RuntimeError, match="out of power"):
        spt_jax.fit(base, METHOD, TEMPLATE, split["train"], **options, callbacks=[Failing()])
    with pytest.raises(ConfigError, match="exists"):
        spt_jax.fit(base, METHOD, TEMPLATE, split["train"], **options)
    with pytest.raises(ConfigError, match="the examples of train are not those"):
        spt_jax.fit(base, METHOD, TEMPLATE, split["train"][1:], **options, resume=True)
    resumed = spt_jax.fit(base, METHOD, TEMPLATE, split["train"], **options, resume=True)
    assert same(resumed, result) and unmeasured(list(resumed.history)) == unmeasured(list(result.history))
    stored = spt_jax.load_prompt(tmp_path / "run" / "prompt", base)
    np.testing.assert_array_equal(stored.virtual.tokens, result.prompt.virtual.tokens)
    for option in ({"resume": True}, {"overwrite": True}, {"checkpoint_every": 2}):
        with pytest.raises(ConfigError, match="need a workdir"):
            spt_jax.fit(base, METHOD, TEMPLATE, split["train"], **OPTIONS, **option)


def test_callbacks_are_told_what_happens(result, told):
    assert told.validations == [4, 8, 12]
    assert told.losses == [line["loss"] for line in result.history if "loss" in line]
    assert [step for step, _ in told.prompts] == sorted({step for step, _ in told.prompts})
    step, best = told.prompts[-1]
    assert step == result.best_step
    np.testing.assert_array_equal(best.virtual.tokens, result.prompt.virtual.tokens)


def test_callbacks_end_the_run_which_shows_its_progress(base, split, capsys, monkeypatch):
    monkeypatch.setattr(progress, "line_seconds", lambda elapsed: 0.0)
    ending, options = Recorder(5), {**OPTIONS, "validation": split["validation"], "progress": True}
    ended = spt_jax.fit(base, METHOD, TEMPLATE, split["train"], **options, callbacks=[Recorder(), ending])
    assert ended.steps == 6 and ending.validations == [4, 6]  # the step after the fifth was dispatched before
    shown = capsys.readouterr()
    assert re.search(r"^training: step 6 of 12, loss \d\.\d+, [\d,]+ tokens/s, .* left$", shown.err, re.MULTILINE)
    assert re.findall(r"^step (\d): validation accuracy [01]\.\d+, loss", shown.err, re.MULTILINE) == ["4", "6"]
    assert not shown.out and "\r" not in shown.err
    assert "note: this prompt cannot be exported to PEFT: PEFT puts all virtual tokens first, but" in shown.err


def test_an_objective_need_not_be_registered(base):
    """The cross-entropy of the target, written out, against that of each sequence alone."""

    class Own(spt_jax.Objective):
        def loss(self, scores, rows):
            return -jnp.sum(rows.target_weights * scores.log_probabilities[..., 0]), jnp.sum(rows.target_weights)

    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", virtual_tokens=4)
    records = [{"text": "nice", "label": "good"}, {"text": "so sad", "label": "bad"}]
    options = {**OPTIONS, "steps": 2, "batch_size": 2}
    result = spt_jax.fit(base, METHOD, template, records, objective=Own(), callbacks=[Recorder(1)], **options)
    start = spt_jax.init_state(jax.random.key(0), base, METHOD, optax.sgd(1.0)).params
    examples = encoder_for(base, template).encode_all(records)
    expected, _ = loss_alone(base, METHOD.materialize(start, base.model).tokens, examples)
    np.testing.assert_allclose(result.history[0]["loss"], expected, rtol=1e-5)
    assert result.validation is None and result.best_step == 2


def test_an_objective_takes_its_options_and_the_number_of_classes(base, split):
    smooth = spt_jax.VerbalizerCrossEntropy(choices=7, label_smoothing=0.5)
    loss = given(smooth, (1.0, 0.0))
    assert loss.objective(2) == spt_jax.VerbalizerCrossEntropy(choices=2, label_smoothing=0.5)
    assert loss.class_weights == (1.0, 0.0) and loss.uses_choices

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Counting(spt_jax.VerbalizerCrossEntropy):
        scale: float = 1.0

    loss = given(Counting(choices=7, scale=3.0)).resolved()
    assert loss.objective(2) == Counting(choices=2, scale=3.0) and loss.uses_choices and not loss.needs_head
    with pytest.raises(ConfigError, match=r"loss\.class_weights must be finite"):
        given(Counting(choices=2), (-1.0, 1.0))
    with pytest.raises(ConfigError, match=r"loss\.class_weights has 3 numbers for 2 classes"):
        spt_jax.fit(base, METHOD, TEMPLATE, split["train"], **OPTIONS, class_weights=(1.0, 1.0, 1.0))
    first, second = TEMPLATE.verbalizers
    alike = [{**record, "label": first} for record in split["train"][:4]]
    with pytest.raises(ConfigError, match=rf"is 0 for every class that the training records have.* {first}, {second}$"):
        spt_jax.fit(base, METHOD, TEMPLATE, alike, **OPTIONS, class_weights=(0.0, 1.0))
    generator = spt_jax.Template(prompt="<soft>{text}", target="{label}")
    with pytest.raises(ConfigError, match=r"loss\.over=Counting needs data\.verbalizers with at least 2 classes"):
        spt_jax.fit(base, METHOD, generator, split["train"], **OPTIONS, objective=Counting(choices=2))


def test_the_optimizer_is_options_or_a_transformation(base, split):
    config, arguments = (
        spt_jax.OptimizerConfig(name="sgd", learning_rate=0.05),
        (base, METHOD, TEMPLATE, split["train"]),
    )
    assert _optimizer(dataclasses.replace(config, learning_rate=None), 0.05) == _optimizer(config, None)
    assert _optimizer(None, 0.05) == (None, spt_jax.OptimizerConfig(learning_rate=0.05))
    with pytest.raises(ConfigError, match="an Optax transformation includes its learning rate"):
        spt_jax.fit(*arguments, optimizer=optax.adam(0.1), learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"learning_rate is 0\.1, and that of optimizer is 0\.05"):
        spt_jax.fit(*arguments, optimizer=config, learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate is 0\.0; it must be a number above 0"):
        spt_jax.fit(*arguments, learning_rate=0.0)


def test_each_task_gets_its_prompt(base, split):
    records = [{**record, "task": name} for record in split["train"][:8] for name in ("one", "two")]
    template = dataclasses.replace(TEMPLATE, task="task")
    result = spt_jax.fit(base, spt_jax.MultitaskPromptTuning(length=4), template, records, **{**OPTIONS, "steps": 2})
    assert {"one", "two"} < set(result.prompts)
    assert result.prompts["one"].template == dataclasses.replace(TEMPLATE, virtual_tokens=4)
    with pytest.raises(ConfigError, match=r"there are several prompts; take one from `prompts`: .*one, two"):
        result.prompt  # noqa: B018
    other = dataclasses.replace(template, tasks=("one", "three"))
    with pytest.raises(DataError, match="there is no prompt for the task 'two'"):
        spt_jax.fit(base, spt_jax.MultitaskPromptTuning(length=4), other, records, **OPTIONS)


@pytest.mark.parametrize(
    ("records", "error", "message"),
    [
        (["good"], DataError, r"train: record 1 is str \('good'\)"),
        ([], DataError, "train: no records"),
        ([{"text": "good"}], DataError, "train: record 1 has no field 'label'; known: text"),
        ([{"text": "good", "label": None}], DataError, "train: field 'label' of record 1 is null"),
        ([{"text": "good", "label": "god"}], DataError, "train: record 1: label 'god' has no verbalizer; did you mean"),
        ([{"text": ["good"], "label": "good"}], DataError, "train: record 1: the field 'text' is a list"),
    ],
)
def test_records_are_refused_with_the_messages_of_the_command_line(base, records, error, message: str):
    with pytest.raises(error, match=message):
        spt_jax.fit(base, METHOD, TEMPLATE, records, **OPTIONS)
    good = [{"text": "good", "label": "good"}]
    with pytest.raises(error, match=message.replace("train", "validation")):
        spt_jax.fit(base, METHOD, TEMPLATE, good, validation=records, **OPTIONS)


def test_options_are_refused_with_the_messages_of_the_command_line(base, split):
    def fit(method=METHOD, template=TEMPLATE, **options):
        return spt_jax.fit(base, method, template, split["train"], **{**OPTIONS, **options})

    with pytest.raises(ConfigError, match=r"train\.steps is 0; it must be at least 1"):
        fit(steps=0)
    with pytest.raises(ConfigError, match=r"train\.batch_size is 9000, but train has 60 records"):
        fit(batch_size=9000)
    with pytest.raises(ConfigError, match="the target is empty"):
        fit(template=spt_jax.Template(prompt="<soft>{text}"))
    with pytest.raises(ConfigError, match="has no <soft>"):
        fit(template=spt_jax.Template(prompt="{text}", target="{label}"))
    with pytest.raises(ConfigError, match=r"template\.virtual_tokens is 7, but PromptTuning\(length=4\) has 4"):
        fit(template=dataclasses.replace(TEMPLATE, virtual_tokens=7))
    with pytest.raises(ConfigError, match=r"data\.max_length is 5000, but .* has \d+ positions"):
        fit(max_length=5000)


def test_a_wait_is_spoken_after_a_while(capsys):
    with spoken("loading", after=0.0):
        time.sleep(0.1)
    assert re.fullmatch(r"loading \.\.\.\nloading: 0\.\d s\n", capsys.readouterr().err)
    with spoken("loading", after=0.0, shown=False), spoken("loading", after=60.0):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_reprs_are_short(base, result):
    assert repr(base).endswith("parameters, float32, 1 x cpu)") and len(repr(base)) < 200
    assert repr(spt_jax.PromptTuning()) == "PromptTuning()"
    init = spt_jax.init.array(np.zeros((4, 32), np.float32))
    array = "Initializer(name='array', rows=float32[4,32])"
    assert repr(spt_jax.PromptTuning(length=4, init=init)) == f"PromptTuning(length=4, init={array})"
    assert repr(result.prompt.virtual) == "VirtualPrompt(tokens=float32[4,32])"
    name = f"Prompt(PromptTuning(length=4), prompt='<soft>{{text}}\\n', classes=['good', 'bad'], base={base.name!r})"
    assert repr(result.prompt) == name
    assert repr(result).startswith(f"FitResult(steps=12, best_step={result.best_step}, accuracy=")
    assert repr(result).endswith(f"prompt={name})")
    prefix = spt_jax.PrefixTuning(length=2)
    params = prefix.init_params(jax.random.key(0), tiny_base())
    assert len(repr(prefix.materialize(params, tiny_base().model))) < 200

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Named(spt_jax.PromptTuning):
        def __repr__(self):
            return "mine"

    assert repr(Named()) == "mine"


def test_the_example_of_the_package_runs(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spt_jax, "load_base", lambda name: base)
    monkeypatch.setattr(spt_jax, "load_prompt", functools.partial(spt_jax.load_prompt, base=base))
    monkeypatch.setattr(spt_jax, "fit", functools.partial(spt_jax.fit, steps=2, batch_size=2, evaluate_every=1))
    records = [{"question": "Who is Tim?", "answer": "a boy"}, {"question": "What is a dog?", "answer": "an animal"}]
    names = {"spt_jax": spt_jax, "records": records, "others": records[:1]}
    assert spt_jax.__doc__ is not None
    exec("\n".join(line[4:] for line in spt_jax.__doc__.splitlines() if line.startswith("    ")), names)
    assert names["result"].prompt.virtual.tokens.shape == (20, base.config.width)
    (answer,) = names["answers"]
    assert isinstance(answer, str)
