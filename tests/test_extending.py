"""The code in docs/extending.md adds a family, a method, an objective and a task, which then work like all others."""

import dataclasses
import json
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

import spt_jax
import train
from spt_jax.bases.families import FAMILIES
from spt_jax.config import BaseConfig, DataConfig, ExperimentConfig
from spt_jax.data.templates import TEMPLATE_TASKS
from spt_jax.errors import ConfigError
from spt_jax.experiment.command_line import parse_train
from spt_jax.experiment.config import make_template, resolve
from spt_jax.inference.forward import output_logits
from spt_jax.models.attention import Stream
from spt_jax.models.quantized import KERNEL_ARRAYS
from spt_jax.prompts import METHODS
from spt_jax.serving.classify import Classifier
from spt_jax.studies.settings import config_fields, flag_words
from spt_jax.tasks import TASKS, Verbalizers, register
from spt_jax.testing import tiny_base, write_tiny_checkpoint
from spt_jax.training.config import LossConfig
from spt_jax.training.objectives import OBJECTIVES
from tests.jobs import ROOT, losses, words, write_task

RECORDS = [{"text": text, "label": label} for text, label in (("yes", "H"), ("no", "L"), ("maybe so", "N"))]


@pytest.fixture(scope="module")
def page():
    """The names that the page defines. What it registers is removed again."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    names = {"__name__": "page"}
    registries = [
        (registry, dict(registry)) for registry in (FAMILIES, METHODS, OBJECTIVES, TASKS, TEMPLATE_TASKS, KERNEL_ARRAYS)
    ]
    for block in blocks:
        exec(block, names)
    yield names
    for registry, before in registries:
        registry.clear()
        registry.update(before)
    transformers.CONFIG_MAPPING._extra_content.pop("smooth_llama")


def test_the_family_is_the_function_that_llama_is_with_its_activation(page, tmp_path):
    theirs = spt_jax.load_base(write_tiny_checkpoint(tmp_path / "llama", "llama", hidden_act="gelu_pytorch_tanh"))
    ours = spt_jax.load_base(write_tiny_checkpoint(tmp_path / "smooth", "smooth_llama"))
    assert ours.config == dataclasses.replace(theirs.config, family="smooth_llama")
    template = spt_jax.Template(prompt="{text}", target="{label}")
    encoder = spt_jax.Encoder(template, ours.tokenizer, ours.config.vocab_size, 64)
    examples = encoder.encode_all(RECORDS)
    plan = spt_jax.plan_batches(examples, lead=0, batch_size=3)
    rows = spt_jax.place_batch(spt_jax.pack(examples, plan), ours.mesh).rows
    one, other = (output_logits(base.model, None, None, rows) for base in (ours, theirs))
    np.testing.assert_array_equal(one, other)


def test_the_method_trains_and_its_prompt_is_saved_and_answers(page, tmp_path):
    directory = write_tiny_checkpoint(tmp_path / "base", "smooth_llama")
    base, method = spt_jax.load_base(directory), page["DirectionTuning"](length=4)
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", virtual_tokens=4)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 64)
    examples = encoder.encode_all(RECORDS)
    plan = spt_jax.plan_batches(examples, lead=encoder.head_length(examples), batch_size=3)
    config = spt_jax.resolve_optimizer(spt_jax.OptimizerConfig(), base.config.family, method.recipe)
    optimizer = spt_jax.make_optimizer(config, 20)
    state = spt_jax.init_state(jax.random.key(0), base, method, optimizer)
    step = spt_jax.make_train_step(base, method, optimizer)
    batch = spt_jax.place_batch(spt_jax.pack(examples, plan), base.mesh)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    virtual = method.materialize(state.params, base.model)
    np.testing.assert_allclose(jnp.linalg.norm(virtual.tokens, axis=1), state.params["length"], rtol=1e-5)
    spt_jax.save_prompt(tmp_path / "prompt", base, method, virtual, template)
    saved = spt_jax.load_prompt(tmp_path / "prompt", base)
    assert saved.method == method
    np.testing.assert_array_equal(saved.virtual.tokens, virtual.tokens)


def test_the_objective_is_its_formula_in_every_layout_and_trains(page):
    base, method, objective = tiny_base(), spt_jax.PromptTuning(length=4), page["FocalCrossEntropy"](gamma=1.5)
    assert LossConfig(over="focal").objective(1) == page["FocalCrossEntropy"]()
    template = spt_jax.Template(prompt="<soft>{text}", target="{label}", virtual_tokens=4)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 64)
    records = [{"text": record["text"], "label": record["label"] * (1 + i)} for i, record in enumerate(RECORDS)]
    plain = encoder.encode_all(records)
    examples = spt_jax.prepare_examples(objective, base, plain)
    optimizer = optax.sgd(0.5)
    losses = {}
    for packing in (True, False):
        plan = spt_jax.plan_batches(examples, lead=4, batch_size=3, packing=packing, multiple=3)
        batch = spt_jax.place_batch(spt_jax.pack(examples, plan), base.mesh)
        state = spt_jax.init_state(jax.random.key(0), base, method, optimizer)
        virtual = method.materialize(jax.tree.map(jnp.array, state.params), base.model)  # the step donates its state
        step = spt_jax.make_train_step(base, method, optimizer, objective, microbatches=3)
        for _ in range(8):
            state, metrics = step(state, batch)
            losses.setdefault(packing, []).append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-4)
    assert losses[True][-1] < 0.9 * losses[True][0]
    alone = []
    for example in plain:
        plan = spt_jax.plan_batches([example], lead=0, batch_size=1, packing=False)
        rows = spt_jax.place_batch(spt_jax.pack([example], plan), base.mesh).rows
        logits = output_logits(base.model, virtual, None, rows)[0]
        chosen = jax.nn.log_softmax(logits)[rows.target_outputs[0], rows.target_ids[0]][rows.target_weights[0] > 0]
        alone.append(float(jnp.mean(-((1 - jnp.exp(chosen)) ** 1.5) * chosen)))
    np.testing.assert_allclose(losses[True][0], np.mean(alone), rtol=1e-5)


def test_the_objective_and_its_options_are_flags(page, tmp_path, capsys):
    focal = page["FocalCrossEntropy"]
    write_task(tmp_path)

    def parsed(*more):
        return resolve(parse_train(words(tmp_path, tmp_path / "run", *more)).config).loss

    assert parsed("--loss.over", "focal", "--loss.gamma", "1.5").objective(2) == focal(gamma=1.5)
    assert parsed("--loss.over=focal", "--loss.class-weights", "1", "3") == LossConfig.of(
        focal(), class_weights=(1.0, 3.0)
    )
    assert parsed() == LossConfig(over="verbalizers")
    assert "loss.gamma" in config_fields(parse_train(words(tmp_path, tmp_path)).config)
    setting = flag_words("loss.gamma", "0.5", parse_train(words(tmp_path, tmp_path)).config)
    assert parsed("--loss.over", "focal", *setting) == LossConfig.of(focal(gamma=0.5))
    with pytest.raises(ConfigError, match=r"loss.over is 'focall'; did you mean 'focal'\?"):
        parsed("--loss.over", "focall")
    with pytest.raises(ConfigError, match=r"loss\.gamma is not compatible with loss\.over=vocabulary"):
        dataclasses.replace(LossConfig.of(focal()), over="vocabulary")
    with pytest.raises(SystemExit):
        parsed("--loss.gamma", "1.5")
    assert "Unrecognized options: --loss.gamma" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("--loss.over", "focal", "--help")
    assert "how much less well predicted targets count" in capsys.readouterr().out


def test_a_run_with_the_objective_records_its_options(page, tmp_path, capsys):
    """The focal loss is the cross-entropy where gamma is 0, and less elsewhere. Verbalizers are one token each."""
    write_task(tmp_path)
    short = ("--train.steps", "3", "--train.evaluate-every", "3", "--data.test", "None", "--data.hard-prompt")

    def run(name, *more):
        assert train.main(words(tmp_path, tmp_path / name, *more, *short)) == 0
        return np.asarray([loss for _, loss in losses(tmp_path / name)])

    plain = run("plain", "--loss.over", "vocabulary")
    np.testing.assert_allclose(run("zero", "--loss.over", "focal", "--loss.gamma", "0"), plain, rtol=1e-5)
    assert (run("focal", "--loss.over", "focal", "--loss.gamma", "1") < 0.999 * plain).all()
    recorded = json.loads((tmp_path / "focal" / "config.json").read_text())["loss"]
    assert recorded == {"over": "focal", "label_smoothing": 0.0, "class_weights": [], "gamma": 1.0}
    recorded = json.loads((tmp_path / "plain" / "config.json").read_text())["loss"]
    assert recorded == {"over": "vocabulary", "label_smoothing": 0.0, "class_weights": []}  # as in version 0.1
    again = words(tmp_path, tmp_path / "focal", *short, "--loss.over", "focal", "--resume")
    assert train.main(again) == 2
    assert "loss.gamma: 1.0 in the work directory, 2.0 now" in capsys.readouterr().err
    assert train.main([*again, "--loss.gamma", "1"]) == 0


def test_options_without_a_default_must_be_given(page, tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Powered(spt_jax.Objective):
        power: float

        def __post_init__(self):
            if self.power <= 0:
                raise ConfigError(f"power is {self.power}")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Misnamed(spt_jax.Objective):
        over: int = 1

    line = [str(ROOT / "configs" / "quickstart.py"), "--loss.over", "powered"]
    with pytest.raises(ConfigError, match="Powered is not registered"):
        LossConfig.of(Powered(power=1.0))
    OBJECTIVES["powered"], OBJECTIVES["misnamed"] = Powered, Misnamed
    assert parse_train([*line, "--loss.power", "2"]).config.loss.objective(2) == Powered(power=2.0)
    with pytest.raises(SystemExit):
        parse_train(line)
    with pytest.raises(ConfigError, match=r"loss\.over=powered needs loss\.power"):
        LossConfig(over="powered").resolved()
    with pytest.raises(ConfigError, match=r"power is -1\.0"):
        dataclasses.replace(LossConfig.of(Powered(power=1.0)), power=-1.0)
    with pytest.raises(ConfigError, match=r"Misnamed\.over: .*rename it"):
        LossConfig().with_options("misnamed")


@dataclasses.dataclass(frozen=True)
class Mistakes(Verbalizers):
    """Classification by verbalizers that also counts mistakes."""

    name: ClassVar[str] = "mistakes"

    def evaluate(self, scores, data):
        result = super().evaluate(scores, data)
        wrong = sum(p["label"] != p["prediction"] for p in result.predictions)
        return dataclasses.replace(result, metrics={**result.metrics, "mistakes": wrong})


def test_a_task_without_a_head_is_named_on_the_command_line(page, tmp_path, capsys):
    register(Mistakes())
    write_task(tmp_path)
    line = words(tmp_path, tmp_path / "run", "--train.steps", "2", "--train.evaluate-every", "2")
    assert train.main([*line, "--task.name", "mistakes"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["test"]
    assert set(results) == {"soft_prompt", "hard_prompt", "no_prompt"}
    for metrics in results.values():
        assert metrics["mistakes"] == round(30 * (1 - metrics["accuracy"]))
    saved = spt_jax.load_prompt(tmp_path / "run" / "prompt", spt_jax.load_base(tmp_path / "model"))
    assert saved.template.head == "mistakes"
    with pytest.raises(SystemExit):
        train.main([*line, "--task.name", "mistake"])
    assert "task.name is 'mistake'; did you mean" in capsys.readouterr().err


def test_the_task_and_the_head_agree(page, tmp_path):
    register(Mistakes())
    tokens = words(tmp_path, tmp_path / "run", "--task.name")
    deep = ["--method.name", "deep_prompts", *tokens[1:]]

    def task(line):
        return make_template(resolve(parse_train([tokens[0], *line]).config)).head

    assert task([*deep, "mistakes", "--data.prompt", "{text}"]) == "mistakes"
    assert task([*deep, "rating", "--data.prompt", "{text}"]) == "rating"
    assert task([*deep[:-1], "--data.prompt", "{text}"]) == "classification"
    with pytest.raises(ConfigError, match=r"task\.name=rating and method\.head=classification differ"):
        task([*deep, "rating", "--method.head", "classification", "--data.prompt", "{text}"])
    with pytest.raises(ConfigError, match=r"task\.name=rating needs a head, and residual_prompt_tuning has none"):
        task(["--method.name", "residual_prompt_tuning", *tokens[1:], "rating"])
    assert task([*tokens[1:], "rating"]) == "rating"


def test_the_task_trains_and_is_evaluated_saved_and_served(page, tmp_path):
    base = tiny_base()
    data = DataConfig(train="", prompt="{text}", target="{stars}", verbalizers={"1": "H", "2": "L", "5": "N"})
    config = resolve(ExperimentConfig(base=BaseConfig(path=""), data=data, method=spt_jax.DeepPrompts(head="rating")))
    assert (config.loss.over, config.method.classes) == ("vocabulary", 3)
    method, template = config.method, make_template(config)
    encoder = spt_jax.Encoder(template, base.tokenizer, base.config.vocab_size, 64)
    records = [{"text": record["text"], "stars": stars} for record, stars in zip(RECORDS, "125", strict=True)]
    data = spt_jax.make_evaluation_set(base, encoder, records)
    optimizer = optax.adam(0.1)
    state = spt_jax.init_state(jax.random.key(0), base, method, optimizer)
    step = spt_jax.make_train_step(base, method, optimizer, config.loss.objective(data.plan.choices))
    batch = spt_jax.place_batch(spt_jax.pack(data.examples, data.plan), base.mesh)
    untrained = method.materialize(jax.tree.map(jnp.array, state.params), base.model)
    metrics = spt_jax.evaluate(base, data, untrained).metrics
    assert metrics["absolute_error"] == pytest.approx(5 / 3)  # all classes are equally likely, so 1 is predicted
    for _ in range(30):
        state, _ = step(state, batch)
    virtual = method.materialize(state.params, base.model)
    trained = spt_jax.evaluate(base, data, virtual)
    assert trained.metrics["absolute_error"] == 0 and trained.metrics["loss"] < metrics["loss"] / 2
    spt_jax.save_prompt(tmp_path / "prompt", base, method, virtual, template)
    assert spt_jax.load_prompt(tmp_path / "prompt", base).template == template
    bank = spt_jax.PromptBank(base)
    bank.load("stars", tmp_path / "prompt")
    classifier = Classifier(bank)
    served = classifier.score(classifier.read("stars", [{"text": record["text"]} for record in records]))
    for own, prediction in zip(served, trained.predictions, strict=True):
        np.testing.assert_allclose(list(own.values()), prediction["log_probabilities"], atol=1e-4)
        assert sum(np.exp(list(own.values()))) == pytest.approx(1, rel=1e-5)


def test_the_kernel_array_is_read_split_and_multiplied(page):
    """A base of signs is the plain base with the kernels that the signs stand for, on one device and on four."""
    plain = tiny_base(num_key_value_heads=4)
    ids = jnp.asarray([[1, 40, 41, 42, 60, 9]])
    places = jnp.arange(6)[None]
    stream = Stream(places, jnp.ones_like(places), jnp.zeros_like(places))

    @jax.jit
    def logits(model):
        return model.logits(model.run(model.embed(ids), stream)[0])

    def rounded(table):
        """As a row of int8 values and a scale."""
        scale = jnp.abs(table).max(axis=1, keepdims=True) / 127
        return jnp.rint(table / scale) * scale

    def signs(path, leaf):
        if path[-1].key == "output":
            return rounded(leaf.T).T
        if path[-1].key == "embedding":
            return rounded(leaf)
        if path[-1].key != "kernel":
            return leaf
        return jnp.where(leaf > 0, 1.0, -1.0) * jnp.abs(leaf).mean(axis=1, keepdims=True)

    params = jax.tree_util.tree_map_with_path(signs, plain.params)
    expected = logits(dataclasses.replace(plain.model, params=params))
    assert np.abs(expected - logits(plain.model)).max() > 0.1
    for axes in ({}, {"fsdp": 2, "tensor": 2}):
        mesh = spt_jax.make_mesh(spt_jax.MeshConfig(**axes))
        base = tiny_base(quantize="binary", mesh=mesh, num_key_value_heads=4)
        np.testing.assert_allclose(logits(base.model), expected, atol=1e-4)
