"""Other libraries' files: hand-made ones come in, ours go out and come back, and nothing in them is trusted."""

import base64
import io
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from transformers import AutoTokenizer

from spt_jax.__main__ import main
from spt_jax.data.encoder import Encoder
from spt_jax.data.templates import Template
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.interop import (
    export_embeddings,
    export_npy,
    export_peft,
    export_peft_tasks,
    import_npy,
    import_peft,
    peft_note,
)
from spt_jax.interop.arrays import torch_file
from spt_jax.interop.peft import default_template
from spt_jax.models.memory import KeysValues
from spt_jax.prompts import METHODS, DeepPrompts, LlamaAdapter, PrefixTuning, PromptTuning, VirtualPrompt, initializers
from spt_jax.prompts.initializers import initialize
from spt_jax.prompts.storage import load_prompt, save_prompt
from spt_jax.prompts.virtual import VirtualPrefix
from spt_jax.testing import tiny_base, tiny_tokenizer, write_tiny_checkpoint
from tests.golden.cases import E2B

P, D, L, K, H = 4, 32, 3, 2, 8


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def peft_directory(folder, tensors=None, **changes):
    """As PEFT writes a prompt-tuning prompt."""
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": P, "token_dim": D}
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"prompt_embeddings": noise(P, D)} if tensors is None else tensors
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "CPT"])
def test_token_rows_come_in(tmp_path, base, kind):
    method, virtual = import_peft(peft_directory(tmp_path / "peft", peft_type=kind), base)
    assert method == PromptTuning(length=P)
    np.testing.assert_array_equal(virtual.tokens, noise(P, D))


def test_keys_stand_at_even_places_and_values_at_odd_ones(tmp_path, base):
    flat = np.arange(P * L * 2 * K * H, dtype=np.float32).reshape(P, -1)
    folder = peft_directory(tmp_path / "peft", {"prompt_embeddings": flat}, peft_type="PREFIX_TUNING")
    method, virtual = import_peft(folder, base)
    assert method == PrefixTuning(length=P)
    places = flat.reshape(P, 2 * L, K, H)
    for layer in range(L):
        own = virtual.prefix.memory["self"]
        np.testing.assert_array_equal(own.keys[layer], places[:, 2 * layer])
        np.testing.assert_array_equal(own.values[layer], places[:, 2 * layer + 1])


def prompts(base):
    adapter = LlamaAdapter(length=P, layers=2)
    params = {"rows": jnp.asarray(noise(2, P, D)), "gates": jnp.asarray([0.5, -0.25])}
    return {
        "prompt_tuning": (PromptTuning(length=P), VirtualPrompt(tokens=jnp.asarray(noise(P, D)))),
        "prefix_tuning": (
            PrefixTuning(length=P),
            VirtualPrompt(prefix=VirtualPrefix({"self": KeysValues(noise(L, P, K, H), noise(L, P, K, H) + 1)})),
        ),
        "llama_adapter": (adapter, adapter.materialize(params, base.model)),
    }


def saved_prompt(folder, base, name, prompt="<soft><bos>{text}\n"):
    method, virtual = prompts(base)[name]
    prompt = prompt if method.token_count else prompt.replace("<soft>", "")
    template = Template(prompt=prompt, target="{label}", virtual_tokens=method.token_count)
    return load_prompt(save_prompt(folder, base, method, virtual, template), base)


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning", "llama_adapter"])
def test_what_goes_out_to_peft_comes_back(tmp_path, base, name):
    saved = saved_prompt(tmp_path / "ours", base, name)
    export_peft(tmp_path / "peft", saved, base)
    assert peft_note(base, saved.method, saved.template) == "this prompt can be exported to PEFT"
    method, virtual = import_peft(tmp_path / "peft", base)
    assert method.name == name
    assert jax.tree.structure(virtual) == jax.tree.structure(saved.virtual)
    jax.tree.map(lambda theirs, ours: np.testing.assert_allclose(theirs, ours, rtol=1e-6), virtual, saved.virtual)


