"""Pairs of texts: ids and token types are those of the tokenizer, wherever virtual tokens are."""

import dataclasses

import numpy as np
import pytest
import tokenizers.processors
import transformers

import spt_jax
from spt_jax.data.batches import pack, plan_batches
from spt_jax.data.encoder import Encoder, encoder_for
from spt_jax.data.examples import CompactExamples
from spt_jax.data.pairs import PairForm, pair_form
from spt_jax.data.templates import Template
from spt_jax.errors import ConfigError
from spt_jax.evaluation.bare import bare_examples
from spt_jax.testing import tiny_base, tiny_tokenizer

CLASSES = {"yes": "yes", "no": "no"}
PAIR = Template(prompt="{a}<sep>{b}", target="{label}", verbalizers=CLASSES, head="classification")
SOFT = dataclasses.replace(PAIR, prompt="<soft>{a}<sep>{b}", virtual_tokens=2)
RECORDS = [
    {"a": "the question", "b": "is it", "label": "yes"},
    {"a": "who", "b": "and what of it <sep> then", "label": "no"},
    {"a": "world", "b": "", "label": "no"},
]


def word_pieces(tmp_path):
    """BERT's own tokenizer, with a small vocabulary."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "<", ">", *letters, *(f"##{one}" for one in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tokenizer = word_pieces(tmp_path_factory.mktemp("tokenizer"))
    return dataclasses.replace(tiny_base("bert"), tokenizer=tokenizer)


def types_of(example):
    types = np.zeros(len(example.ids), int)
    types[len(types) if example.second_at is None else example.second_at :] = 1
    return types.tolist()


def test_ids_and_types_are_those_of_the_tokenizer(base):
    """A type may begin within what is between the texts, and a tokenizer may have no types."""
    generic, without = (tiny_tokenizer(add_eos=True, add_mask=True) for _ in range(2))
    generic.model_input_names = ["input_ids", "token_type_ids"]
    without.model_input_names = ["input_ids"]
    expected = {base.tokenizer: PairForm((3,), 1), generic: PairForm((2, 1), 1), without: PairForm((2, 1), None)}
    for tokenizer, form in expected.items():
        encoder = Encoder(PAIR, tokenizer, 320, 128, layout=base.layout)
        assert encoder.form.pairs == form
        for record in RECORDS[:2]:  # transformers takes an empty second text for none
            theirs, ours = tokenizer(record["a"], record["b"]), encoder.encode(record, 0)
            assert ours.ids.tolist() == theirs["input_ids"]
            assert types_of(ours) == theirs.get("token_type_ids", [0] * len(ours.ids))


def test_virtual_tokens_and_packed_rows(base):
    """A virtual token has the type of its place; rows hold the types of every example, and nothing elsewhere."""
    later = dataclasses.replace(SOFT, prompt="<soft:1>{a}<sep>{b}<soft:1>")
    for template, places in ((SOFT, [0, 0]), (later, [0, 1])):
        examples = encoder_for(base, template).encode_all(RECORDS)
        plan = plan_batches(examples, lead=0, batch_size=len(examples))
        rows = pack(examples, plan).rows
        assert plan.types and rows.ids.shape[0] == 1
        found, want = [], []
        for number, example in enumerate(examples, 1):
            virtual = np.flatnonzero(example.ids >= base.layout.vocab_size)
            assert np.asarray(types_of(example))[virtual].tolist() == places
            found.append(sorted(rows.stream.types[0, rows.stream.segments[0] == number].tolist()))
            want.append(sorted(types_of(example)))
        assert sorted(found) == sorted(want)
        assert not rows.stream.types[0, rows.stream.segments[0] == 0].any()


def test_examples_that_are_stored_or_lose_their_virtual_tokens(base):
    examples = encoder_for(base, SOFT).encode_all(RECORDS)
    assert [one.second_at for one in CompactExamples.of(examples)] == [one.second_at for one in examples]
    bare = bare_examples(base, examples)
    assert [one.second_at for one in bare] == [one.second_at - 2 for one in examples]


def test_only_a_pair_has_types(base):
    single = dataclasses.replace(PAIR, prompt="{a} {b}")
    examples = encoder_for(base, single).encode_all(RECORDS)
    assert all(one.second_at is None for one in examples)
    plan = plan_batches(examples, lead=0, batch_size=3)
    assert not plan.types and pack(examples, plan).rows.stream.types is None
    words = {"yes": "the", "no": "a"}
    masked = Template(prompt="{a}<sep>{b}<mask>", target="{label}", verbalizers=words)
    alone, after = (encoder_for(base, masked, shots=shots).encode(RECORDS[1], 0) for shots in ((), RECORDS[:1]))
    assert types_of(after).count(1) == types_of(alone).count(1) and len(after.ids) > len(alone.ids)
    solved = base.tokenizer("the question", "is itthe")["input_ids"]  # the first record, its answer in place of a mask
    assert after.ids[: len(solved) - 1].tolist() == solved[:-1]
    assert after.ids.tolist().count(4) == 1 and after.ids[after.answer_at] == 4
    with pytest.raises(ConfigError, match="has several <sep>"):
        encoder_for(base, dataclasses.replace(PAIR, prompt="{a}<sep>{b}<sep>"))
    with pytest.raises(ConfigError, match="new token '<sep>' contains <sep>, which"):
        encoder_for(base, dataclasses.replace(PAIR, new_tokens=("<sep>",)))


def test_the_encoder_of_an_encoder_decoder_has_pairs_without_types():
    base = tiny_base("t5", tokenizer="sentencepiece")
    encoder = encoder_for(base, Template(prompt="{a}<sep>{b}", target="{label}"))
    for record in RECORDS[:2]:
        assert encoder.prompt_ids(record)[:-1].tolist() == base.tokenizer(record["a"], record["b"])["input_ids"]
        assert encoder.encode(record, 0).second_at is None
    decoder = encoder_for(tiny_base("llama"), Template(prompt="{a}<sep>{b}", target="{label}"))
    assert decoder.encode(RECORDS[0], 0).second_at is None


def test_a_prompt_of_pairs_is_trained_and_saved(base, tmp_path):
    options = {"steps": 3, "batch_size": 3, "progress": False}
    template = dataclasses.replace(SOFT, virtual_tokens=0, prompt="<soft>{a}<sep>{b}")
    result = spt_jax.fit(base, spt_jax.PromptTuning(length=2), template, RECORDS, **options)
    result.prompt.save(tmp_path / "prompt")
    loaded = spt_jax.load_prompt(tmp_path / "prompt", base)
    inputs = [{"a": record["a"], "b": record["b"]} for record in RECORDS]
    assert loaded.classify(inputs) == result.prompt.classify(inputs)
    swapped = [{"a": record["b"], "b": record["a"]} for record in RECORDS]
    assert loaded.classify(swapped) != loaded.classify(inputs) or loaded.virtual.head is not None


def test_token_types_that_are_not_those_of_two_texts(tmp_path):
    """A template of a tokenizer may number them in any way."""
    tokenizer = word_pieces(tmp_path)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    forms = []
    for first, second in ((0, 1), (0, 2), (2, 1)):
        pair = f"[CLS]:{first} $A:0 [SEP]:0 $B:{second} [SEP]:{second}"
        tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair=pair, special_tokens=special
        )
        forms.append(pair_form(tokenizer, *([id_] for _, id_ in special)))
    assert forms == [PairForm((special[1][1],), 1), None, None]
