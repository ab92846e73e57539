"""Every initializer against the embedding table that it draws from."""

import jax
import numpy as np
import pytest

import spt_jax
from spt_jax.errors import CheckpointError, ConfigError
from spt_jax.prompts.initializers import Initializer, initialize
from spt_jax.testing import tiny_base


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


@pytest.fixture(scope="module")
def table(base):
    return np.asarray(base.params["embedding"])


def rows(init: Initializer, base, length: int = 6, seed: int = 0) -> np.ndarray:
    result = initialize(init, jax.random.key(seed), base, length)
    assert result.shape == (length, base.config.width) and result.dtype == np.float32
    return np.asarray(result)


def ids_of(found: np.ndarray, table: np.ndarray) -> list[int]:
    matches = (found[:, None] == table[None]).all(-1)
    assert matches.any(1).all(), "every row is a row of the table"
    return matches.argmax(1).tolist()


def test_uniform_covers_both_signs(base):
    values = rows(spt_jax.init.uniform(0.5), base, 60)
    assert -0.5 <= values.min() < -0.48 and 0.48 < values.max() <= 0.5


def test_normal_has_the_tables_scale(base, table):
    values = rows(spt_jax.init.normal(), base, 3000)
    np.testing.assert_allclose(values.std(0), table.std(0), rtol=0.06)
    np.testing.assert_allclose(values.mean(0), table.mean(0), atol=0.02)


def test_vocabulary_is_distinct_common_and_without_control_tokens(base, table):
    ids = ids_of(rows(spt_jax.init.vocabulary(top_k=40), base, 37), table)
    assert sorted(ids) == [i for i in range(40) if i not in base.tokenizer.all_special_ids]
    assert ids != ids_of(rows(spt_jax.init.vocabulary(top_k=40), base, 37, seed=1), table)
    with pytest.raises(ConfigError, match="leaves 37 tokens"):
        rows(spt_jax.init.vocabulary(top_k=40), base, 38)


def test_text_is_tiled_and_trimmed_without_bos(base, table):
    expected = base.tokenizer.encode("good question", add_special_tokens=False)
    ids = ids_of(rows(spt_jax.init.text("good question"), base, 2 * len(expected) + 1), table)
    assert ids == [*expected, *expected, expected[0]]
    assert ids_of(rows(spt_jax.init.text("good question"), base, 2), table) == expected[:2]


def test_labels_are_means_then_vocabulary(base, table):
    found = rows(spt_jax.init.labels(["positive", "bad"]), base, 5)
    ids = base.tokenizer.encode("positive", add_special_tokens=False)
    assert len(ids) > 1
    np.testing.assert_allclose(found[0], table[ids].mean(0), rtol=1e-6)
    assert len(set(ids_of(found[2:], table))) == 3


def test_array_and_npy_file(base, tmp_path):
    values = np.random.default_rng(0).normal(size=(6, base.config.width)).astype(np.float32)
    np.save(tmp_path / "prompt.npy", values)
    assert (rows(spt_jax.init.array(values), base) == values).all()
    assert (rows(spt_jax.init.file(tmp_path / "prompt.npy"), base) == values).all()
    with pytest.raises(ConfigError, match=r"has shape \(6, 32\); the prompt needs \(5, 32\)"):
        rows(spt_jax.init.array(values), base, 5)
    with pytest.raises(ConfigError, match="finite"):
        rows(spt_jax.init.array(values * np.nan), base)
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(CheckpointError, match=r"bad\.npy"):
        rows(spt_jax.init.file(tmp_path / "bad.npy"), base)


def test_a_pickle_is_never_loaded(base, tmp_path):
    np.save(tmp_path / "evil.npy", np.asarray([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"evil\.npy"):
        rows(spt_jax.init.file(tmp_path / "evil.npy"), base)


def test_google_prompts_have_the_documented_shape(shared, base):
    """Real prompts of google-research/prompt-tuning are [100, 768]: refused here for their width, which is named."""
    path = shared / "data" / "google_t5_prompts" / "t5_1_1_lm100k_base" / "sst2.npy"
    with pytest.raises(ConfigError, match=r"\(100, 768\)"):
        rows(spt_jax.init.file(path), base, 100)


def test_another_prompt(base, tmp_path):
    method = spt_jax.PromptTuning(length=6)
    params = method.init_params(jax.random.key(3), base)
    template = spt_jax.Template(prompt="<soft>{t}", target="{l}", virtual_tokens=6)
    spt_jax.save_prompt(tmp_path / "prompt", base, method, spt_jax.VirtualPrompt(**params), template)
    assert (rows(spt_jax.init.prompt(tmp_path / "prompt"), base) == np.asarray(params["tokens"])).all()
    with pytest.raises(CheckpointError, match="weights"):
        rows(spt_jax.init.prompt(tmp_path / "prompt"), tiny_base("llama", seed=1))


@pytest.mark.parametrize(
    "options", [{"name": "text"}, {"name": "file"}, {"name": "prompt"}, {"name": "array"}, {"top_k": 0}, {"scale": 0.0}]
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        Initializer(**options)
