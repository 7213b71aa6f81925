"""Choosing device and arithmetic by what is there."""

import platform
import resource
from dataclasses import replace

import psutil
import pytest
import torch

from llmlab import hardware
from llmlab.hardware import reuse_freed_memory
from llmlab.settings.errors import UserError
from llmlab.settings.files import Layer
from llmlab.settings.presets import HARDWARE_PRESETS
from llmlab.settings.sources import resolve
from llmlab.stages import STAGES


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
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12), ("NVIDIA L40", 181e12), ("Odd", None)):
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


@pytest.mark.parametrize(
    ("device", "name", "gigabytes", "gpus", "expected"),
    [
        ("cpu", "AMD EPYC", 25, 0, "cpu"),
        ("mps", "Apple M1 Max", 48, 0, "m1_max_64gb"),
        ("cuda", "NVIDIA GeForce RTX 4080", 17.0, 1, "rtx_4080"),
        ("cuda", "NVIDIA GeForce RTX 4090", 25.4, 1, "rtx_4090"),
        ("cuda", "NVIDIA A100-SXM4-40GB", 42.3, 1, "a100_40gb"),
        ("cuda", "NVIDIA A100-SXM4-80GB", 85.1, 1, "a100_80gb"),
        ("cuda", "NVIDIA H100 80GB HBM3", 85.0, 1, "h100_80gb"),
        ("cuda", "NVIDIA H200", 150.1, 1, "h200_141gb"),
        ("cuda", "NVIDIA B200", 191.5, 1, "h200_141gb"),
        ("cuda", "NVIDIA L40S", 47.7, 1, "a100_40gb"),  # unknown ones: the next smaller memory
        ("cuda", "NVIDIA A10G", 23.8, 1, "rtx_4090"),
        ("cuda", "Tesla T4", 15.8, 1, "rtx_4080"),
        ("cuda", "NVIDIA H100 80GB HBM3", 85.0, 8, "multi_gpu_ddp"),
    ],
)
def test_recommended_presets(device, name, gigabytes, gpus, expected):
    found = hardware.Hardware(device, name, "bf16", "", int(gigabytes * 1e9), None)
    assert hardware.recommend_preset(found, gpus) == expected and expected in HARDWARE_PRESETS


def test_the_preset_for_this_machine():
    assert hardware.recommend_preset(hardware.probe()) in HARDWARE_PRESETS


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "orpo", "reward", "grpo", "ppo"])
@pytest.mark.parametrize(
    ("package", "values", "message"),
    [
        ("bitsandbytes", {"optim": "paged_adamw_8bit"}, "optimizer = paged_adamw_8bit: it needs bitsandbytes, which"),
        ("bitsandbytes", {"optimizer": "lion_8bit"}, r"is not installed: pip install 'llmlab\[gpu\]'$"),
        ("bitsandbytes", {"use_qlora": True}, r"use_qlora = true: it needs .*: pip install 'llmlab\[gpu\]'$"),
        ("liger_kernel", {"use_liger_kernel": True}, r"'llmlab\[gpu\]'; it runs on cuda, not on cpu"),
        ("flash_attn", {"attn_implementation": "flash_attention_2"}, "pip install flash-attn --no-build-isolation;"),
    ],
)
def test_packages_that_are_not_there_are_named_before_anything_is_loaded(
    stage, package, values, message, tiny_settings, tmp_path, monkeypatch
):
    if stage == "pretrain" and "use_qlora" in values:
        return
    kind = STAGES[stage].settings_class
    values = resolve(kind, Layer("x", values)).settings.model_dump(include={*values, "optimizer"} - {"optim"})
    settings = tiny_settings(
        stage, tmp_path / "run", **values, **({"policy_checkpoint": str(tmp_path)} if stage != "pretrain" else {})
    )
    find_spec = hardware.find_spec
    monkeypatch.setattr(hardware, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=message):
        STAGES[stage].function(settings)
    assert not (tmp_path / "run").exists()


def test_packages_that_are_there_on_a_device_that_they_do_not_run_on(sft_settings, monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: name)
    on = {device: hardware.Hardware(device, "", "bf16", "", 0, None) for device in ("cpu", "cuda", "mps")}
    flash, liger = sft_settings(attn_implementation="flash_attention_2"), sft_settings(use_liger_kernel=True)
    flex, paged = sft_settings(attn_implementation="flex_attention"), sft_settings(optimizer="paged_lion_8bit")
    for settings, refused in (
        (flash, ("cpu", "mps")),
        (liger, ("cpu", "mps")),
        (flex, ("cpu", "mps")),
        (paged, ("mps",)),
    ):
        for device, machine in on.items():
            if device in refused:
                with pytest.raises(UserError, match=f"not supported by .*, not on {device}"):
                    hardware.check_packages(settings, machine)
            else:
                hardware.check_packages(settings, machine)
    with pytest.raises(UserError, match="bf16 or fp16 alone, and dtype is fp32"):
        hardware.check_packages(flash, replace(on["cuda"], dtype="fp32"))


def test_tf32_is_said_where_it_has_no_effect(monkeypatch):
    cpu, gpu = (hardware.Hardware(device, "", "bf16", "", 0, None) for device in ("cpu", "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    for machine in (cpu, gpu):  # a T4 has none
        assert dict(machine.rows(True))["tf32"] == hardware.NO_TF32 and "tf32" not in dict(machine.rows(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "tf32" not in dict(gpu.rows(True))


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_freed_memory_serves_the_next_tensors_and_is_returned_in_the_end(monkeypatch):
    def faults():
        """Returns the page faults of making a tensor, of the same size each time."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    torch.ones(1).add(1)  # what torch loads at first
    outside = faults()
    pages = 80_000_000 // resource.getpagesize()
    for arguments in ({"device": "cuda"}, {"device": "cpu", "forks": True}):
        with reuse_freed_memory(**arguments):
            assert faults() > 0.5 * outside
    with monkeypatch.context() as patch:
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
        with reuse_freed_memory("cpu"):
            assert faults() > 0.5 * outside
    with reuse_freed_memory("cpu"):
        # a small block behind the first tensor may push the second elsewhere
        assert min(faults() for _ in range(6)) < 0.01 * pages
        full = psutil.Process().memory_info().rss
    assert psutil.Process().memory_info().rss < full - 70_000_000
    assert faults() > 0.5 * outside
