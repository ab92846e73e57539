"""Models given to `from_flax` give what the library's own decoder gives with the same weights."""

import dataclasses
import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from flax import nnx

import spt_jax
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.models.attention import Stream
from spt_jax.models.decoder_model import DecoderModel
from spt_jax.prompts import METHODS
from spt_jax.prompts.method import TOKEN_METHODS
from spt_jax.testing import check_model, tiny_base, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
CLASSES = {"a": "yes", "b": "no thanks"}
CLASSIFY = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", verbalizers=CLASSES)
RECORDS = [
    {"text": "hello you", "label": "a"},
    {"text": "goodbye", "label": "b"},
    {"text": "what?", "label": "a"},
    {"text": "never ever again", "label": "b"},
]


@pytest.fixture(scope="module")
def native() -> spt_jax.FrozenBase:
    return tiny_base("gpt2")


@pytest.fixture(scope="module")
def examples():
    """The modules of the two examples."""
    sys.path.insert(0, str(EXAMPLES))
    yield tuple(map(importlib.import_module, ("linen_gpt", "nnx_gpt")))
    sys.path.remove(str(EXAMPLES))


def as_variables(native: spt_jax.FrozenBase) -> dict:
    """The weights of a GPT-2 by the names in the Linen example."""
    config, params = native.config, native.params
    heads, size = config.heads, config.head_size

    def attention(own: dict) -> dict:
        split = {
            name: {
                "kernel": own[name]["kernel"].reshape(-1, heads, size),
                "bias": own[name]["bias"].reshape(heads, size),
            }
            for name in ("query", "key", "value")
        }
        out = own["output"]["kernel"].reshape(heads, size, -1)
        return {**split, "out": {"kernel": out, "bias": own["output"]["bias"]}}

    blocks = {}
    for layer in range(config.layers):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        norms = {name: own[name] for name in ("attention_norm", "mlp_norm")}
        blocks[f"blocks_{layer}"] = {**attention(own["attention"]), **own["mlp"], **norms}
    tables = {"tokens": {"embedding": params["embedding"]}, "places": {"embedding": params["positions"]}}
    return {"params": {**tables, **blocks, "norm": params["final_norm"]}}


@pytest.fixture(scope="module")
def linen(native, examples) -> spt_jax.FrozenBase:
    config = native.config
    model = examples[0].GPT(config.vocab_size, config.width, config.layers, config.heads, config.max_positions)
    return examples[0].as_base(model, as_variables(native), native.tokenizer)


@pytest.fixture(scope="module")
def plain(native) -> spt_jax.FrozenBase:
    """The decoder as functions that take neither positions nor a mask."""
    return spt_jax.from_flax(native.params, **plain_functions(native), **facts(native), masked=False)


def facts(native: spt_jax.FrozenBase) -> dict:
    return {"tokenizer": native.tokenizer, "max_positions": native.layout.max_positions, "name": "mine"}


def plain_functions(native: spt_jax.FrozenBase) -> dict:
    module = native.decoder.module.clone(mesh=None)

    def hidden(params, x):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        stream = Stream(positions, jnp.ones_like(positions), jnp.zeros_like(positions))
        return DecoderModel(params, module).run(x, stream)[0]

    return {
        "embed": lambda params, ids: DecoderModel(params, module).embed(ids),
        "hidden": hidden,
        "logits": lambda params, states: DecoderModel(params, module).logits(states),
    }


@pytest.fixture(params=["linen", "plain"])
def foreign(request) -> spt_jax.FrozenBase:
    return request.getfixturevalue(request.param)


def test_padded_packed_and_alone_are_the_same(foreign):
    check_model(foreign.model)


