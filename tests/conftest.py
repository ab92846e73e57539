"""Eight CPU devices, strict rank promotion, and runtime type checks for every test."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Imports and tracing allocate millions of objects that stay: the default threshold of 700 collects so often that it
# takes a seventh of the processor time of tests/prompts/test_every_family.py -k gpt2.
gc.set_threshold(50_000, 20, 50)

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.quick import QUICK_FLAGS

_FLAGS = f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
# Workers and the processes that tests start share what they compile.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spt_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SPT_JAX_CACHE"] = "off"  # Tests compute what they check.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
from jaxtyping import install_import_hook


def _register_unchecked(nodetype, *args, **kwargs):
    """JAX rebuilds pytrees around anything: shapes, shardings, None. Their fields' types are for the reader alone."""
    nodetype.__no_type_check__ = True
    return _register_dataclass(nodetype, *args, **kwargs)


_register_dataclass = jax.tree_util.register_dataclass
jax.tree_util.register_dataclass = _register_unchecked
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("spt_jax", "beartype.beartype")


def pytest_collection_finish() -> None:
    """Exempts what the imports left from every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Forgets compiled programs before they take up the 65,530 memory maps that Linux gives a process, and it dies."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()


SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the project; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real data and models is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real trained Llama of 260,032 parameters."""
    return shared / "models" / "stories260K"
