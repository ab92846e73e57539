"""Huge pages for the arrays of this package's programs on Linux.

XLA allocates the temporaries of a program anew at every call on the CPU. Above a few MiB, glibc gets such memory from
the kernel and returns it afterwards, and the kernel clears each page of 4 KiB when it is first touched, which takes a
tenth to a fifth of a step or an evaluation (docs/devices.md). With pages of 2 MiB, little of it remains. glibc asks for
them if it finds a tunable in the environment when the process starts, so the program is executed once more, before it
imports anything that takes time.
"""

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FIRST_GLIBC = (2, 35)  # the first with this tunable


def use_huge_pages() -> None:
    """Executes this program again with huge pages, if they are available to programs that ask and are not in use.

    Call it before importing what takes time. Setting the tunable in `GLIBC_TUNABLES`, to any value, prevents it. A
    program that another one runs in its own process, such as a notebook with %run or a debugger, is not executed again.
    """
    if not sys.executable or sys.orig_argv[1:2] != sys.argv[:1]:
        return
    environment = environment_with_huge_pages()
    if environment is not None:
        with contextlib.suppress(OSError):  # It also works as it is.
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def environment_with_huge_pages() -> dict[str, str] | None:
    """Returns `with_huge_pages` of this process on this machine."""
    try:
        setting, library = _SETTING.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError, AttributeError):  # no such kernel or C library
        return None
    return with_huge_pages(os.environ, setting, library)


def with_huge_pages(environment: Mapping[str, str], setting: str, library: str) -> dict[str, str] | None:
    """Returns the environment of a program that uses huge pages.

    Args:
      environment: of this process.
      setting: the kernel's choices, with the current one in brackets: "always [madvise] never".
      library: name and version of the C library, such as "glibc 2.36".

    Returns:
      The environment with the tunable added to those that it has; None if nothing is to be done: programs cannot ask,
      need not ask, or the tunable is already set.
    """
    name, _, version = library.partition(" ")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    present = environment.get(_VARIABLE, "")
    if name != "glibc" or numbers < _FIRST_GLIBC or "[madvise]" not in setting or _TUNABLE in present:
        return None
    return {**environment, _VARIABLE: ":".join(filter(None, [present, f"{_TUNABLE}=1"]))}
