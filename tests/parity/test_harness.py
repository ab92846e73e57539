"""A multiple-choice and a generative task have the numbers of transformers' model with the same `inputs_embeds`."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import spt_jax
from spt_jax.evaluation.continuations import score_continuations
from spt_jax.interop.lm_eval import PromptModel
from spt_jax.testing import EOS_ID, write_tiny_checkpoint
from tests.parity.test_generation import torch_model

pytestmark = pytest.mark.parity

WORDS = ("the", "a", "was", "is", "good", "nice", "great", "bad", "poor", "sad", "so", "day", "question", "and")
CHOICES = (" good", " so sad", " the day is fine")
NEW = 12


class Request(NamedTuple):
    args: tuple


class Torch:
    """The same base and rows in torch, one text at a time."""

    def __init__(self, directory: Path, rows: np.ndarray, tokenizer):
        self.model, self.rows, self.tokenizer = torch_model(directory), torch.tensor(np.asarray(rows)), tokenizer

    def embedded(self, ids: list[int]):
        table = self.model.get_input_embeddings().weight.detach()
        return torch.cat([self.rows, table[ids]])[None]

    def score(self, context: list[int], own: list[int]) -> tuple[float, bool]:
        with torch.no_grad():
            logits = torch.log_softmax(self.model(inputs_embeds=self.embedded(context + own)).logits[0], dim=-1)
        places = range(len(self.rows) + len(context) - 1, len(self.rows) + len(context) + len(own) - 1)
        return sum(float(logits[at, id_]) for at, id_ in zip(places, own, strict=True)), all(
            int(logits[at].argmax()) == id_ for at, id_ in zip(places, own, strict=True)
        )

    def generate(self, context: list[int]) -> list[int]:
        inputs = self.embedded(context)
        mask = torch.ones(inputs.shape[:2], dtype=torch.long)
        options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": EOS_ID}
        with torch.no_grad():
            return self.model.generate(inputs_embeds=inputs, attention_mask=mask, **options)[0].tolist()


def test_tasks_have_the_numbers_of_transformers(tmp_path: Path):
    directory = write_tiny_checkpoint(tmp_path, "llama", seed=7)
    base = spt_jax.load_base(directory, dtype="float32")
    method = spt_jax.PromptTuning(length=4, init=spt_jax.init.normal())
    virtual = method.materialize(method.init_params(jax.random.key(1), base), base.model)
    template = spt_jax.Template(prompt="<soft><bos>{text}", target="{a}", virtual_tokens=4)
    ours = PromptModel(base, template, virtual, batch_size=7)
    theirs = Torch(directory, virtual.tokens, base.tokenizer)

    random = np.random.default_rng(0)
    texts = [f"Question: {' '.join(random.choice(WORDS, random.integers(3, 9)))}\nAnswer:" for _ in range(8)]
    contexts = [base.tokenizer(text)["input_ids"] for text in texts]
    pairs = [(text, choice) for text in texts for choice in CHOICES]
    ids = [theirs.generate(context) for context in contexts]
    texts_of = [base.tokenizer.decode(own, skip_special_tokens=True).split("sad")[0] for own in ids]
    greedy = ours.generate_until([Request((text, {"until": ["sad"], "max_gen_toks": NEW})) for text in texts])
    assert greedy == texts_of and any(greedy)

    found = ours.loglikelihood([Request(pair) for pair in pairs])
    expected = []
    for text, answer in pairs:
        front, both = (base.tokenizer(part)["input_ids"] for part in (text, text + answer))
        expected.append(theirs.score(front, both[len(front) :]))
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=1e-4)
    assert [own for _, own in found] == [own for _, own in expected]
    front = [base.config.vocab_size + row for row in range(4)]
    generated = [([*front, *context], own) for context, own in zip(contexts, ids, strict=True)]
    again = score_continuations(base, generated, virtual, batch_size=5)
    assert all(own.is_greedy for own in again)
    values = [theirs.score(context, own)[0] for context, own in zip(contexts, ids, strict=True)]
    np.testing.assert_allclose([own.log_probability for own in again], values, atol=1e-4)

    whole = [theirs.score([base.tokenizer.bos_token_id], base.tokenizer(text)["input_ids"][1:])[0] for text in texts]
    np.testing.assert_allclose(ours.loglikelihood_rolling([Request((text,)) for text in texts]), whole, atol=1e-3)
