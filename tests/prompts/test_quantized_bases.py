"""Prompts and the quantization of the bases that they are trained on and used with."""

import dataclasses
import json

import jax
import pytest

import spt_jax
from spt_jax.bases.base import load_base
from spt_jax.bases.fingerprint import Fingerprint
from spt_jax.commands.options import Saved
from spt_jax.commands.saved import load
from spt_jax.errors import CheckpointError
from spt_jax.interop.peft_export import peft_note
from spt_jax.prompts import PromptTuning
from spt_jax.prompts.storage import load_prompt
from spt_jax.serving.bank import PromptBank
from spt_jax.testing import write_tiny_checkpoint

TEMPLATE = spt_jax.Template(prompt="<soft>{text}\n", target="{label}", virtual_tokens=3)
METHOD = PromptTuning(length=3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = write_tiny_checkpoint(tmp_path_factory.mktemp("bases") / "tiny")
    return {kind: load_base(directory, quantize=kind) for kind in (None, "int8", "int4")}


@pytest.fixture
def saved(bases, tmp_path):
    """Returns a function that saves a prompt of a base."""

    def save(kind):
        base = bases[kind]
        virtual = METHOD.materialize(METHOD.init_params(jax.random.key(0), base), base.model)
        return spt_jax.save_prompt(tmp_path / str(kind), base, METHOD, virtual, TEMPLATE)

    return save


@pytest.mark.parametrize(("trained", "used"), [("int8", None), ("int8", "int4"), ("int4", None)])
def test_a_prompt_of_a_quantized_base_is_refused_elsewhere(bases, saved, trained, used):
    folder = saved(trained)
    with pytest.raises(
        CheckpointError,
        match=f"quantize is '{trained}' here, {used!r} there. Load .* with quantize='{trained}',.*--force",
    ):
        load_prompt(folder, bases[used])
    with pytest.warns(UserWarning, match=r"quantize is .* Using it anyway \(force=True\)"):
        forced = load_prompt(folder, bases[used], force=True)
    bank = PromptBank(bases[used])
    with pytest.raises(CheckpointError, match="another base: quantize is"):
        bank.add("p", forced)
    load_prompt(folder, bases[trained])


@pytest.mark.parametrize("used", ["int8", "int4"])
def test_a_prompt_of_a_float_base_can_be_used_on_a_quantized_one(bases, saved, used):
    note = f"trained on a base that is not recorded as quantized, and used with {used} kernels"
    with pytest.warns(UserWarning, match=note):
        prompt = load_prompt(saved(None), bases[used])
    with pytest.warns(UserWarning, match=note):
        PromptBank(bases[used]).add("p", prompt)


def test_what_a_float_base_writes_is_what_it_was(bases, saved):
    """Version 0.1 and prompts before quantization was recorded read and compare as before."""
    written = {kind: json.loads((saved(kind) / "prompt.json").read_text()) for kind in (None, "int8")}
    fingerprints = {kind: info["base"]["fingerprint"] for kind, info in written.items()}
    assert "quantize" not in fingerprints[None] and fingerprints["int8"]["quantize"] == "int8"
    assert Fingerprint(**fingerprints[None]) == bases[None].fingerprint
    assert Fingerprint(**fingerprints["int8"]) == bases["int8"].fingerprint
    damaged = written["int8"]
    damaged["base"]["fingerprint"]["quantize"] = 8
    folder = saved("int8")
    (folder / "prompt.json").write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match="quantize"):
        load_prompt(folder, bases["int8"])


def test_commands_load_the_base_as_the_prompt_was_trained(bases, saved):
    folder = saved("int8")
    base, _ = load(Saved(prompt=folder))
    assert base.fingerprint == bases["int8"].fingerprint
    assert spt_jax.load_prompt(folder).base.fingerprint == base.fingerprint
    with pytest.raises(CheckpointError, match="quantize is 'int8' here, None there"):
        load(Saved(prompt=folder, base=bases[None].name))
    with pytest.raises(CheckpointError, match="quantize is 'int8' here, 'int4' there"):
        load(Saved(prompt=folder, quantize="int4"))


def test_the_note_on_peft_names_the_quantization(bases):
    template = dataclasses.replace(TEMPLATE, prompt="<soft><bos>{text}\n")
    plain, own = (peft_note(bases[kind], METHOD, template) for kind in (None, "int4"))
    assert plain == "this prompt can be exported to PEFT"
    assert own == f"{plain}, where the base has other weights than the int4 kernels that it is trained on"


def test_resumed_runs_notice_another_quantization(bases):
    ours, other = bases["int8"].fingerprint, bases["int4"].fingerprint
    assert ours.differences(other) == ["quantize is 'int4' here, 'int8' there"]
    assert not ours.differences(dataclasses.replace(ours))
