"""Files of token rows: any float type is read, and whatever else a file is, the message names it."""

import io
import os
import pickle
import zipfile

import jax
import numpy as np
import pytest

from spt_jax.errors import CheckpointError, ConfigError, SptError
from spt_jax.interop import import_npy
from spt_jax.prompts import initializers
from spt_jax.prompts.initializers import initialize
from spt_jax.testing import tiny_base

P, D = 4, 32


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def torch_like(path, first: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(first, b"\x80\x02.")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("rows.npz", lambda path: np.savez(path, rows=noise(P, D)), r"a \.npz archive .its first array is 'rows\.npy'"),
        (
            "rows.pt",
            lambda path: torch_like(path, "archive/data.pkl"),
            "a torch file .* pickle is not read",
        ),
        ("old.pt", lambda path: path.write_bytes(pickle.dumps({"rows": 1})), "a pickle, .* because it can run code"),
        ("text.npy", lambda path: np.savetxt(path, noise(P, D)), r"not a \.npy file"),
        ("empty.npy", lambda path: path.write_bytes(b""), "is empty"),
        ("cut.npy", lambda path: path.write_bytes(npy_bytes(noise(P, D))[:-4]), r"no readable \.npy array"),
        ("huge.npy", lambda path: path.write_bytes(declared_npy((10**9, D))), r"no readable \.npy array"),
        ("none.npy", lambda path: path.write_bytes(declared_npy((10**9, 0))), r"no readable|\(1000000000, 0\)"),
        ("pipe.npy", lambda path: os.mkfifo(path), "not a regular file"),
    ],
)
def test_files_that_are_no_rows_say_what_they_are(tmp_path, base, name, write, message):
    write(tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        import_npy(tmp_path / name, base)
    with pytest.raises(SptError, match=message):
        initialize(initializers.file(tmp_path / name), jax.random.key(0), base, P)


def npy_bytes(array) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def declared_npy(shape) -> bytes:
    """The header of an array of this shape, and no numbers."""
    header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2"])
def test_rows_of_any_float_type(tmp_path, base, dtype):
    np.save(tmp_path / "rows.npy", noise(P, D).astype(dtype))
    expected = noise(P, D).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(import_npy(tmp_path / "rows.npy", base)[1].tokens, expected)
    rows = initialize(initializers.file(tmp_path / "rows.npy"), jax.random.key(0), base, P)
    np.testing.assert_array_equal(rows, expected)
    np.save(tmp_path / "rows.npy", np.full((P, D), 1e300))
    with pytest.raises(CheckpointError, match="not finite"):
        import_npy(tmp_path / "rows.npy", base)
    with pytest.raises(ConfigError, match="finite float32 numbers"):
        initialize(initializers.file(tmp_path / "rows.npy"), jax.random.key(0), base, P)
