"""PEFT loads what is exported here and gives the same logits, and what PEFT saves gives the same logits here."""

import base64
import io
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from spt_jax.bases.base import load_base
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.examples import Example
from spt_jax.data.templates import Template
from spt_jax.inference.forward import encode_prefix, output_logits, scores_of_logits
from spt_jax.interop import export_embeddings, export_peft, export_peft_tasks, import_peft
from spt_jax.prompts import DeepPrompts, PromptTuning, VirtualPrompt
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.testing import write_tiny_checkpoint
from spt_jax.training.objectives import CrossEntropy
from tests.parity.test_heads import plain_model
from tests.parity.test_peft import P, examples_for_peft, padded
from tests.parity.test_peft_family import CASES, load_both, real_examples
from tests.parity.versions import heads_raise, older_transformers, peft_marks

pytestmark = peft_marks

TASKS = {
    "SEQ_CLS": ("LlamaForSequenceClassification", "classification", 3, None),
    "TOKEN_CLS": ("LlamaForTokenClassification", "tagging", 3, "a"),
    "QUESTION_ANS": ("LlamaForQuestionAnswering", "span", 2, "a"),
}


def peft_losses(model, examples) -> float:
    with torch.no_grad():
        return model(**padded(examples, "right")).loss.item()


@jax.jit
def logits_of(model, virtual, batch):
    prefix = encode_prefix(model, virtual, batch.lead_ids)
    return output_logits(model, virtual, prefix, batch.rows)


@jax.jit
def mean_loss(model, virtual, batch):
    total, weight = CrossEntropy().loss(scores_of_logits(logits_of(model, virtual, batch), batch.rows), batch.rows)
    return total / weight


def our_loss(base, method, virtual) -> float:
    own = real_examples(method, 6)
    batch = pack(own, plan_batches(own, lead=0, batch_size=6, packing=False))
    return float(mean_loss(base.model, virtual, batch))


@pytest.mark.parametrize("name", list(CASES))
def test_files_go_both_ways(name, tmp_path):
    """PEFT trains three steps and saves; imported here the loss is the same; exported again PEFT finds it the same."""
    import transformers

    base, model = load_both(tmp_path / "model", "llama", CASES[name][1])
    examples = examples_for_peft("target", 6)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(**padded(examples, "right")).loss.backward()
        optimizer.step()
    expected = peft_losses(model, examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs")

    method, virtual = import_peft(tmp_path / "theirs", base)
    np.testing.assert_allclose(our_loss(base, method, virtual), expected, rtol=1e-5)

    prompt = "<soft><bos>{a}" if method.token_count else "{a}"
    template = Template(prompt=prompt, target="{b}", virtual_tokens=method.token_count)
    saved = load_prompt(save_prompt(tmp_path / "ours", base, method, virtual, template), base)
    export_peft(tmp_path / "again", saved, base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "again")
    loaded.eval()
    np.testing.assert_allclose(peft_losses(loaded, examples), expected, rtol=1e-5)


def load_in_peft(directory, plain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(plain, directory).eval()


def test_tasks_go_both_ways(tmp_path):
    """A task's prompt of PEFT's has PEFT's loss here, and what goes out as tasks has it in PEFT again."""
    import transformers

    configure = lambda: peft.MultitaskPromptTuningConfig(  # noqa: E731
        task_type="CAUSAL_LM", num_virtual_tokens=P, num_tasks=2, num_ranks=3
    )
    base, model = load_both(tmp_path / "model", "llama", configure)
    model.save_pretrained(tmp_path / "theirs")
    inputs = padded(examples_for_peft("target", 6), "right")

    def losses(model):
        with torch.no_grad():
            return [model(**inputs, task_ids=torch.full((6,), task)).loss.item() for task in range(2)]

    expected, saved = losses(model), []
    template = Template(prompt="<soft><bos>{a}", target="{b}", virtual_tokens=P)
    for task in range(2):
        method, virtual = import_peft(tmp_path / "theirs", base, task=task)
        np.testing.assert_allclose(our_loss(base, method, virtual), expected[task], rtol=1e-5)
        saved.append(load_prompt(save_prompt(tmp_path / str(task), base, method, virtual, template), base))
    export_peft_tasks(tmp_path / "again", saved, base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    np.testing.assert_allclose(losses(load_in_peft(tmp_path / "again", plain)), expected, rtol=1e-5)


@older_transformers
@heads_raise
@pytest.mark.parametrize("task", list(TASKS))
def test_heads_load_in_peft(task, tmp_path):
    """A head with its prefix goes out, and PEFT's model for the task computes the same logits from it."""
    kind, head, count, reads = TASKS[task]
    base, plain = plain_model(tmp_path / "model", kind, count)
    method = DeepPrompts(length=P, head=head, classes=None if head == "span" else count, head_bias=reads is not None)
    params = method.init_params(jax.random.key(0), base)
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape), params)
    virtual = method.materialize(params, base.model)
    names = {} if head == "span" else {"verbalizers": dict(zip("abc", "ABC", strict=True))}
    template = Template(prompt="{a}", target="{b}", head=head, reads=reads, **names)
    saved = load_prompt(save_prompt(tmp_path / "ours", base, method, virtual, template), base)
    export_peft(tmp_path / "theirs", saved, base)
    loaded = load_in_peft(tmp_path / "theirs", plain)
    ids = np.asarray([1, 17, 40, 41, 42], np.int32)
    read = np.arange(5) if reads else np.asarray([4])
    example = Example(ids, np.zeros(5, bool), (), 0, 0, reads=read, classes=np.zeros(len(read), np.int32))
    batch = pack([example], plan_batches([example], lead=0, batch_size=1))
    ours = np.asarray(logits_of(base.model, virtual, batch))[0, : len(read)]
    with torch.no_grad():
        output = loaded(input_ids=torch.tensor(ids[None].astype(int)))
    if head == "span":
        theirs = np.stack([output.start_logits[0].numpy(), output.end_logits[0].numpy()], axis=-1)
    else:
        theirs = output.logits.numpy().reshape(len(read), count)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_torch_reads_the_embeddings_of_a_request(tmp_path):
    write_tiny_checkpoint(tmp_path / "model", "llama")
    base = load_base(tmp_path / "model", dtype="float32")
    rows = np.random.default_rng(0).normal(size=(P, base.config.width)).astype(np.float32)
    template = Template(prompt="<soft><bos>{a}", target="{b}", virtual_tokens=P)
    method, virtual = PromptTuning(length=P), VirtualPrompt(tokens=jnp.asarray(rows))
    saved = load_prompt(save_prompt(tmp_path / "ours", base, method, virtual, template), base)
    content = base64.b64decode(export_embeddings(saved, base, {"a": "Hello world"}))
    tensor = torch.load(io.BytesIO(content), weights_only=True)
    ids = base.tokenizer("Hello world")["input_ids"]
    expected = np.concatenate([rows, np.asarray(base.params["embedding"])[ids]])
    np.testing.assert_array_equal(tensor.numpy(), expected)