@pytest.mark.parametrize("template", [CLASSIFY, dataclasses.replace(CLASSIFY, verbalizers={})])
def test_a_step_has_the_loss_and_gradient_of_the_decoder(native, foreign, template):
    def step(base):
        method = spt_jax.PromptTuning(length=3)
        placed = dataclasses.replace(template, virtual_tokens=3)
        encoder = spt_jax.Encoder(placed, base.tokenizer, base.layout.vocab_size, base.layout.max_positions)
        examples = encoder.encode_all(RECORDS)
        plan = spt_jax.plan_batches(examples, lead=encoder.head_length(examples), batch_size=4)
        batch = spt_jax.place_batch(spt_jax.pack(examples, plan), base.mesh)
        assert plan.examples > 1
        objective = (
            spt_jax.VerbalizerCrossEntropy(choices=plan.choices) if template.verbalizers else spt_jax.CrossEntropy()
        )
        params = {"tokens": jax.random.normal(jax.random.key(0), (3, base.layout.width))}
        compiled = jax.jit(lambda model, params: spt_jax.loss_and_gradient(method, objective, model, params, batch))
        loss, gradient, weight = compiled(base.model, params)
        return loss, gradient["tokens"], weight

    for ours, theirs in zip(step(foreign), step(native), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_prompts_are_trained_saved_and_used_as_on_the_decoder(native, foreign, tmp_path):
    options = {"steps": 4, "batch_size": 4, "optimizer": optax.adam(0.1), "evaluate_every": 2, "progress": False}
    method = spt_jax.PromptTuning(length=4)
    ours, theirs = (
        spt_jax.fit(base, method, CLASSIFY, RECORDS, validation=RECORDS, **options) for base in (foreign, native)
    )
    np.testing.assert_allclose(ours.prompt.virtual.tokens, theirs.prompt.virtual.tokens, atol=1e-4)
    assert ours.validation["loss"] == pytest.approx(theirs.validation["loss"], rel=1e-4)
    ours.prompt.save(tmp_path / "prompt")
    loaded = spt_jax.load_prompt(tmp_path / "prompt", foreign, progress=False)
    texts = ["one", "another text"]
    assert loaded.classify(texts) == theirs.prompt.classify(texts)
    for own, other in zip(loaded.score(texts), theirs.prompt.score(texts), strict=True):
        assert own == pytest.approx(other, rel=1e-4)
    with pytest.raises(CheckpointError, match="a model given to from_flax"):
        spt_jax.load_prompt(tmp_path / "prompt", progress=False)
    with pytest.raises(CheckpointError, match="family is 'flax' here, 'gpt2' there"):
        spt_jax.load_prompt(tmp_path / "prompt", native, progress=False)


def test_a_prompt_is_refused_on_other_weights(native, plain, tmp_path):
    virtual = spt_jax.VirtualPrompt(tokens=jnp.zeros((2, plain.layout.width)))
    template = dataclasses.replace(CLASSIFY, virtual_tokens=2)
    spt_jax.save_prompt(tmp_path / "prompt", plain, spt_jax.PromptTuning(length=2), virtual, template)
    changed = jax.tree.map(lambda leaf: leaf, native.params)
    changed["final_norm"] = {**changed["final_norm"], "bias": changed["final_norm"]["bias"] + 1e-3}
    other = spt_jax.from_flax(changed, **plain_functions(native), **facts(native), masked=False)
    with pytest.raises(CheckpointError, match="weights is"):
        spt_jax.load_prompt(tmp_path / "prompt", other, progress=False)
    longer = {**facts(native), "max_positions": 99}
    shorter = spt_jax.from_flax(native.params, **plain_functions(native), **longer, masked=False)
    with pytest.raises(CheckpointError, match="max_positions is 128 here, 99 there"):
        spt_jax.load_prompt(tmp_path / "prompt", shorter, progress=False)


def test_greedy_text_is_that_of_the_decoder(native, foreign):
    """Prompts of different lengths with a shared beginning, virtual tokens and two sampled continuations."""
    first = native.layout.vocab_size
    prompts = [np.asarray([1, first, first + 1, *ids]) for ids in ([5, 6, 7, 20], [9], [30, 31])]
    virtual = spt_jax.VirtualPrompt(tokens=0.3 * jax.random.normal(jax.random.key(1), (2, native.layout.width)))
    greedy = spt_jax.SamplingConfig(max_new_tokens=9)
    samplings = [greedy, greedy, dataclasses.replace(greedy, temperature=1.0, top_k=5, seed=3)]
    ours, theirs = (spt_jax.generate(base, prompts, virtual, samplings) for base in (foreign, native))
    assert [own.ids for own in ours] == [other.ids for other in theirs]
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own.log_probabilities, other.log_probabilities, atol=1e-3)


def test_several_prompts_share_a_batch(native, foreign):
    prompts = [
        spt_jax.VirtualPrompt(tokens=0.3 * jax.random.normal(jax.random.key(number), (2, native.layout.width)))
        for number in (0, 1)
    ]
    first = native.layout.vocab_size
    ids = [np.asarray([1, first, first + 1, 7, number]) for number in (5, 6, 8)]
    sampling = spt_jax.SamplingConfig(max_new_tokens=5)
    stacked = spt_jax.stack_prompts(prompts)
    together = spt_jax.generate(foreign, ids, stacked, sampling, prompt_index=[0, 1, 1])
    apart = [spt_jax.generate(native, [ids[i]], prompts[own], sampling)[0] for i, own in enumerate((0, 1, 1))]
    assert [one.ids for one in together] == [one.ids for one in apart]