@pytest.mark.parametrize("prompt", ["{text}<soft>", "<bos><soft>{text}", "<soft>{text}", "<soft:2>{text}<soft:2>"])
def test_an_order_that_peft_does_not_have_is_refused(tmp_path, base, prompt):
    saved = saved_prompt(tmp_path / "ours", base, "prompt_tuning", prompt)
    with pytest.raises(ConfigError, match="train with a prompt that begins with '<soft><bos>'") as error:
        export_peft(tmp_path / "peft", saved, base)
    assert not (tmp_path / "peft").exists()
    note = peft_note(base, saved.method, saved.template)
    assert note == f"note: this prompt cannot be exported to PEFT: {error.value}"


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"state_tuning"}))  # which needs recurrent layers
def test_what_is_said_before_training_is_what_export_does(tmp_path, base, name):
    classes = {"a": "A", "b": "B"}
    method = METHODS[name](**{"tasks": ("x", "y")} if name == "multitask_prompt_tuning" else {})
    if name == "deep_prompts":
        method = DeepPrompts(classes=2)
    prompt = "<soft><bos>{text}\n" if method.token_count else "{text}\n"
    head = getattr(method, "head", None) or "language_model"
    count = method.token_count
    template = Template(prompt=prompt, target="{label}", virtual_tokens=count, verbalizers=classes, head=head)
    note = peft_note(base, method, template)
    exported = {"prompt_tuning", "prefix_tuning", "p_tuning", "residual_prompt_tuning", "low_rank_prompt_tuning", "cpt"}
    exported |= {"llama_adapter", "multitask_prompt_tuning", "progressive_prompts"}
    assert (note == "this prompt can be exported to PEFT") == (name in exported), note
    if name in ("decomposed_prompt_tuning", "deep_prompts"):
        params = jax.tree.map(lambda leaf: leaf + 0.1, method.init_params(jax.random.key(0), base))
        saved = save_prompt(tmp_path / "ours", base, method, method.materialize(params, base.model), template)
        with pytest.raises(ConfigError) as error:
            export_peft(tmp_path / "peft", load_prompt(saved, base), base)
        assert note.endswith(str(error.value))


WORDS = ("Who wrote Hamlet?", "two  spaces", "H", "\nline")


def real_ids(prompt: str, text: str, tokenizer) -> list[int]:
    template = Template(prompt=prompt, target="{target}", virtual_tokens=2 if "<soft>" in prompt else 0)
    ids = Encoder(template, tokenizer, 100_000, 512).prompt_ids({"text": text})
    return [id_ for id_ in ids.tolist() if id_ < 100_000]


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_an_imported_prompt_reads_the_ids_of_the_tokenizer(kind, add_bos):
    base = tiny_base(tokenizer=kind, add_bos=add_bos)
    prompt = default_template(base, PromptTuning(length=2))
    for text in WORDS:
        assert real_ids(prompt, text, base.tokenizer) == base.tokenizer(text)["input_ids"]


def test_real_tokenizers_agree(shared):
    for folder in ("tokenizers/llama2", "stories260K"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "models" / folder)
        for text in WORDS:
            assert real_ids("<soft><bos>{text}", text, tokenizer) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("prompt", ["<bos><soft>{text}", "<soft>{text}"])
def test_text_after_virtual_tokens_continues(prompt):
    """Only a BOS after the virtual tokens opens the sequence again."""
    tokenizer = tiny_tokenizer("sentencepiece")
    assert tokenizer.convert_ids_to_tokens(real_ids(prompt, "H", tokenizer)) == ["<s>", "H"]


