"""Configs in YAML and JSON are those in Python; what is wrong in one is said with its place."""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from spt_jax.errors import ConfigError
from spt_jax.experiment.command_line import config_json, parse_train
from spt_jax.experiment.config import ExperimentConfig
from spt_jax.experiment.config_files import load_config_file
from spt_jax.experiment.config_help import config_help
from spt_jax.experiment.mapping_nodes import MAX_BYTES
from spt_jax.experiment.shipped import shipped_configs
from spt_jax.prompts import METHODS, PromptTuning
from spt_jax.training.config import LossConfig
from spt_jax.training.objectives import CrossEntropy

PAGE = (Path(__file__).parents[1] / "docs" / "configs.md").read_text()


def read(folder: Path, text: str, name: str = "own.yaml") -> ExperimentConfig:
    (folder / name).write_text(text)
    return load_config_file(folder / name)


def write(config: ExperimentConfig, suffix: str) -> str:
    return json.dumps(config_json(config)) if suffix == "json" else yaml.safe_dump(config_json(config))


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_comes_back(tmp_path, name, suffix):
    config = load_config_file(shipped_configs()[name])
    assert read(tmp_path, write(config, suffix), f"own.{suffix}") == config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_an_objective_with_options_come_back(tmp_path, name):
    data = {"train": "a.jsonl", "prompt": "{text}"}
    loss = LossConfig.of(CrossEntropy(label_smoothing=0.25), class_weights=(1.0, 2.0))
    given = {"base": {"path": "starter"}, "data": data, "method": {"name": name}, "loss": config_json(loss)}
    config = read(tmp_path, json.dumps(given), "own.json")
    assert config.method == METHODS[name]() and config.loss == loss
    assert read(tmp_path, write(config, "yaml")) == config


