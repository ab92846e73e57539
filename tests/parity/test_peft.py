"""Prompt tuning against PEFT: the same checkpoint, prompt and batch; and what PEFT does otherwise than it should."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.inference.forward import encode_prefix, output_logits
from spt_jax.prompts import PromptTuning, VirtualPrompt
from spt_jax.prompts.initializers import array, initialize, normal, text
from spt_jax.testing import BOS_ID, PAD_ID, write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import init_state, loss_and_gradient, make_train_step
from tests.examples import VOCAB, random_examples, same_gradient
from tests.parity.versions import peft_marks

pytestmark = peft_marks

P = 6


def examples_for_peft(kind: str, count: int) -> list[Example]:
    """Examples as PEFT can have them: all virtual tokens stand before everything, BOS included."""
    moved = []
    for example in random_examples(kind, count):
        real = example.ids < VOCAB
        ids = np.concatenate([VOCAB + np.arange(P), example.ids[real]]).astype(np.int32)
        predicted = np.concatenate([np.zeros(P, bool), example.predicted[real]])
        moved.append(Example(ids, predicted, (), 0, example.index))
    return moved


def prompt_rows(width: int) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 0.3, (P, width)).astype(np.float32)


def peft_model(directory, **options):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    options = {"prompt_tuning_init": "RANDOM", "num_virtual_tokens": P, **options}
    return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", **options))


def prompt_of(model) -> torch.nn.Parameter:
    return model.prompt_encoder["default"].embedding.weight


def load_both(directory, family: str):
    """Our base, and PEFT's model holding `prompt_rows`."""
    write_tiny_checkpoint(directory, family, seed=11)
    base, model = load_base(directory, dtype="float32"), peft_model(directory)
    with torch.no_grad():
        prompt_of(model).copy_(torch.tensor(prompt_rows(base.config.width)))
    return base, model


def padded(examples, side: str) -> dict[str, torch.Tensor]:
    """The batch as PEFT takes it: virtual tokens left out, padded on one side, -100 where nothing is predicted."""
    width = max(len(example.ids) for example in examples) - P
    shape = (len(examples), width)
    ids, mask, labels = np.full(shape, PAD_ID), np.zeros(shape, int), np.full(shape, -100)
    for row, example in enumerate(examples):
        length = len(example.ids) - P
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, place] = example.ids[P:]
        mask[row, place] = 1
        labels[row, place] = np.where(example.predicted, example.ids, -100)[P:]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def peft_loss(model, examples, side: str = "right"):
    """PEFT's mean loss and its gradient for the prompt."""
    model.zero_grad()
    loss = model(**padded(examples, side)).loss
    loss.backward()
    return loss.item(), prompt_of(model).grad.numpy().copy()


@jax.jit
def _loss_and_gradient(model, params, batch):
    return loss_and_gradient(PromptTuning(length=P), CrossEntropy(), model, params, batch)


def our_loss(base, examples, *, lead: int = P, packing: bool = True):
    batch = pack(examples, plan_batches(examples, lead=lead, batch_size=len(examples), packing=packing))
    params = {"tokens": jax.numpy.asarray(prompt_rows(base.config.width))}
    loss, gradient, _ = _loss_and_gradient(base.model, params, batch)
    return float(loss), np.asarray(gradient["tokens"])


COMPARED = (
    "llama", "gpt2", "mistral", "qwen3", "gemma2", "bloom", "opt", "gemma3_text", "granite", "olmoe", "qwen3_5_text",
    "granitemoehybrid",
)  # fmt: skip
LAYOUTS = ({}, {"lead": P + 3}, {"packing": False, "lead": 0})


