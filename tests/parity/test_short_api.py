"""What a prompt scores and generates is what transformers' torch model does after its rows, read back from the file."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")

import spt_jax
from spt_jax.testing import write_tiny_checkpoint
from tests.parity.test_generation import NEW, torch_ids, torch_model

pytestmark = pytest.mark.parity

TEXTS = ["a nice day", "so sad"]


def saved(directory: Path, **template) -> tuple[spt_jax.Prompt, np.ndarray]:
    """A prompt of random rows, and its rows as they are saved."""
    base = spt_jax.load_base(directory)
    method = spt_jax.PromptTuning(length=4, init=spt_jax.init.normal())
    virtual = method.materialize(method.init_params(jax.random.key(1), base), base.model)
    fields = {"prompt": "<soft>{text}\nIt is", "target": " {label}", "virtual_tokens": 4, **template}
    spt_jax.save_prompt(directory / "prompt", base, method, virtual, spt_jax.Template(**fields))
    rows = load_file(directory / "prompt" / "prompt.safetensors")["tokens"]
    return spt_jax.load_prompt(directory / "prompt", base), rows


def embedded(model, tokenizer, rows: np.ndarray, text: str, answer: str = "") -> tuple["torch.Tensor", list[int]]:
    """The embeddings of BOS, the rows, the prompt and an answer [1, T, D], and the ids of the answer."""
    table = model.get_input_embeddings().weight.detach()
    ids, target = (tokenizer.encode(part, add_special_tokens=False) for part in (f"{text}\nIt is", answer))
    parts = [table[[tokenizer.bos_token_id]], torch.tensor(rows), table[ids + target]]
    return torch.cat(parts)[None], target


def log_probability(model, tokenizer, rows: np.ndarray, text: str, answer: str, *, ends: bool) -> float:
    inputs, target = embedded(model, tokenizer, rows, text, answer)
    with torch.no_grad():
        logits = torch.log_softmax(model(inputs_embeds=inputs).logits[0], dim=-1)
    first = inputs.shape[1] - len(target) - 1
    target = [*target, *([tokenizer.eos_token_id] if ends else [])]
    return sum(float(logits[first + number, id_]) for number, id_ in enumerate(target))


def test_classes(tmp_path: Path):
    directory = write_tiny_checkpoint(tmp_path, "llama", seed=7)
    classes = {"good": "H", "bad": "LL"}
    prompt, rows = saved(directory, verbalizers=classes)
    model, tokenizer = torch_model(directory), prompt.base.tokenizer
    expected = [
        [log_probability(model, tokenizer, rows, text, f" {word}", ends=False) for word in classes.values()]
        for text in TEXTS
    ]
    found = prompt.score(TEXTS)
    np.testing.assert_allclose([list(row.values()) for row in found], expected, atol=1e-4)
    assert prompt.classify(TEXTS) == [list(classes)[int(np.argmax(row))] for row in expected]


def test_answers(tmp_path: Path):
    directory = write_tiny_checkpoint(tmp_path, "llama", seed=7)
    prompt, rows = saved(directory)
    model, tokenizer, answers = torch_model(directory), prompt.base.tokenizer, ["good", "so so"]
    expected = [
        [log_probability(model, tokenizer, rows, text, f" {answer}", ends=True) for answer in answers] for text in TEXTS
    ]
    found = prompt.score(TEXTS, answers)
    np.testing.assert_allclose([list(row.values()) for row in found], expected, atol=1e-4)
    generated = []
    for text in TEXTS:
        inputs, _ = embedded(model, tokenizer, rows, text)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long)
        ids = torch_ids(model, inputs_embeds=inputs, attention_mask=mask)
        generated.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert prompt.generate(TEXTS, max_new_tokens=NEW) == generated
