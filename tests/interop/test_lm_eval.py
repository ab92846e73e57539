"""The model of lm-evaluation-harness: what it asks the base, what it refuses, and how the harness gets it."""

import abc
import importlib.machinery
import sys
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.commands.program import main
from spt_jax.errors import ConfigError, DataError, SptError
from spt_jax.evaluation.continuations import score_continuations
from spt_jax.inference.generation import SamplingConfig
from spt_jax.interop.lm_eval import PromptModel, load_model, register, windows
from spt_jax.prompts import VirtualPrompt
from spt_jax.prompts.virtual import Head
from spt_jax.testing import tiny_base, write_tiny_checkpoint


class Request(NamedTuple):
    args: tuple


@pytest.fixture(scope="module")
def base():
    return tiny_base(add_bos=False)


def model_of(base, prompt: str = "<soft>{text}", **options) -> PromptModel:
    count = 2 if "<soft>" in prompt else 0
    virtual = VirtualPrompt(tokens=np.ones((count, base.layout.width), np.float32)) if count else None
    return PromptModel(base, spt_jax.Template(prompt=prompt, target="{a}", virtual_tokens=count), virtual, **options)


def encoded(base, text: str) -> list[int]:
    return base.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(("context", "answer"), [("so sad", " day"), ("so sad ", "day"), ("", "the day")])
def test_context_and_continuation_are_one_text(base, context, answer):
    """Spaces between them belong to the continuation, as in the harness."""
    front, own = model_of(base).pair_ids(context, answer)
    words = encoded(base, context.rstrip())
    first = base.config.vocab_size
    assert front.tolist() == [first, first + 1, *words]
    assert own.tolist() == encoded(base, context + answer)[len(words) :]


def test_what_the_template_puts_after_the_text_separates_them(base):
    front, own = model_of(base, "{text}\n<soft>").pair_ids("so sad", " day")
    first = base.config.vocab_size
    assert front.tolist() == [*encoded(base, "so sad\n"), first, first + 1] and own.tolist() == encoded(base, " day")


def test_a_long_context_loses_its_beginning(base):
    limit, text = base.config.max_positions, "so sad the day" + " so sad the day" * 100
    front, own = model_of(base).pair_ids(text, " is good")
    assert own.tolist() == encoded(base, " is good") and limit - 20 < len(front) + len(own) <= limit
    kept = front[2:].tolist()
    assert front[:2].tolist() == [base.config.vocab_size, base.config.vocab_size + 1]
    assert kept == encoded(base, text)[-len(kept) :]
    after, own = model_of(base, "{text}\n<soft>").pair_ids(text, " is good")
    assert len(after) + len(own) <= limit and after[-1] == base.config.vocab_size + 1
    for prompt in ("<soft>{text}", "{text}\n<soft>"):
        with pytest.raises(DataError, match=f"{limit} positions are too few"):
            model_of(base, prompt).pair_ids("so", text)


def test_the_bare_base_starts_from_a_control_token(base):
    bare = PromptModel(base)
    front, own = bare.pair_ids("", "so sad")
    first = base.tokenizer.bos_token_id if base.tokenizer.bos_token_id is not None else base.tokenizer.eos_token_id
    assert front.tolist() == [first] and own.tolist() == encoded(base, "so sad")
    with pytest.raises(DataError, match="a continuation is empty"):
        bare.pair_ids("so", "")


def test_windows_predict_every_id_once():
    ids = np.arange(10)
    found = list(windows(ids, 4))
    assert np.concatenate([own for _, own in found]).tolist() == ids.tolist()
    for number, (before, own) in enumerate(found):
        assert len(before) + len(own) == (5 if number else 4)
        assert [*before, *own] == list(range(int(own[-1]) + 1 - len(before) - len(own), int(own[-1]) + 1))
    assert [len(own) for _, own in windows(np.arange(3), 4)] == [3] and not list(windows(np.arange(0), 4))
    with pytest.raises(DataError, match="no position"):
        list(windows(ids, 0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": ["\n", ""], "max_gen_toks": 7}, {"max_new_tokens": 7, "stop": ("\n",)}),
        ({"until": "x", "do_sample": False, "temperature": 0.7}, {"max_new_tokens": 5, "stop": ("x",)}),
        ({"do_sample": True, "top_p": 0.5}, {"max_new_tokens": 5, "temperature": 1.0, "top_p": 0.5}),
        ({"temperature": 0.3, "top_k": 4, "max_new_tokens": 2}, {"max_new_tokens": 2, "temperature": 0.3, "top_k": 4}),
    ],
)
def test_options_of_tasks(base, options, expected):
    model = model_of(base, max_gen_toks=5)
    assert model._sampling(options) == SamplingConfig(**expected, end_ids=model._encoder.end_ids)


