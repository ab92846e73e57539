"""Logits and gradients of every family equal transformers', whose torch models read the very same checkpoint."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base, read_config
from spt_jax.bases.families import FAMILIES
from spt_jax.models.attention import Cache, Prefix
from spt_jax.models.memory import KeysValues, empty_cache, put, to_cache
from spt_jax.testing import write_tiny_checkpoint
from tests.golden.cases import CASES, LENGTH, precise, token_ids
from tests.layouts import Run, every_layout, forward, lay_out, row_logits

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
# Of which our checkpoints have no tensors.
OTHER_PARTS = r"(^|\.)(vision_tower|multi_modal_projector|visual|vision_embedder|embed_vision|embed_audio)\."
BY_NAME = {case.name: case for case in CASES}
# A family of each kind of layer. The logits of all families equal transformers' in every layout, and check_model
# compares their padded rows, caches and gradients with those logits.
REPRESENTATIVES = (
    "bloom", "cohere2", "deepseek_v3", "falcon", "falcon_h1", "gemma2", "gemma4_text", "gemma4_text E2B", "gpt2",
    "gpt_oss", "granite", "granitemoehybrid", "llama", "mistral", "olmo3", "phi", "qwen3", "qwen3_5_text", "qwen3_moe",
    "smollm3",
)  # fmt: skip


def torch_model(directory, attention="eager"):
    import transformers

    architecture = getattr(transformers, FAMILIES[read_config(directory).family].architecture)
    model, loading = architecture.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    # Old checkpoints hold the value of masked scores, which transformers names as unexpected, too.
    unexpected = [name for name in loading["unexpected_keys"] if not name.endswith(".masked_bias")]
    assert not unexpected and not loading["mismatched_keys"]
    assert all(re.search(OTHER_PARTS, name) for name in loading["missing_keys"])
    return precise(model.eval())


def torch_logits(model, ids: np.ndarray, **inputs) -> np.ndarray:
    """Logits [T, V] for one row of ids."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False, **inputs).logits[0].numpy()


def load_both(tmp_path, case):
    directory = write_tiny_checkpoint(tmp_path / "model", case.family, seed=case.seed, **case.overrides)
    return load_base(directory, dtype="float32", max_length=case.max_length), torch_model(directory, case.attention)


def same(ours, theirs, tolerance=TOLERANCE):
    """Equal within the tolerance, for logits whose spread is far above it."""
    assert np.std(theirs) > 0.3
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_in_every_layout(case, tmp_path):
    """Full length, padded on either side, packed, and children of a shared context, each against the example alone."""
    base, model = load_both(tmp_path, case)
    rows = every_layout(token_ids(case))
    ids, stream = lay_out([run for runs in rows.values() for run in runs], LENGTH)
    ours = np.asarray(forward(base, ids, stream)[0])
    worst = 0.0
    for layout, runs in rows.items():
        if case.depends_on_length and layout != "full":
            continue
        if layout == "children" and not base.layout.causal:  # A child sees its context, which does not see it.
            continue
        for run in runs:
            theirs = torch_logits(model, run.example)[len(run.context) :]
            worst = max(worst, float(np.abs(ours[run.slice] - theirs).max()))
            same(ours[run.slice], theirs)
    print(f"{case.name}: largest error {worst:.1e}")


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_padding_as_transformers_itself_pads(family, tmp_path):
    """The same rows, padded on the left and on the right, masks and positions on both sides."""
    case = BY_NAME[family]
    base, model = load_both(tmp_path, case)
    example = token_ids(case)[:31]
    runs = [Run(0, 9, example), Run(1, 0, example)]
    ids, stream = lay_out(runs, 40)
    mask, positions = (torch.tensor(np.asarray(x), dtype=torch.int64) for x in (stream.segments, stream.positions))
    ours = forward(base, ids, stream)[0]
    for run in runs:
        row = slice(run.row, run.row + 1)
        theirs = torch_logits(model, ids[run.row], attention_mask=mask[row], position_ids=positions[row])
        same(ours[run.slice], theirs[run.slice[1]])


@pytest.mark.parametrize("length", [20, 48, 70])
def test_dynamic_rope_follows_the_length_of_the_run(length, tmp_path):
    """Below the original length nothing changes; beyond it transformers recomputes its frequencies for this length."""
    case = BY_NAME["llama dynamic beyond"]
    directory = write_tiny_checkpoint(tmp_path, case.family, **case.overrides)
    base = load_base(directory, dtype="float32", max_length=length)
    ids = token_ids(case)[:length]
    same(row_logits(base, ids), torch_logits(torch_model(directory), ids))


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "gemma4", "gemma4 E2B"])
def test_the_text_part_of_what_transformers_saves(family, tmp_path):
    """With its vision model, if the tiny one has any, and the names that transformers gives its tensors."""
    case = BY_NAME[family]
    base, model = load_both(tmp_path, case)
    model.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "model").glob("token*"):
        shutil.copy(file, tmp_path / "again")
    again = load_base(tmp_path / "again", dtype="float32")
    assert again.fingerprint == base.fingerprint
    ids = token_ids(case)
    same(row_logits(again, ids), torch_logits(model, ids))