ROWS = {"prompt_embeddings": noise(P, D)}
BAD = [
    ({"peft_type": "LORA"}, None, "peft_type is 'LORA'; PEFT's soft prompts are PROMPT_TUNING, .*merge_and_unload"),
    ({"num_virtual_tokens": 10**12}, None, "num_virtual_tokens is 1000000000000; for this base it must be an integer"),
    ({"num_virtual_tokens": "4"}, None, "num_virtual_tokens is '4'"),
    ({"num_virtual_tokens": None}, None, "num_virtual_tokens is None"),
    ({"num_virtual_tokens": 5}, None, r"is float32 \(4, 32\); it must be .* \(5, 32\)"),
    ({"num_transformer_submodules": 2}, None, "encoder-decoder"),
    ({"peft_type": "PREFIX_TUNING"}, None, r"must be .* \(4, 96\)"),
    ({}, {"prompt_embeddings": noise(P, D + 1)}, r"is float32 \(4, 33\)"),
    ({}, {"prompt_embeddings": np.zeros((P, D), np.int32)}, "is I32"),
    ({}, {"prompt_embeddings": np.full((P, D), np.nan, np.float32)}, "not finite"),
    ({}, {"other": noise(P, D)}, "'other' is unknown"),
    ({}, {}, "the tensor 'prompt_embeddings' is missing"),
    ({}, {"prompt_embeddings": np.zeros((P, 0), np.float32)}, r"\(4, 0\); it must be"),
    ({}, {**ROWS, "base_model.score.weight": noise(2, D)}, "'base_model.score.weight' is a task head .*PREFIX_TUNING"),
    ({}, {**ROWS, "base_model.lm_head.weight": noise(320, D)}, "lm_head.weight' is not the base's: it was trained"),
    ({}, {**ROWS, "base_model.model.embed_tokens.weight": noise(324, D)}, r"the base's has \(320, 32\): .*resized"),
    ({}, {**ROWS, "base_model.model.layers.0.q_proj.lora_A.weight": noise(2, D)}, "belongs to LoRA"),
    ({"peft_type": "ADAPTION_PROMPT", "adapter_len": P, "adapter_layers": 9}, None, "adapter_layers is 9"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "tensors", "message"), BAD)
def test_bad_directories_are_refused(tmp_path, base, changes, tensors, message):
    folder = peft_directory(tmp_path / "peft", tensors, **changes)
    with pytest.raises(CheckpointError, match=message):
        import_peft(folder, base)


def test_tasks_come_in_one_by_one(tmp_path, base):
    cols, rows = noise(3, P, 2), noise(3, 2, D)
    tensors = {"prompt_embeddings": noise(P, D), "prefix_task_cols": cols, "prefix_task_rows": rows}
    counts = {"num_tasks": 3, "num_ranks": 2}
    folder = peft_directory(tmp_path / "peft", tensors, peft_type="MULTITASK_PROMPT_TUNING", **counts)
    for task in range(3):
        method, virtual = import_peft(folder, base, task=task)
        assert method == PromptTuning(length=P)
        np.testing.assert_allclose(virtual.tokens, noise(P, D) * (cols[task] @ rows[task]), rtol=1e-6)
    for task in (None, 3, -1):
        with pytest.raises(ConfigError, match="of 3 tasks; choose one, from 0 to 2"):
            import_peft(folder, base, task=task)
    with pytest.raises(ConfigError, match="no task 1 to choose"):
        import_peft(peft_directory(tmp_path / "other"), base, task=1)


def test_tasks_go_out_together(tmp_path, base):
    prompts = [saved_prompt(tmp_path / "a", base, "prompt_tuning")] * 2
    export_peft_tasks(tmp_path / "peft", prompts, base)
    _, virtual = import_peft(tmp_path / "peft", base, task=1)
    np.testing.assert_allclose(virtual.tokens, prompts[1].virtual.tokens, rtol=1e-6)
    with pytest.raises(ConfigError, match="prefix_tuning prompt does not consist only of token rows"):
        export_peft_tasks(tmp_path / "bad", [*prompts, saved_prompt(tmp_path / "b", base, "prefix_tuning")], base)
    assert not (tmp_path / "bad").exists()


def head_directory(folder, task, name, classes, bias=True):
    tensors = {"prompt_embeddings": noise(P, L * 2 * K * H), f"base_model.{name}.weight": noise(classes, D)}
    tensors |= {f"base_model.{name}.bias": noise(classes)} if bias else {}
    return peft_directory(folder, tensors, peft_type="PREFIX_TUNING", task_type=task)


