"""GGUF models in several files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from spt_jax.bases.base import load_base
from spt_jax.bases.gguf_header import read_header
from spt_jax.errors import CheckpointError
from tests.bases.gguf_files import write_gguf
from tests.layouts import row_logits

IDS = np.arange(3, 43)


@pytest.fixture
def file(tmp_path):
    return write_gguf(tmp_path)[1]


def split(file: Path, folder: Path, *, wrong: dict | None = None, tensors: int | None = None) -> list[Path]:
    """Writes a file again in three parts, as gguf-split does; `wrong` are other values of the third part."""
    reader, header = gguf.GGUFReader(file), read_header(file)
    paths = [folder / f"model-0000{i + 1}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        if i == 0:
            for key, value in header.metadata.items():
                if key != "general.architecture":
                    writer.add_key_value(key, value, *gguf_types(value))
        facts = {"no": i, "count": 3} | ((wrong or {}) if i == 2 else {})
        writer.add_uint16("split.no", facts["no"])
        writer.add_uint16("split.count", facts["count"])
        writer.add_int32("split.tensors.count", tensors or len(reader.tensors))
        for tensor in reader.tensors[i::3] + (reader.tensors[:1] if i == 2 and "twice" in facts else []):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def gguf_types(value):
    kind = gguf.GGUFValueType.get_type(value)
    return (kind, gguf.GGUFValueType.get_type(value[0])) if isinstance(value, list) else (kind,)


@pytest.mark.parametrize("quantize", [None, "keep"])
def test_a_model_in_parts(quantize, tmp_path, monkeypatch):
    _, file = write_gguf(tmp_path, "llama", Kind.Q8_0)
    paths = split(file, tmp_path)
    options = {"dtype": "float32", "quantize": quantize}
    ours, theirs = load_base(paths[0], **options), load_base(file, **options)
    np.testing.assert_array_equal(row_logits(ours, IDS), row_logits(theirs, IDS))
    assert ours.fingerprint == theirs.fingerprint
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, name, revision: asked.append(name) or str(tmp_path / Path(name).name),
    )
    load_base("owner/name:folder/model-00001-of-00003.gguf", **options)
    assert asked == [f"folder/{path.name}" for path in paths]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wrong": {"no": 1}}, r"model-00003-of-00003.gguf: it says that it is part 1 \(from 0\) of 3"),
        ({"wrong": {"count": 4}}, r"model-00003-of-00003.gguf: it says that it is part 2 \(from 0\) of 4"),
        ({"wrong": {"twice": True}}, r"model-00003-of-00003.gguf: tensor .* is in an earlier part, too"),
        ({"tensors": 99}, r"model-00001-of-00003.gguf: the model has 99 tensors, and the parts hold 21"),
    ],
)
def test_parts_that_do_not_belong_together(change, message, file, tmp_path):
    first, *_ = split(file, tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        load_base(first)


def test_parts_that_are_missing_or_named_otherwise(file, tmp_path):
    first, second, third = split(file, tmp_path)
    with pytest.raises(CheckpointError, match=r"not the first part of the model; name model-00001-of-00003.gguf"):
        load_base(second)
    other = tmp_path / "other.gguf"
    other.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a model, which are named NAME-00001-of-3.gguf"):
        load_base(other)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003.gguf: no such file; .* is the first of 3 parts"):
        load_base(first)
