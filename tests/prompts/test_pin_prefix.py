"""Prompts that sliding windows do not hide: `pin_prefix` of the methods with positions.

The reference of a base whose layers all have a window of 7 is the same base without windows, which is shown one mask:
the last 7 tokens, and all positions of the prompt.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spt_jax
from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.evaluation.attribution import attention_received
from spt_jax.inference.forward import encode_prefix, run_stream
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.interop import export_peft
from spt_jax.models import attention
from spt_jax.prompts import METHODS, PrefixTuning, PromptTuning, VirtualPrompt
from spt_jax.prompts.stacking import stack_prompts
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.runtime.sharding import MeshConfig, make_mesh, replicated
from spt_jax.serving.bank import PromptBank
from spt_jax.serving.engine import Engine
from spt_jax.serving.requests import Request
from spt_jax.testing import tiny_base
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import init_state, loss_and_gradient
from tests.examples import QUICK_COMPILE, VIRTUAL, VOCAB, random_examples
from tests.family import OPTIONS

WINDOW = 7
TEXT = np.asarray([31, 90, 33, 200, 41, 11, 60, 250, 8, 75, 31, 77, 101, 5, 63, 210, 19, 44], np.int32)
SOFT = VOCAB + np.arange(3, dtype=np.int32)
PINNING = [name for name, kind in METHODS.items() if hasattr(kind, "pin_prefix")]


@functools.cache
def base_of(family: str = "mistral", **axes: int):
    """All layers of Mistral have a window; of gpt-oss's, every second one, and those of Gemma 2 have soft caps."""
    return tiny_base(family, mesh=make_mesh(MeshConfig(**axes)))


@functools.cache
def without_windows():
    """The Mistral without windows, with the same weights."""
    base = base_of()
    config = dataclasses.replace(base.config, window=0, window_layers=())
    return dataclasses.replace(base.model, module=base.model.module.clone(config=config))


def prompt_of(kind: str, pinned: bool, seed: int = 0, family: str = "mistral") -> tuple[spt_jax.Method, VirtualPrompt]:
    """A prompt far from its start, so that it changes every answer."""
    method = (PromptTuning if kind == "tokens" else PrefixTuning)(length=3, pin_prefix=pinned)
    base = base_of(family)
    params = jax.tree.map(lambda a: a + 0.3, method.init_params(jax.random.key(seed), base))
    return method, method.materialize(params, base.model)


def ids_of(kind: str, lead: int = 0) -> np.ndarray:
    """BOS, as many other tokens as `lead`, the virtual tokens of a prompt that has some, and text."""
    soft = SOFT if kind == "tokens" else SOFT[:0]
    return np.concatenate([[1], TEXT[:lead], soft, TEXT[lead:]]).astype(np.int32)


@functools.partial(jax.jit, compiler_options=QUICK_COMPILE, static_argnames="lead")
def row_logits(model, virtual, ids, lead: int = 0):
    """Logits [T - lead, V] of a row, after `lead` leading ids."""
    prefix = encode_prefix(model, virtual, ids[:lead])
    own = ids[None, lead:]
    places = virtual.first_position + lead + jnp.arange(own.shape[1])[None]
    stream = attention.Stream(places, jnp.ones_like(own), jnp.zeros_like(own))
    hidden, _ = run_stream(model, virtual, own, stream, prefix)
    return model.logits(hidden)[0]


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch):
    """Makes a base without windows hide what is far behind, except the positions that `pins` lists."""

    def reference(virtual: VirtualPrompt, ids: np.ndarray, pins: np.ndarray) -> np.ndarray:
        def visible(queries, key_positions, key_segments, *, causal):
            assert causal
            before = key_positions[:, None, :] <= queries.positions[:, :, None]
            near = queries.positions[:, :, None] - key_positions[:, None, :] < WINDOW
            return before & (near | jnp.isin(key_positions, pins)[:, None, :])

        monkeypatch.setattr("spt_jax.models.decoder.visible", visible)
        plain = dataclasses.replace(virtual, pinned=False)
        run = jax.jit(lambda *args: row_logits.__wrapped__(*args), compiler_options=QUICK_COMPILE)
        whole = run(without_windows(), plain, ids)
        monkeypatch.undo()
        return np.asarray(whole)

    return reference


@pytest.mark.parametrize("kind", ["tokens", "keys"])
def test_pinned_positions_stay_visible_and_nothing_else_does(kind, masked):
    """However the prompt is split into leading ids and rows, and packed or not."""
    _, virtual = prompt_of(kind, True)
    ids = ids_of(kind, 2)
    pins = np.arange(3) + (3 if kind == "tokens" else 0)
    expected = masked(virtual, ids, pins)
    np.testing.assert_allclose(row_logits(base_of().model, virtual, ids), expected, atol=2e-5)
    for lead in (6, 15):
        ours = row_logits(base_of().model, virtual, ids, lead)
        np.testing.assert_allclose(ours, expected[lead:], atol=2e-5, err_msg=str(lead))
    plain = row_logits(base_of().model, dataclasses.replace(virtual, pinned=False), ids)
    np.testing.assert_allclose(plain, masked(virtual, ids, np.zeros(0, int)), atol=2e-5)
    assert np.abs(plain - expected)[-4:].max() > 0.01