def test_nnx_and_linen_with_the_same_weights_agree(native, linen, examples):
    config, (_, nnx_gpt) = native.config, examples
    own = as_variables(native)["params"]
    own |= {"blocks": {number: own.pop(f"blocks_{number}") for number in range(config.layers)}}
    shape = config.vocab_size, config.width, config.layers, config.heads
    graphdef, params = nnx.split(nnx_gpt.GPT(*shape, rngs=nnx.Rngs(0), max_positions=config.max_positions))
    flat, expected = dict(nnx.to_flat_state(params)), dict(nnx.to_flat_state(nnx.State(own)))
    assert flat.keys() == expected.keys()
    nnx.replace_by_pure_dict(params, own)
    base = nnx_gpt.as_base(graphdef, params, native.tokenizer)
    check_model(base.model)
    ids = jnp.arange(20)[None]
    stream = Stream(ids, jnp.ones_like(ids), jnp.zeros_like(ids))
    ours, theirs = (one.model.logits(one.model.run(one.model.embed(ids), stream)[0]) for one in (base, linen))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert base.fingerprint.differences(linen.fingerprint)


def test_the_embedding_table_and_the_sizes_are_those_of_the_decoder(native, linen):
    np.testing.assert_array_equal(linen.model.embedding_table(), native.model.embedding_table())
    assert linen.layout.only_tokens and not native.layout.only_tokens
    assert linen.parameter_count == native.parameter_count
    assert linen.end_ids == (2,)


# What each method needs beside a length of 2.
OPTIONS = {
    "state_tuning": {},
    "prefix_tuning_plus": {},
    "reft": {},
    "trained_tokens": {"tokens": ("a", "e")},
    "low_rank_prompt_tuning": {"length": 2, "rank": 1},
    "decomposed_prompt_tuning": {"length": 2, "rank": 1},
    "cpt": {"context": "Is it[[ yes]]?\n"},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_or_is_refused(plain, name):
    method = METHODS[name](**OPTIONS.get(name, {"length": 2}))
    soft = "" if method.token_count == 0 else "<soft>"
    template = dataclasses.replace(CLASSIFY, prompt=soft + "{text}\n")
    records = RECORDS
    if name == "multitask_prompt_tuning":
        template = dataclasses.replace(template, task="task")
        records = [{**record, "task": str(number % 2)} for number, record in enumerate(RECORDS)]
    if name not in TOKEN_METHODS:
        with pytest.raises(ConfigError, match=f"{name} gives keys.*methods that work: prompt_tuning, p_tuning"):
            spt_jax.fit(plain, method, template, records, steps=1, batch_size=4, progress=False)
        return
    result = spt_jax.fit(plain, method, template, records, steps=2, batch_size=4, progress=False)
    assert np.isfinite(result.history[-1]["loss"]) and result.history[-1]["gradient_norm"] > 0


def test_the_weights_are_arguments_of_the_program(plain):
    ids = jnp.zeros((1, 4), jnp.int32)
    stream = Stream(ids, ids + 1, ids)
    traced = jax.make_jaxpr(lambda model: model.run(model.embed(ids), stream)[0])(plain.model)
    assert max((np.size(const) for const in traced.consts), default=0) < 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": {}}, "no arrays"),
        ({"params": {"a": "text"}}, r"params\['a'\] is a str"),
        (
            {"embed": lambda params, ids: params["embedding"]},
            r"embed returns the shape \(320, 32\)|must be \[B, T, D\]",
        ),
        ({"embed": lambda params, ids: ids}, "embed must return one array of floating-point numbers"),
        ({"embed": lambda params, ids: params["wte"][ids]}, "embed.* fails: KeyError: 'wte'"),
        ({"hidden": lambda params, x: x[..., :3]}, r"hidden returns the shape \(2, 5, 3\) for embeddings \(2, 5, 32\)"),
        ({"logits": lambda params, h: (h, h)}, "logits must return one array"),
        ({"masked": True}, "hidden.* fails: TypeError"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"name": ""}, "give the model a name"),
        ({"end_ids": [320]}, "end_ids has 320"),
        ({"end_ids": []}, "end_ids is empty"),
        ({"logits": lambda params, h: h}, "ids up to 319, but logits have 32 entries"),
        ({"tokenizer": "gpt2"}, "tokenizer is a str"),
        ({"tokenizer": tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))}, "no EOS token: give end_ids"),
    ],
)
def test_what_is_wrong_is_named(native, change, message):
    arguments = {"params": native.params, **plain_functions(native), **facts(native), "masked": False, **change}
    with pytest.raises(ConfigError, match=message):
        spt_jax.from_flax(arguments.pop("params"), **arguments)