def test_what_is_refused(base):
    model = model_of(base)
    with pytest.raises(ConfigError, match="'num_beams' is not supported; known: do_sample"):
        model.generate_until([Request(("so", {"num_beams": 2}))])
    with pytest.raises(ConfigError, match="leave out --apply_chat_template"):
        model.apply_chat_template([{"role": "user", "content": "so"}])
    with pytest.raises(ConfigError, match="cannot be scored from its first token on"):
        model_of(base, "{text}\n<soft>").loglikelihood_rolling([Request(("so",))])
    with pytest.raises(ConfigError, match="the template has the fields"):
        model_of(base, "<soft>{text}{more}")
    head = Head(np.zeros((base.layout.width, 2)), np.zeros(2))
    template = spt_jax.Template(prompt="{text}", target="{a}", verbalizers={"x": "x", "y": "y"}, head="classification")
    with pytest.raises(ConfigError, match="has a classification head"):
        PromptModel(base, template, VirtualPrompt(head=head))
    for given, message in (
        ({}, "give --model_args prompt=DIRECTORY, base=MODEL"),
        ({"base": "starter", "device": "cuda:1"}, "leave out --device"),
        ({"base": "starter", "max_batch_size": 4}, "leave out --max_batch_size"),
        ({"base": "starter", "batch_size": "auto:4"}, "must be a number or auto"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_model(**given)


@pytest.mark.parametrize(
    ("length", "last", "message"),
    [
        (64, 1, None),
        (65, 1, "has 66 tokens, and the soft prompt's prefix 0; .* has 64 positions"),
        (3, 10_000, "has virtual token"),
        (3, -1, "has id -1"),
    ],
)
def test_continuations_that_a_base_cannot_score(length, last, message):
    base = tiny_base("gpt2", max_position_embeddings=64)
    pairs = [([2] * length, [last])]
    if message is None:
        assert score_continuations(base, pairs)[0].log_probability < 0
    else:
        with pytest.raises(SptError, match=message):
            score_continuations(base, pairs)


def stand_in(monkeypatch: pytest.MonkeyPatch, **more: dict) -> dict:
    """Puts a harness of a few lines in the place of lm_eval, and returns its registry."""
    models: dict = {}

    class LM(abc.ABC):  # noqa: B024
        def __init__(self):
            self.cache_hook = "none"

    contents = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.models": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.api.registry": {
            "model_registry": models,
            "get_model": models.__getitem__,
            "register_model": lambda name: lambda kind: models.setdefault(name, kind),
        },
        **more,
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    return models


def test_the_harness_makes_the_model_from_its_arguments(tmp_path, monkeypatch):
    directory = write_tiny_checkpoint(tmp_path / "model", "llama", seed=7)
    own, seen = spt_jax.load_base(directory), []
    method = spt_jax.PromptTuning(length=2, init=spt_jax.init.normal())
    virtual = method.materialize(method.init_params(jax.random.key(1), own), own.model)
    template = spt_jax.Template(prompt="<soft><bos>{text}", target="{a}", virtual_tokens=2)
    spt_jax.save_prompt(tmp_path / "prompt", own, method, virtual, template)

    def run() -> None:
        seen.extend(sys.argv)
        model = models["spt_jax"](prompt=str(tmp_path / "prompt"), batch_size=3, device="cuda:0")
        (seen_score,) = model.loglikelihood([Request(("so", " sad"))])
        alone = PromptModel(own, template, virtual).loglikelihood([Request(("so", " sad"))])[0]
        assert seen_score == pytest.approx(alone) and model.cache_hook == "none" and model.batch_size == 3
        with pytest.raises(ConfigError, match=r"no argument 'promt'; did you mean 'prompt'\?"):
            models["spt_jax"](promt="out")

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # which the command sets
    models = stand_in(monkeypatch, **{"lm_eval.__main__": {"cli_evaluate": run}})
    assert main(["lm-eval", "run", "--tasks", "x"]) == 0
    assert seen == ["spt-jax lm-eval", "run", "--tasks", "x"]
    assert register() is models["spt_jax"] and issubclass(register(), sys.modules["lm_eval.api.model"].LM)


def test_without_the_package_a_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "run"]) == 2
    said = (
        "error: the lm-evaluation-harness model needs lm_eval, which is not installed: pip install 'spt_jax[lm-eval]'"
    )
    assert said in capsys.readouterr().err
