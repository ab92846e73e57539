"""DeBERTa against transformers: ranges of distances, names of heads, and gradients of virtual tokens at a mask."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, place_batch, plan_batches
from spt_jax.data.encoder import encoder_for
from spt_jax.data.templates import Template
from spt_jax.models.disentangled import row_by_distance
from spt_jax.models.disentangled_config import DisentangledConfig
from spt_jax.prompts import PromptTuning
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from spt_jax.training.step import loss_and_gradient
from tests.golden.cases import CASES, token_ids
from tests.layouts import row_logits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

P = 3
CASE = next(case for case in CASES if case.family == "deberta-v2")


@pytest.mark.parametrize(("span", "farthest"), [(8, 64), (32, 64), (33, 512), (256, 512), (256, 1000)])
def test_ranges_of_distances(span, farthest):
    from transformers.models.deberta_v2 import modeling_deberta_v2 as theirs

    config = DisentangledConfig(
        span=span, max_distance=farthest, logarithmic=True, content_to_position=True, position_to_content=True,
        shared=True, normed=True,
    )  # fmt: skip
    distances = torch.arange(-1200, 1201)
    buckets = theirs.make_log_bucket_position(distances, span, farthest).to(torch.long)
    expected = torch.clamp(buckets + span, 0, 2 * span - 1).numpy()
    np.testing.assert_array_equal(row_by_distance(config, 1200), expected)


def test_the_head_of_the_authors_files(tmp_path):
    """The files of DeBERTa-v3 name the head otherwise, and hold another head and positions that no token uses."""
    import transformers

    directory = write_tiny_checkpoint(tmp_path / "model", "deberta-v2", seed=CASE.seed)
    expected = load_base(directory, dtype="float32")
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    names = {"transform.dense": "dense", "transform.LayerNorm": "LayerNorm"}

    def renamed(name):
        for ours, theirs in names.items():
            name = name.replace(f"cls.predictions.{ours}", f"lm_predictions.lm_head.{theirs}")
        return name.replace("cls.predictions.bias", "lm_predictions.lm_head.bias")

    other = {
        "mask_predictions.dense.weight": np.zeros((4, 4), np.float32),
        "deberta.embeddings.position_embeddings.weight": np.zeros((128, 32), np.float32),
    }
    stored = {renamed(name): tensor for name, tensor in tensors.items()}
    assert not any(name.startswith("cls.") for name in stored)
    safetensors.numpy.save_file({**stored, **other}, file, metadata={"format": "pt"})
    base = load_base(directory, dtype="float32")
    assert base.fingerprint == expected.fingerprint
    model = transformers.DebertaV2ForMaskedLM.from_pretrained(directory, dtype=torch.float32, legacy=False).eval()
    ids = token_ids(CASE)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(row_logits(base, ids), theirs, atol=1e-4)

    # As the documentation converts them.
    model.save_pretrained(tmp_path / "saved")
    for name in directory.glob("token*"):
        shutil.copy(name, tmp_path / "saved")
    np.testing.assert_allclose(row_logits(load_base(tmp_path / "saved", dtype="float32"), ids), theirs, atol=1e-4)


def test_loss_and_gradient_at_a_mask(tmp_path):
    """Of virtual tokens among the embeddings, in packed rows here and one padded row for each example in torch."""
    import transformers

    directory = write_tiny_checkpoint(tmp_path / "model", "deberta-v2", seed=1)
    base = load_base(directory, dtype="float32")
    model = transformers.DebertaV2ForMaskedLM.from_pretrained(directory, dtype=torch.float32).eval()
    template = Template(
        prompt="<soft:2>{text} is<soft:1><mask>.", target="{y}", virtual_tokens=P, verbalizers={"a": " the", "b": " of"}
    )
    records = [{"text": text, "y": y} for text, y in [("the question", "a"), ("no", "b"), ("what is it then", "b")]]
    encoder = encoder_for(base, template)
    examples = [example.as_target() for example in encoder.encode_all(records)]
    method = PromptTuning(length=P)
    params = jax.tree.map(lambda a: 3 * a, method.init_params(jax.random.key(0), base))
    batch = place_batch(pack(examples, plan_batches(examples, lead=0, batch_size=len(examples))), base.mesh)
    loss, gradient, _ = loss_and_gradient(method, CrossEntropy(), base.model, params, batch)

    (rows,) = [torch.tensor(np.asarray(leaf), requires_grad=True) for leaf in jax.tree.leaves(params)]
    table = model.get_input_embeddings().weight
    longest = max(len(example.ids) for example in examples)
    losses = []
    for example, record in zip(examples, records, strict=True):
        whole = torch.cat([table, rows])[torch.tensor(np.asarray(example.ids, np.int64))]
        embeds = torch.nn.functional.pad(whole, (0, 0, 0, longest - len(whole)))[None]
        mask = (torch.arange(longest) < len(whole)).long()[None]
        labels = torch.full((1, longest), -100)
        labels[0, example.answer_at] = int(encoder.choices[list(template.verbalizers).index(record["y"])][0])
        losses.append(model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss)
    total = torch.stack(losses).mean()
    total.backward()
    np.testing.assert_allclose(float(loss), float(total), rtol=1e-5)
    (ours,) = jax.tree.leaves(gradient)
    scale = rows.grad.abs().max().item()
    assert scale > 1e-3
    np.testing.assert_allclose(np.asarray(ours), rows.grad.numpy(), atol=1e-5 * max(scale, 1.0))
    assert jnp.isfinite(ours).all()


def test_prefixes_of_peft_do_not_run(tmp_path):
    """So there is no reference for them; tests/models compares ours with a closed form."""
    import transformers

    peft = pytest.importorskip("peft")
    model = transformers.AutoModel.from_pretrained(write_tiny_checkpoint(tmp_path / "model", "deberta-v2"))
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=P)
    ids = torch.tensor([[1, 5, 6, 2]])
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        peft.get_peft_model(model, config)(input_ids=ids, attention_mask=torch.ones_like(ids))