def test_gpt2_keys_without_transformer_in_front(tmp_path):
    """As in the checkpoints on the hub, with the causal masks that old versions stored as buffers."""
    directory = write_tiny_checkpoint(tmp_path, "gpt2", seed=3)
    named = load_base(directory, dtype="float32")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    bare = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    for i in range(3):
        bare[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 128, 128), np.float32))
        bare[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    safetensors.numpy.save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})
    base = load_base(directory, dtype="float32")
    assert base.fingerprint == named.fingerprint
    ids = token_ids(BY_NAME["gpt2"])
    same(row_logits(base, ids), torch_logits(torch_model(directory), ids))


def test_old_config_files(tmp_path):
    """`rope_scaling` beside `rope_theta`, as hub checkpoints from before transformers 5 have it."""
    import json

    directory = write_tiny_checkpoint(tmp_path, "llama", head_dim=16)
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (directory / "config.json").write_text(json.dumps(config))
    ids = token_ids(BY_NAME["llama"])
    same(row_logits(load_base(directory, dtype="float32"), ids), torch_logits(torch_model(directory), ids))


@pytest.mark.parametrize("name", ["llama yarn", "opt maps, sums", *REPRESENTATIVES])
def test_gradient_through_a_shared_prefix(name, tmp_path):
    """Embeddings of 11 tokens run once, as a prefix of three rows; the gradient equals torch's, which repeats them.

    A merge of separately normalised attentions by their log-sum-exp passes on the logits and fails here. In the layers'
    own embeddings, the 11 tokens are virtual: they take the row of padding, as images do in transformers.
    """
    case = BY_NAME[name]
    base, model = load_both(tmp_path, case)
    ids = token_ids(case)
    lead, rows = 11, np.stack([ids[20:36], ids[40:56], ids[60:76]])
    start = np.asarray(base.model.embed(jnp.asarray(ids[:lead])))
    ids_, stream = lay_out([Run(i, 0, row, ids[:lead]) for i, row in enumerate(rows)], 16)
    stream = dataclasses.replace(stream, ids=jnp.asarray(ids_))
    lead_stream = lay_out([Run(0, 0, ids[:lead])], lead)[1]
    virtual = base.layout.vocab_size + jnp.arange(lead, dtype=jnp.int32)
    lead_stream = dataclasses.replace(lead_stream, ids=virtual[None])

    def loss(start):
        _, memory = base.model.run(start[None], lead_stream, return_memory=True)
        prefix = Prefix(jax.tree.map(lambda a: a[:, 0], memory), jnp.arange(lead))
        embedded = base.model.embed(jnp.asarray(ids_))
        hidden, _ = base.model.run(embedded, stream, prefix)
        scores = jax.nn.log_softmax(base.model.logits(hidden)[:, :-1])
        return -jnp.take_along_axis(scores, jnp.asarray(rows)[:, 1:, None], axis=-1).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(start))

    theirs = torch.tensor(start, requires_grad=True)
    # Not those of torch's embedding module: Falcon-H1 scales them after it.
    embedded = torch.tensor(np.asarray(base.model.embed(jnp.asarray(rows))))
    inputs = torch.cat([theirs[None].expand(3, -1, -1), embedded], dim=1)
    options = {}
    if base.config.per_layer is not None:
        padding = np.full((3, lead), model.config.pad_token_id)
        with_padding = torch.tensor(np.concatenate([padding, rows], axis=1).astype(np.int64))
        options["per_layer_inputs"] = model.model.get_per_layer_inputs(with_padding)
    scores = model(inputs_embeds=inputs, use_cache=False, **options).logits[:, lead:-1].log_softmax(-1)
    expected = -scores.gather(-1, torch.tensor(rows.astype(np.int64))[:, 1:, None]).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    scale = theirs.grad.abs().max().item()
    assert scale > 1e-2
    np.testing.assert_allclose(np.asarray(gradient) / scale, theirs.grad.numpy() / scale, atol=1e-5)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_decoding_from_a_cache(name, tmp_path):
    """Tokens fed one by one into a static cache with empty slots give the logits of the whole run."""
    case = BY_NAME[name]
    base, model = load_both(tmp_path, case)
    ids = token_ids(case)[:24]
    slots = 32
    empty = {
        name: jax.tree.map(lambda a: jnp.full_like(a, 1e3), own) if isinstance(own, KeysValues) else own
        for name, own in empty_cache(base.layout, 1, slots, jnp.float32).items()
    }
    cache = Cache(empty, *(jnp.zeros((1, slots), jnp.int32) for _ in range(2)))
    steps = []
    for i, token in enumerate(ids):
        row, stream = lay_out([Run(0, 0, np.asarray([token]), ids[:i])], 1)
        scores, new = forward(base, row, stream, None, cache)
        steps.append(np.asarray(scores[0, 0]))
        cache = Cache(
            put(cache.memory, to_cache(new), jnp.int32(i)),
            cache.positions.at[:, i].set(i),
            cache.segments.at[:, i].set(1),
        )
    same(np.stack(steps), torch_logits(model, ids))