@pytest.mark.parametrize(
    ("task", "name", "classes", "options"),
    [
        ("SEQ_CLS", "score", 3, {"target": "{l}", "head": "classification"}),
        ("TOKEN_CLS", "score", 3, {"target": "{l}", "head": "tagging", "reads": "text"}),
        ("QUESTION_ANS", "qa_outputs", 2, {"target": "{l}", "head": "span", "reads": "text"}),
    ],
)
def test_heads_come_in_and_go_out(tmp_path, base, task, name, classes, options):
    folder = head_directory(tmp_path / "peft", task, name, classes, bias=task != "SEQ_CLS")
    method, virtual = import_peft(folder, base)
    assert method.head == options["head"]
    np.testing.assert_array_equal(virtual.head.kernel, noise(classes, D).T)
    names = {} if classes == 2 else {"verbalizers": {"a": "A", "b": "B", "c": "C"}}
    saved = save_prompt(tmp_path / "ours", base, method, virtual, Template(prompt="{text}", **options, **names))
    export_peft(tmp_path / "again", load_prompt(saved, base), base)
    ours, theirs = (safetensors.numpy.load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", folder))
    assert set(ours) == set(theirs)
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["task_type"] == task


def test_bad_heads(tmp_path, base):
    with pytest.raises(CheckpointError, match="not a span head: the weight has 3 classes"):
        import_peft(head_directory(tmp_path / "a", "QUESTION_ANS", "qa_outputs", 3), base)
    with pytest.raises(CheckpointError, match=r"'base_model\.score\.bias' is a task head"):
        import_peft(head_directory(tmp_path / "b", "SEQ_CLS", "score", 3), base)
    method, virtual = import_peft(head_directory(tmp_path / "c", "TOKEN_CLS", "score", 3), base)
    template = Template(prompt="{a}", target="{l}", head="classification", verbalizers={"a": "A", "b": "B", "c": "C"})
    saved = save_prompt(tmp_path / "ours", base, method, virtual, template)
    with pytest.raises(ConfigError, match="heads without a bias; train with --method"):
        export_peft(tmp_path / "out", load_prompt(saved, base), base)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_copies_of_the_bases_own_tensors_are_no_fault(tmp_path, base, dtype):
    """PEFT saves the embeddings and the output matrix with a prompt when it cannot tell whether they changed."""
    own = {
        "base_model.model.embed_tokens.weight": np.asarray(base.params["embedding"], dtype),
        "base_model.lm_head.weight": np.ascontiguousarray(np.asarray(base.params["output"], dtype).T),
    }
    _, virtual = import_peft(peft_directory(tmp_path / "peft", {**ROWS, **own}), base)
    np.testing.assert_array_equal(virtual.tokens, noise(P, D))


def test_what_is_not_the_directory_says_what_it_is(tmp_path, base):
    peft_directory(tmp_path / "peft")
    (tmp_path / "named").mkdir()
    peft_directory(tmp_path / "named" / "task_a")
    saved_prompt(tmp_path / "ours", base, "prompt_tuning")
    write_tiny_checkpoint(tmp_path / "model")
    for source, message in {
        "named": "has the named adapters task_a: give .*named/task_a",
        "ours": "is a prompt of this library, which needs no import",
        "model": "is a model: use it as the base",
        "nothing": "nothing/adapter_config.json: no such file",
        "peft/adapter_model.safetensors": "is a file; give the directory .*peft$",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            import_peft(tmp_path / source, base)
    for source, message in {
        "peft/adapter_model.safetensors": "is part of a prompt directory; give the directory .*peft$",
        "ours/prompt.safetensors": "is part of a prompt directory; give the directory .*ours$",
        "model/model.safetensors": "is a safetensors file; a .npy file of one float array",
        "peft": "is a directory; a .npy file",
        "nothing.npy": "missing",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            import_npy(tmp_path / source, base)
        with pytest.raises(CheckpointError, match=message):
            initialize(initializers.file(tmp_path / source), jax.random.key(0), base, P)


def test_pickles_and_damaged_files_are_refused(tmp_path, base):
    folder = peft_directory(tmp_path / "peft")
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match="missing, truncated or damaged"):
        import_peft(folder, base)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        import_peft(folder, base)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json, line 1, column 2"):
        import_peft(folder, base)
    with pytest.raises(CheckpointError, match="not a PEFT directory"):
        import_peft(tmp_path, base)


def test_npy_files(tmp_path, base):
    saved = saved_prompt(tmp_path / "ours", base, "prompt_tuning")
    export_npy(tmp_path / "rows.npy", saved)
    method, virtual = import_npy(tmp_path / "rows.npy", base)
    assert method.length == P
    np.testing.assert_array_equal(virtual.tokens, saved.virtual.tokens)
    with pytest.raises(ConfigError, match="prefix_tuning prompt does not consist only of token rows"):
        export_npy(tmp_path / "other.npy", saved_prompt(tmp_path / "prefix", base, "prefix_tuning"))
    for bad, message in [
        (noise(P, D + 1), r"float32 \(4, 33\)"),
        (noise(D), r"float32 \(32,\)"),
        (np.zeros((P, D), np.int64), "int64"),
        (np.full((P, D), np.inf, np.float32), "not finite"),
        (np.asarray([[{}]], dtype=object), "no readable"),
    ]:
        np.save(tmp_path / "bad.npy", bad, allow_pickle=True)
        with pytest.raises(CheckpointError, match=message):
            import_npy(tmp_path / "bad.npy", base)


def test_embeddings_of_a_request(tmp_path, base):
    """Rows of the table, with the prompt's own where the template puts them."""
    saved = saved_prompt(tmp_path / "ours", base, "prompt_tuning", "{text}<soft>")
    content = base64.b64decode(export_embeddings(saved, base, {"text": "Hello"}))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        stored = np.frombuffer(archive.read("archive/data/0"), "<f4").reshape(-1, D)
    ids = base.tokenizer("Hello")["input_ids"]
    np.testing.assert_array_equal(stored[: len(ids)], np.asarray(base.params["embedding"])[ids])
    np.testing.assert_array_equal(stored[len(ids) :], saved.virtual.tokens)
    assert len(torch_file(noise(2, 3))) < 2000
    for family in ("bert", "t5"):
        with pytest.raises(ConfigError, match=f"tiny-{family} is not a decoder"):
            export_embeddings(saved, tiny_base(family), {"text": "Hello"})


def test_commands(tmp_path, capsys):
    write_tiny_checkpoint(tmp_path / "model", "llama")
    peft_directory(tmp_path / "theirs")
    model, ours = str(tmp_path / "model"), str(tmp_path / "ours")
    words = ["import", "--source", str(tmp_path / "theirs"), "--base", model, "--output", ours]
    assert main(words) == 0
    assert "prompt_tuning: 4 virtual tokens of width 32" in capsys.readouterr().out
    assert main(["export", "--prompt", ours, "--output", str(tmp_path / "again")]) == 0
    again = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    np.testing.assert_array_equal(again["prompt_embeddings"], noise(P, D))
    request = ["export", "--prompt", ours, "--output", str(tmp_path / "request"), "--format", "vllm"]
    assert main([*request, "--fields", "text=Hello"]) == 0
    assert main([*request, "--fields", "txt=Hello"]) == 1
    assert "did you mean 'txt'" in capsys.readouterr().err
    peft_directory(tmp_path / "theirs", num_virtual_tokens=9)
    assert main([*words[:-1], str(tmp_path / "bad")]) == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("family", "message"),
    [("falcon_h1", "PEFT leaves out the factor .* of the text's embeddings"), ("gemma4_text", "embeddings by layer")],
)
def test_bases_whose_texts_peft_embeds_otherwise(tmp_path, family, message):
    """PEFT joins its rows with what the embedding module returns, which is not all that these models add to a token."""
    base = tiny_base(family, **(E2B if family == "gemma4_text" else {}))
    directory = peft_directory(tmp_path / "peft", {"prompt_embeddings": noise(P, base.layout.width)})
    with pytest.raises(ConfigError, match=message):
        import_peft(directory, base)
    virtual = VirtualPrompt(tokens=jnp.asarray(noise(P, base.layout.width)))
    template = Template(prompt="<soft><bos>{text}", target="{label}", virtual_tokens=P)
    saved = save_prompt(tmp_path / "ours", base, PromptTuning(length=P), virtual, template)
    with pytest.raises(ConfigError, match=message):
        export_peft(tmp_path / "theirs", load_prompt(saved, base), base)