@pytest.mark.parametrize("family", COMPARED)
def test_loss_and_gradient_are_pefts(family, tmp_path):
    """A right-padded batch there; packed rows that share one run of the prompt here. Some examples have one target,
    others have several spans. Three kinds of attention are compared in other layouts, too."""
    base, model = load_both(tmp_path, family)
    examples = [*examples_for_peft("target", 6), *examples_for_peft("spans", 6)]
    examples = [dataclasses.replace(example, index=index) for index, example in enumerate(examples)]
    loss, gradient = peft_loss(model, examples)
    # BOS and fixed text follow the virtual tokens in every example, and may be shared with them.
    for layout in LAYOUTS if family in ("llama", "bloom", "qwen3_5_text") else LAYOUTS[:1]:
        ours, slope = our_loss(base, examples, **layout)
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
        worst = same_gradient(slope, gradient)
        print(f"{family} {layout}: loss {abs(ours / loss - 1):.1e}, gradient {worst:.1e}")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_follows_peft(family, tmp_path):
    """Ten steps of Adam over batches that change: the losses stay together, and fall."""
    base, model = load_both(tmp_path, family)
    examples = examples_for_peft("target", 12)
    plan = plan_batches(examples, lead=P, batch_size=6)
    optimizer = torch.optim.Adam([prompt_of(model)], lr=0.05)
    method = PromptTuning(length=P, init=array(prompt_rows(base.config.width)))
    state = init_state(jax.random.key(0), base, method, optax.adam(0.05))
    step = make_train_step(base, method, optax.adam(0.05))
    ours, theirs = [], []
    for i in range(10):
        chunk = examples[6 * (i % 2) : 6 * (i % 2) + 6]
        optimizer.zero_grad()
        loss = model(**padded(chunk, "right")).loss
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
        state, metrics = step(state, pack(chunk, plan))
        ours.append(float(metrics["loss"]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1] < ours[1] and ours[-2] < ours[0]
    np.testing.assert_allclose(state.params["tokens"], prompt_of(model).detach().numpy(), atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_does_not_move_the_prompt(family, tmp_path):
    """Left-padded, PEFT's prompt stands before the padding, and the loss is another. Here no layout changes it."""
    base, model = load_both(tmp_path, family)
    examples = examples_for_peft("target", 6)
    counts = [example.predicted.sum() for example in examples]
    alone = np.average([peft_loss(model, [example])[0] for example in examples], weights=counts)
    assert abs(peft_loss(model, examples, "left")[0] / alone - 1) > 1e-3
    for packing in (True, False):
        np.testing.assert_allclose(our_loss(base, examples, packing=packing)[0], alone, rtol=1e-5)


def test_logits_come_back_for_targets_alone(tmp_path):
    """PEFT's logits are P positions longer than its input, so that those of a target stand P further on. Here each
    target has its row, and the numbers are the same."""
    base, model = load_both(tmp_path, "llama")
    examples = examples_for_peft("target", 5)
    inputs = padded(examples, "right")
    with torch.no_grad():
        theirs = model(**inputs).logits.numpy()
    assert theirs.shape[1] == inputs["input_ids"].shape[1] + P
    plan = plan_batches(examples, lead=P, batch_size=5, packing=False)
    batch = pack(examples, plan)
    virtual = VirtualPrompt(tokens=jax.numpy.asarray(prompt_rows(base.config.width)))

    @jax.jit
    def logits(model, batch):
        prefix = encode_prefix(model, virtual, batch.lead_ids)
        return output_logits(model, virtual, prefix, batch.rows)

    ours, rows = np.asarray(logits(base.model, batch)), batch.rows
    assert ours.shape[1] == max(example.predicted.sum() for example in examples)
    for row, record in enumerate(rows.examples[:, 0]):
        targets = np.flatnonzero(examples[record].predicted)
        places = rows.target_outputs[row, : len(targets)]
        np.testing.assert_array_equal(rows.target_ids[row, : len(targets)], examples[record].ids[targets])
        np.testing.assert_allclose(ours[row, places], theirs[record, targets - 1], atol=1e-4)


def test_random_rows_have_the_scale_of_the_table(tmp_path):
    """PEFT draws from N(0, 1), whatever the embeddings are: here, with a deviation of 0.02, 50 times that."""
    write_tiny_checkpoint(tmp_path, "llama", hidden_size=64)
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 0.1
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    base = load_base(tmp_path, dtype="float32")
    scale = np.asarray(base.params["embedding"]).std()
    assert 0.019 < scale < 0.021
    torch.manual_seed(0)
    theirs = prompt_of(peft_model(tmp_path, num_virtual_tokens=40)).detach().numpy()
    assert 45 < theirs.std() / scale < 55
    ours = np.asarray(initialize(normal(), jax.random.key(0), base, 40))
    assert 0.95 < ours.std() / scale < 1.05


def test_text_rows_hold_no_control_tokens(tmp_path):
    """PEFT tokenizes the text with BOS in front, and tiles it with the text."""
    write_tiny_checkpoint(tmp_path, "llama")
    base = load_base(tmp_path, dtype="float32")
    table = np.asarray(base.params["embedding"])
    words = "Hello world"
    plain = base.tokenizer.encode(words, add_special_tokens=False)
    assert len(plain) < P
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": words, "tokenizer_name_or_path": str(tmp_path)}
    theirs = prompt_of(peft_model(tmp_path, **options)).detach().numpy()
    with_bos = [BOS_ID, *plain]
    np.testing.assert_array_equal(theirs, table[[with_bos[i % len(with_bos)] for i in range(P)]])
    ours = np.asarray(initialize(text(words), jax.random.key(0), base, P))
    np.testing.assert_array_equal(ours, table[[plain[i % len(plain)] for i in range(P)]])
