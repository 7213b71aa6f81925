"""Choosing device and arithmetic by what is there."""

import pytest
import torch

from llmlab import hardware
from llmlab.settings.errors import UserError


def pretend(monkeypatch, *, device="cpu", bf16=False, name="Some CPU"):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.mps, "is_available", lambda: device == "mps")
    monkeypatch.setattr(hardware, "_identify", lambda device: (name, 10**10))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(hardware, "_computes_bf16", lambda device: bf16)
    monkeypatch.setattr(hardware, "_cpu_info", lambda key: "avx2 avx512_bf16" if bf16 else "avx2")


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"bf16": True}, ("cpu", "bf16")),
        ({"bf16": False}, ("cpu", "fp32")),
        ({"device": "cuda", "bf16": True, "name": "NVIDIA H200"}, ("cuda", "bf16")),
        ({"device": "cuda", "bf16": False, "name": "Tesla V100"}, ("cuda", "fp16")),
        ({"device": "mps", "bf16": False, "name": "Apple M1 Max"}, ("mps", "fp16")),
        ({"device": "mps", "bf16": True, "name": "Apple M1 Max"}, ("mps", "bf16")),
    ],
    ids=str,
)
def test_auto(monkeypatch, machine, expected):
    pretend(monkeypatch, **machine)
    found = hardware.probe()
    assert (found.device, found.dtype) == expected
    assert found.reason and found.torch_dtype is hardware.DTYPES[found.dtype]


def test_peaks_are_known_for_the_right_card(monkeypatch):
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L40S", 362e12), ("Odd", None)):
        pretend(monkeypatch, device="cuda", bf16=True, name=name)
        assert hardware.probe().peak_flops == peak


@pytest.mark.parametrize(
    ("machine", "wish", "message"),
    [
        ({}, {"device": "cuda"}, "device = cuda: this machine has no such device; expected one of cpu"),
        ({}, {"dtype": "fp16"}, "hundreds of times slower"),
        ({}, {"dtype": "bf16"}, "this CPU has no bf16 instructions; expected fp32"),
        ({"device": "mps"}, {"dtype": "bf16"}, "this chip or macOS has no bf16; expected fp16 or fp32"),
        ({"device": "cuda"}, {"dtype": "bf16"}, "this GPU has no bf16; expected fp16 or fp32"),
    ],
)
def test_wishes_that_the_machine_cannot_meet(monkeypatch, machine, wish, message):
    pretend(monkeypatch, **machine)
    with pytest.raises(UserError, match=message):
        hardware.probe(**wish)


def test_bf16_is_probed_by_computing(monkeypatch):
    assert hardware._computes_bf16("cpu") and not hardware._computes_bf16("meta")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: ones(*shape, **options) * 0.5)
    assert not hardware._computes_bf16("cpu")  # it computes, and wrongly


def test_this_machine():
    found = hardware.probe("cpu")
    assert found.memory > 10**8 and found.name
    assert found.record()["cores"] >= 1
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=found.torch_dtype, enabled=found.dtype != "fp32"):
        assert (x @ x).dtype == found.torch_dtype


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert hardware.free_disk(tmp_path / "a" / "b") > 0