@pytest.mark.parametrize("name", PINNING)
def test_every_such_method_pins(name):
    options = {"length": VIRTUAL, **OPTIONS.get(name, {}), "pin_prefix": True}
    method, base = METHODS[name](**options), base_of()
    params = method.init_params(jax.random.key(0), base)
    virtual = method.materialize(params, base.model)
    assert virtual.pinned is True and method.spec(base.layout).pinned is True
    assert all(part.pinned is True and own.pin_prefix for own, part in method.artifacts(virtual, params).values())


def test_methods_without_positions_cannot():
    assert set(METHODS) - set(PINNING) == {
        "llama_adapter",
        "prefix_tuning_plus",
        "reft",
        "state_tuning",
        "trained_tokens",
    }


def examples_of(kind: str, count: int = 6) -> list[Example]:
    """Examples longer than the window, with the virtual tokens after BOS or none."""
    examples = random_examples("target", count, lengths=(12, 19))
    soft = ids_of(kind)[: 4 if kind == "tokens" else 1]

    def own(example: Example) -> Example:
        kept = example.ids < VOCAB
        ids = np.concatenate([soft, example.ids[kept][1:]]).astype(np.int32)
        return Example(
            ids, np.concatenate([np.zeros(len(soft), bool), example.predicted[kept][1:]]), (), 0, example.index
        )

    return [own(example) for example in examples]


@functools.partial(jax.jit, static_argnames="method", compiler_options=QUICK_COMPILE)
def gradient_of(method, model, params, batch):
    return loss_and_gradient(method, CrossEntropy(), model, params, batch)[:2]


@pytest.mark.parametrize(
    ("kind", "family", "axes", "options"),
    [
        ("tokens", "mistral", {}, {"attention": "cudnn"}),  # on a CPU, XLA's attention under the kernel's one mask
        ("keys", "mistral", {}, {"attention": "cudnn"}),
        ("tokens", "mistral", {"sequence": 2, "data": 2}, {}),
        ("keys", "mistral", {"sequence": 2, "data": 2}, {}),
        ("keys", "gpt_oss", {"data": 2, "tensor": 2}, {"remat": "full"}),
    ],
)
def test_sharing_packing_kernels_and_meshes_change_nothing(kind, family, axes, options):
    method, _ = prompt_of(kind, True, family=family)
    plain, base, examples = base_of(family), base_of(family, **axes), examples_of(kind)
    params = jax.tree.map(lambda a: a + 0.3, method.init_params(jax.random.key(0), plain))
    multiple = {"multiple": 2, "length_multiple": 2} if axes else {}

    def batch_of(base, lead: int, packing: bool):
        plan = plan_batches(examples, lead=lead, batch_size=6, packing=packing, **multiple)
        return place_batch(pack(examples, plan), base.mesh)

    loss, gradient = gradient_of(method, plain.model, params, batch_of(plain, 0, False))
    model = base.model.with_options(**options)
    own = jax.device_put(params, replicated(base.mesh))
    ours, slope = gradient_of(method, model, own, batch_of(base, 4 if kind == "tokens" else 1, True))
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), slope, gradient)
    unpinned = dataclasses.replace(method, pin_prefix=False)
    other, _ = gradient_of(unpinned, plain.model, params, batch_of(plain, 0, False))
    assert abs(float(other) - float(loss)) > 1e-4


@pytest.mark.parametrize("kind", ["tokens", "keys"])
def test_only_a_pinned_prompt_has_a_gradient_from_beyond_the_window(kind):
    """In one layer, a position beyond the window hears of the prompt by attending to it, or not at all."""
    base = tiny_base("mistral", num_hidden_layers=1)
    ids = ids_of(kind)
    far = 1 + WINDOW if kind == "keys" else 4 + WINDOW  # positions of the prompt come first, or after BOS

    def total(params, method, ids):
        logits = row_logits.__wrapped__(base.model, method.materialize(params, base.model), ids)
        return jnp.sum(logits[far:, 7])

    for pinned in (True, False):
        method = (PromptTuning if kind == "tokens" else PrefixTuning)(length=3, pin_prefix=pinned)
        params = method.init_params(jax.random.key(0), base)
        slope = jax.jit(jax.grad(total), static_argnums=1)(params, method, jnp.asarray(ids))
        name = "tokens" if kind == "tokens" else "free"
        assert (float(jnp.abs(slope[name]).max()) > 1e-5) == pinned


