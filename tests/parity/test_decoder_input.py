"""Virtual tokens in the decoder's input equal transformers' `decoder_inputs_embeds`."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import spt_jax
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.inference.forward import target_scores
from spt_jax.inference.generation import SamplingConfig, generate
from spt_jax.prompts.virtual import VirtualPrompt
from tests.encoder_decoders import START, logits_by_target
from tests.examples import same_gradient
from tests.parity.test_encoder_decoders import load_both

pytestmark = pytest.mark.parity

P, D = 3, 4  # virtual tokens of the encoder and of the decoder
RECORDS = [
    {"text": "the world of text", "label": "a good answer"},
    {"text": "the", "label": "bad"},
    {"text": "of and the world", "label": "good and bad"},
]
BOTH = f"<soft:{P}>{{text}}<decoder><soft:{D}>"


class Case:
    """A base, transformers' model, and a prompt on some sides."""

    def __init__(self, tmp_path, variant: str, prompt: str):
        self.base, model = load_both(tmp_path, variant)
        self.model = model.double()  # so that only the library's rounding differs
        count = sum(int(n) for n in (P, D) if f"<soft:{n}>" in prompt)
        template = spt_jax.Template(prompt=prompt, target="{label}", virtual_tokens=count)
        self.encoder = encoder_for(self.base, template)
        self.vocab_size = self.base.layout.vocab_size
        self.rows = np.random.default_rng(7).normal(0, 0.3, (count, self.base.layout.width)).astype(np.float32)

    def sides(self, ids) -> tuple[list[int], list[int]]:
        """The ids of the encoder and of the decoder, which begin with the last start token before the target."""
        start = max(place for place, id_ in enumerate(ids) if id_ == START)
        return list(ids[:start]), list(ids[start:])

    def embedded(self, ids, rows, *, decodes: bool):
        """Embeddings of a side's ids, as the side's own table has them, with rows of the prompt for virtual ids."""
        side = self.model.get_decoder() if decodes else self.model.get_encoder()
        table = side.get_input_embeddings()
        return torch.stack(
            [rows[i - self.vocab_size] if i >= self.vocab_size else table(torch.tensor(int(i))) for i in ids]
        )

    def logits(self, encoder_ids, decoder_ids, rows):
        """Those at each of the decoder's ids."""
        inputs = {
            "inputs_embeds": self.embedded(encoder_ids, rows, decodes=False)[None],
            "decoder_inputs_embeds": self.embedded(decoder_ids, rows, decodes=True)[None],
        }
        return self.model(**inputs, use_cache=False).logits[0]


@pytest.mark.parametrize("variant", ["t5", "bart", "t5gemma", "t5gemma2"])
def test_logits_loss_and_gradient_of_both_sides(variant, tmp_path):
    """Alone and packed."""
    both = Case(tmp_path, variant, BOTH)
    examples = both.encoder.encode_all(RECORDS)
    theirs_rows = torch.tensor(both.rows, dtype=torch.float64, requires_grad=True)
    total, count, logits = torch.zeros((), dtype=torch.float64), 0, []
    for example in examples:
        encoder_ids, decoder_ids = both.sides(example.ids[: example.first_target])
        assert len([i for i in decoder_ids if i >= both.vocab_size]) == D == len(decoder_ids) - 1
        target = torch.tensor(example.ids[example.predicted]).long()
        found = both.logits(encoder_ids, [*decoder_ids, *target[:-1].tolist()], theirs_rows)[-len(target) :]
        logits.append(found.detach().numpy())
        total = total + torch.nn.functional.cross_entropy(found, target, reduction="sum")
        count += len(target)
    (total / count).backward()

    @jax.jit
    def loss(model, tokens, rows):
        found = target_scores(model, VirtualPrompt(tokens=tokens), None, rows).log_probabilities[:, :, 0]
        return -(found * rows.target_weights).sum() / rows.target_weights.sum()

    for packing in (False, True):
        rows = pack(examples, plan_batches(examples, lead=0, batch_size=8, packing=packing)).rows
        ours, gradient = jax.value_and_grad(loss, argnums=1)(both.base.model, both.rows, rows)
        np.testing.assert_allclose(float(ours), total.item() / count, rtol=1e-5)
        same_gradient(gradient, theirs_rows.grad)
        assert np.abs(np.asarray(gradient)).min(axis=1).max() > 0
    found = logits_by_target(both.base, rows, VirtualPrompt(tokens=both.rows))
    for index, theirs in enumerate(logits):
        np.testing.assert_allclose(found[index, 0], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", ["t5", "umt5", "bart", "mbart", "t5gemma", "t5gemma2"])
def test_greedy_ids_of_both_sides(variant, tmp_path):
    """Prompts of different lengths in one batch, against a loop of transformers' forward passes for each alone."""
    both = Case(tmp_path, variant, BOTH)
    ids = [both.encoder.prompt_ids(record) for record in RECORDS]
    sampling = SamplingConfig(max_new_tokens=12)
    rows = torch.tensor(both.rows, dtype=torch.float64)
    for prompt, ours in zip(ids, generate(both.base, ids, VirtualPrompt(tokens=both.rows), sampling), strict=True):
        encoder_ids, decoder_ids = both.sides(prompt)
        for id_ in ours.ids:
            with torch.no_grad():
                theirs = both.logits(encoder_ids, decoder_ids, rows)[-1]
            assert id_ == int(theirs.argmax())
            decoder_ids.append(id_)
