"""Huge pages: when a program is executed again, and that it then is the same program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spt_jax.runtime.huge_pages import with_huge_pages

ASKED = "always [madvise] never"


def test_a_program_asks_where_programs_may_ask():
    assert with_huge_pages({"A": "b"}, ASKED, "glibc 2.36") == {
        "A": "b",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    found = with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, ASKED, "glibc 2.35")
    assert found is not None and found["GLIBC_TUNABLES"] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("environment", "setting", "library"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, ASKED, "glibc 2.36"),
        ({}, "[always] madvise never", "glibc 2.36"),
        ({}, "always madvise [never]", "glibc 2.36"),
        ({}, ASKED, "glibc 2.31"),
        ({}, ASKED, ""),
    ],
    ids=["set by the user", "always on", "never on", "an old glibc", "another C library"],
)
def test_nothing_is_done_otherwise(environment: dict[str, str], setting: str, library: str):
    assert with_huge_pages(environment, setting, library) is None


def test_a_program_inside_another_is_not_executed_again(tmp_path: Path):
    train = str(Path(__file__).parents[1] / "train.py")
    host = tmp_path / "host.py"
    host.write_text(
        "import runpy, sys\nprint('start', flush=True)\n"
        f"sys.argv = [{train!r}, 'no-such-config']\nrunpy.run_path({train!r}, run_name='__main__')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = str(Path(train).parent)
    done = subprocess.run([sys.executable, str(host)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no-such-config" in done.stderr and done.stdout.split() == ["start"]


def test_the_program_keeps_its_process_its_arguments_and_its_exit_code(tmp_path: Path):
    # Python imports sitecustomize at each start.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a') as file:\n"
        "    print(os.getpid(), sys.orig_argv[1:], os.environ.get('GLIBC_TUNABLES'), sep='|', file=file)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command = [sys.executable, "-m", "spt_jax", "no-such-command"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no-such-command" in done.stderr
    starts = [line.split("|") for line in (tmp_path / "starts").read_text().splitlines()]
    assert len({(pid, arguments) for pid, arguments, _ in starts}) == 1
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists() and with_huge_pages({}, setting.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or ""):
        assert [tunables for *_, tunables in starts] == ["None", "glibc.malloc.hugetlb=1"]
    else:
        assert len(starts) == 1