def test_values_that_are_not_finite_are_named(native):
    broken = {**native.params, "positions": native.params["positions"].at[3, 2].set(jnp.nan)}
    with pytest.raises(ConfigError, match=r"params\['positions'\] has values that are not finite"):
        spt_jax.from_flax(broken, **plain_functions(native), **facts(native), masked=False)


def test_captured_parameters_are_refused(native):
    functions = {**plain_functions(native), "embed": lambda params, ids: native.params["embedding"][ids]}
    with pytest.raises(ConfigError, match=r"embed captures an array \(320, 32\)"):
        spt_jax.from_flax(native.params, **functions, **facts(native), masked=False)


def test_what_needs_a_decoder_says_so(plain):
    with pytest.raises(ConfigError, match="mine is a model given to from_flax"):
        _ = plain.config
    assert plain.remat == "none"
    with pytest.raises(ConfigError, match=r"mesh\.tensor is 2"):
        spt_jax.from_flax(
            plain.params,
            **dataclasses.asdict(plain.model.functions),
            **facts(plain),
            mesh=spt_jax.make_mesh(spt_jax.MeshConfig(tensor=2)),
        )


def test_rows_may_be_split_over_devices(native, linen, examples):
    """The parameters are replicated, the rows are split."""
    mesh = spt_jax.make_mesh(spt_jax.MeshConfig(data=2))
    params = jax.tree.map(np.asarray, linen.params)
    base = spt_jax.from_flax(
        params, **dataclasses.asdict(linen.model.functions), **facts(native) | {"name": "linen-gpt"}, mesh=mesh
    )
    assert base.mesh.size == 2 and base.fingerprint == linen.fingerprint
    options = {"steps": 2, "batch_size": 4, "learning_rate": 0.1, "progress": False}
    ours, theirs = (
        spt_jax.fit(one, spt_jax.PromptTuning(length=4), CLASSIFY, RECORDS, **options) for one in (base, linen)
    )
    np.testing.assert_allclose(ours.prompt.virtual.tokens, theirs.prompt.virtual.tokens, atol=1e-4)
    with pytest.raises(ConfigError, match="is not on the 2 devices of the mesh"):
        spt_jax.from_flax(native.params, **plain_functions(native), **facts(native), masked=False, mesh=mesh)


def test_a_tokenizer_of_the_tokenizers_package(native):
    own = tiny_tokenizer().backend_tokenizer
    base = spt_jax.from_flax(
        native.params, **plain_functions(native), **facts(native) | {"tokenizer": own}, masked=False, end_ids=[2]
    )
    assert base.tokenizer.eos_token == "<eos>" and base.end_ids == (2,)
    assert base.tokenizer.encode("hello") == tiny_tokenizer().encode("hello")


def test_a_population_trains_as_on_the_decoder(native, foreign, tmp_path):
    """Its members' leading tokens are run in one vectorized call."""

    def losses(base):
        method = spt_jax.PromptTuning(length=3)
        template = dataclasses.replace(CLASSIFY, virtual_tokens=3)
        encoder = spt_jax.Encoder(template, base.tokenizer, base.layout.vocab_size, base.layout.max_positions)
        examples = encoder.encode_all(RECORDS)
        plan = spt_jax.plan_batches(examples, lead=encoder.head_length(examples), batch_size=4)
        members = [spt_jax.Member(method, examples, plan, seed, 0.1) for seed in (0, 1)]
        data = spt_jax.make_evaluation_set(base, encoder, RECORDS)
        found = spt_jax.fit_population(
            base,
            members,
            spt_jax.resolve_optimizer(spt_jax.OptimizerConfig(), "llama"),
            spt_jax.VerbalizerCrossEntropy(choices=plan.choices),
            spt_jax.TrainConfig(steps=3, batch_size=4, evaluate_every=3),
            workdir=tmp_path / base.name,
            validate=lambda number, params: (
                spt_jax.evaluate(base, data, method.materialize(jax.tree.map(jnp.asarray, params), base.model)).metrics
            ),
        )
        return [standing.best.metrics["loss"] for standing in found]

    np.testing.assert_allclose(losses(foreign), losses(native), rtol=1e-4)
