"""The documentation lists every family, with what its code says of it."""

import subprocess
import sys

from spt_jax.bases.families import FAMILIES
from tests.golden.cases import CASES
from tests.jobs import ROOT


def test_the_table_is_that_of_the_code():
    script = subprocess.run([sys.executable, "scripts/make_families.py", "--check"], cwd=ROOT, check=False)
    assert script.returncode == 0, "run scripts/make_families.py"


def test_every_family_is_compared_with_transformers():
    assert {case.family for case in CASES} == set(FAMILIES)