def teacher_forced(virtual: VirtualPrompt, prompt: np.ndarray, answer) -> None:
    """Checks an answer against logits of the whole row."""
    ids = np.append(prompt, answer.ids).astype(np.int32)
    logits = np.asarray(row_logits(base_of().model, virtual, np.pad(ids, (0, 32 - len(ids)))))
    for place, (token, log_probability) in enumerate(zip(answer.ids, answer.log_probabilities, strict=True)):
        scores = logits[len(prompt) - 1 + place]
        assert token == scores.argmax()
        assert log_probability == pytest.approx(scores.max() - np.logaddexp.reduce(scores), abs=1e-4)


@pytest.mark.parametrize("kind", ["tokens", "keys"])
def test_generation_from_caches(kind):
    """With and without shared leading ids, and for a pinned and an unpinned prompt in one call."""
    base, how = base_of(), SamplingConfig(max_new_tokens=6)
    prompts = [np.append(ids_of(kind, 2)[:12], [number, 17]).astype(np.int32) for number in (50, 60)]
    both = [prompt_of(kind, pinned)[1] for pinned in (True, False)]
    answers = [generate(base, prompts[:1], both[0], how)[0], *generate(base, prompts, both[0], how)]
    for prompt, answer in zip([prompts[0], *prompts], answers, strict=True):
        teacher_forced(both[0], prompt, answer)
    stacked = stack_prompts(both)
    assert stacked.pinned == (True, False)
    mixed = generate(base, [*prompts, *prompts], stacked, how, prompt_index=[0, 0, 1, 1])
    for number, answer in enumerate(mixed):
        teacher_forced(both[number // 2], prompts[number % 2], answer)


def test_a_server_answers_as_the_trainer(tmp_path):
    """Pinned and unpinned prompts in any mixture; the leading ids of one are longer than the window."""
    base, bank, requests = base_of(), PromptBank(base_of()), []
    templates = {
        "tokens": "<soft>{text} and the answer is",
        "keys": "The question: {text}",
        "long": "<soft>" + "word " * 4 + "{text}",
    }
    prompts = {}
    for name, template in templates.items():
        for pinned in (True, False):
            method, virtual = prompt_of("keys" if name == "keys" else "tokens", pinned)
            folder = tmp_path / f"{name}-{pinned}"
            spt_jax.save_prompt(
                folder,
                base,
                method,
                virtual,
                Template(prompt=template, target="{a}", virtual_tokens=method.token_count),
            )
            bank.add(folder.name, load_prompt(folder, base))
            prompts[folder.name] = virtual
            ids = bank.request_ids(folder.name, {"text": "a question of the world"})
            requests.append(Request(ids, folder.name, SamplingConfig(max_new_tokens=9)))
    answers = Engine(bank, slots=4).generate(requests)
    texts = {}
    for request, answer in zip(requests, answers, strict=True):
        (alone,) = generate(base, [request.ids], prompts[request.prompt], request.sampling)
        assert answer.ids == alone.ids
        np.testing.assert_allclose(answer.log_probabilities, alone.log_probabilities, atol=1e-4)
        texts[request.prompt] = answer.log_probabilities
    assert all(texts[f"{name}-True"] != texts[f"{name}-False"] for name in templates)


def test_attention_that_is_measured_is_that_of_the_model():
    base, examples = base_of(), examples_of("keys", 2)
    shares = [
        attention_received(base, examples, prompt_of("keys", pinned)[1]).by_position.sum(axis=1)
        for pinned in (True, False)
    ]
    assert (shares[0] > 0.01).all() and (shares[1] == 0).all()


def test_saved_with_the_prompt_and_refused_elsewhere(tmp_path):
    base = base_of()
    method, virtual = prompt_of("tokens", True)
    template = Template(prompt="<soft>{a}", target="{b}", virtual_tokens=3)
    saved = load_prompt(save_prompt(tmp_path / "prompt", base, method, virtual, template), base)
    assert saved.virtual.pinned is True and saved.method.pin_prefix
    with pytest.raises(ConfigError, match=r"method.pin_prefix, and PEFT has no such option"):
        export_peft(tmp_path / "peft", saved, base)
    with pytest.raises(CheckpointError, match="`pinned` of the prompt is True, that of its method False"):
        save_prompt(tmp_path / "other", base, PromptTuning(length=3), virtual, template)
    with pytest.raises(ConfigError, match="no layer of tiny-llama has a sliding window; set it to False"):
        init_state(jax.random.key(0), tiny_base(), method, optax.sgd(0.1))


class Forgetful(PromptTuning):
    """A method whose author did not think of windows."""

    def materialize(self, params, model):
        return VirtualPrompt(tokens=params["tokens"])


def test_a_method_that_ignores_the_option_is_refused():
    base, method, examples = base_of(), Forgetful(length=3, pin_prefix=True), examples_of("tokens")
    params = method.init_params(jax.random.key(0), base)
    batch = pack(examples, plan_batches(examples, lead=4, batch_size=6))
    with pytest.raises(ConfigError, match="does not pin its prompt"):
        loss_and_gradient(method, CrossEntropy(), base.model, params, batch)