def test_the_page_has_a_config_that_the_command_line_overrides(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = read(tmp_path, block, "my.yaml")
    assert isinstance(config.method, PromptTuning) and config.method.init.text == "Classify the question:"
    assert config.optimizer.learning_rate == 0.1 and config.data.prompt.endswith("}\n")
    command = parse_train([str(tmp_path / "my.yaml"), "--train.seed", "3", "--method.name", "prefix_tuning"])
    assert command.config.train.seed == 3 and command.config.train.steps == 1200
    assert command.config.method.name == "prefix_tuning" and command.workdir == Path("out/my")
    said = re.search(r"`my\.yaml, (line 18: .*?)`", PAGE)[1]
    with pytest.raises(ConfigError, match=re.escape(said)):
        read(tmp_path, block.replace("steps:", "step:"), "my.yaml")


def test_yaml_takes_text_as_it_is_written(tmp_path):
    data = "{train: 1, prompt: yes, verbalizers: {no: off, 2: 1e3}, hard_prompt: [on, ~a], chat: yes, limit: 5}"
    config = read(tmp_path, f"base: {{path: 007, dtype: ~}}\ndata: {data}\noptimizer: {{learning_rate: 1e-3}}")
    assert (config.base.path, config.data.train, config.data.prompt) == ("007", "1", "yes")
    assert config.data.verbalizers == {"no": "off", "2": "1e3"} and config.data.hard_prompt == ("on", "~a")
    assert config.data.chat is True and config.data.limit == 5 and config.base.dtype is None
    assert config.optimizer.learning_rate == 0.001


BAD = [
    ("train:\n  stepz: 1", "line 2: there is no field train.stepz; did you mean 'steps'?"),
    ("train:\n  steps: many", "line 2: train.steps is many; it must be an integer"),
    ("train:\n  steps: '3'", 'line 2: train.steps is "3"; it must be an integer'),
    ("train:\n\n  steps: true", "line 3: train.steps is true; it must be an integer"),
    ("optimizer: {learning_rate: 1" + "0" * 400 + "}", "line 1: optimizer.learning_rate is"),
    ("train: {steps: 0}", "line 1: train.steps is 0; it must be at least 1"),
    ("train:\n  steps: 1\n  steps: 2", "line 3: the field 'steps' is given twice"),
    ("train: 3", "line 1: train is 3; it must be a mapping of steps, batch_size"),
    ("trian: {}", "line 1: there is no field trian; did you mean 'train'?"),
    ("mesh: {data: 1.5}", "line 1: mesh.data is 1.5; it must be an integer"),
    ("base: {dtype: float64}", "base.dtype is float64; it must be one of float32, bfloat16, float16 or null"),
    ("data: {hard_prompt: one}", "data.hard_prompt is one; it must be a list"),
    ("data: {hard_prompt: [[a]]}", "data.hard_prompt[0] is a list; it must be text"),
    ("data: {verbalizers: [a]}", "data.verbalizers is a list; it must be a mapping"),
    ("method: {name: prompt_tunin}", "method.name is 'prompt_tunin'; did you mean 'prompt_tuning'?"),
    ("method: {reads: a}", "there is no field method.reads"),
    ("method:\n  init: {rows: [1]}", "line 2: method.init.rows is a list; it must be null"),
    ("loss: {over: nothing}", "line 1: loss.over is 'nothing'; known:"),
    ("loss:\n  gamma: 1", "line 2: there is no field loss.gamma"),
    ("- a", "line 1: the config is a list; it must be a mapping"),
    ("{", "line 1: not valid YAML"),
    ("train: {}\n---\ntrain: {}", "not valid YAML"),
    ("base: &x {path: a}\ndata: *x", "line 2: aliases (*x) are not supported"),
    ("train: !!python/object/apply:os.system [ls]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("? [a]\n: b", "a field's name must be text"),
    ("[" * 2000 + "]" * 2000, "not a config: RecursionError"),
    ("a" * (MAX_BYTES + 1), "a config has at most"),
    ("train: {seed: 010}", "train.seed is 010; it must be an integer"),
    ("train: {steps: 1:30}", "train.steps is 1:30; it must be an integer"),
    ("train: {steps: !!int}", "not valid YAML"),
    ("data: {chat: !!bool maybe}", "not valid YAML"),
    ("optimizer: {learning_rate: 1__0e-3}", "optimizer.learning_rate is 1__0e-3; it must be a number"),
    ("base: {path: \x08}", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert message in str(error.value) and str(tmp_path / "own.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": {"steps": "3"}}', 'train.steps is "3"; it must be an integer'),
        ('{"train": {"steps": 1, "steps": 2}}', "the field 'steps' is given twice"),
        ('{\n"train": }', "line 2: not valid JSON"),
        ('{"data": {"verbalizers": {"a": 1}}}', "data.verbalizers.a is 1; it must be text"),
        ('{"train": {"steps": ' + "1" * 5000 + "}}", "not a config: "),
    ],
)
def test_json_is_as_strict(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text, "own.json")
    assert message in str(error.value)


def test_a_name_that_is_nearly_right(tmp_path):
    (tmp_path / "mine.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"did you mean .*mine\.yaml\?"):
        load_config_file(tmp_path / "mien.yaml")


@pytest.mark.parametrize("names", [("own", "own"), ("first", "second", "first")])
def test_a_config_that_is_a_variant_of_itself_is_refused(tmp_path, names):
    for name, other in itertools.pairwise(names):
        (tmp_path / f"{name}.py").write_text(
            "from pathlib import Path\nfrom spt_jax.config import variant\nfrom spt_jax.prompts import PTuning\n"
            f'get_config = variant(Path(__file__).with_name("{other}.py"), PTuning())\n'
        )
    path, chain = tmp_path / f"{names[0]}.py", " -> ".join(str(tmp_path / f"{name}.py") for name in names)
    with pytest.raises(ConfigError, match=re.escape(f"the config is a variant of itself ({chain}); name another")):
        load_config_file(path)
    assert config_help("spt_jax.experiment.command_line", "Command", [str(path)], "spt-jax train") is None
    path.write_text("from spt_jax.config import ExperimentConfig\nget_config = ExperimentConfig\n")
    with pytest.raises(ConfigError, match="missing"):  # the failure has left nothing behind
        load_config_file(path)
