"""What `llmlab doctor` finds on machines that lack something."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version

import huggingface_hub
import pytest
import torch
from packaging.requirements import Requirement

from llmlab.cli import doctor
from llmlab.cli.app import main
from llmlab.settings.errors import UserError
from llmlab.settings.files import read_table


@pytest.fixture
def quick(monkeypatch):
    """Leaves the compiler and the hub, which take seconds, out."""
    monkeypatch.setattr(doctor, "compile_in_child", lambda device: "compiled")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def cli(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *words])
    return caught.value.code or 0, capsys.readouterr().out


def test_a_machine_that_can_train(quick, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, output = cli(capsys)
    assert code == 0 and "this machine can train" in output
    assert f"torch ok {version('torch')} (tested with >=2.11)" in " ".join(output.split())
    code, output = cli(capsys, "--json")
    found = json.loads(output)
    assert code == 0 and found["problem"] is None
    assert found["preset"] == "cpu" or torch.cuda.is_available() or torch.mps.is_available()
    status = {check["name"]: check["status"] for check in found["checks"]}
    tried = {"transformers", "trl", "trainers", "cpu training", "cpu fused AdamW", "cpu sdpa attention"}
    assert all(status[name] == "ok" for name in tried)
    assert status["cpu fp16"] == "limited"  # it can be computed there, and runs refuse it
    assert status["hub"] == "limited"  # offline, as asked


@pytest.mark.parametrize("found", ["1.15.0", "1.17.0", None])
def test_a_version_outside_of_the_tested_range(found, quick, capsys, monkeypatch):
    def fake(name):
        if name == "trl" and found is None:
            raise PackageNotFoundError(name)
        return found if name == "trl" else version(name)

    monkeypatch.setattr(doctor, "version", fake)
    monkeypatch.setattr(doctor, "find_devices", list)
    code, output = cli(capsys, "--json")
    problem = json.loads(output)["problem"]
    assert code == 1 and problem.startswith("trl: ") and problem.endswith("pip install 'trl>=1.16,<1.17'"), problem
    assert (found or "not installed") in problem


def test_torch_that_cannot_be_imported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    code, output = cli(capsys, "--json")
    found = json.loads(output)
    assert code == 1 and found["problem"].startswith("torch: cannot be imported: ") and found["preset"] is None
    assert not any(check["section"] == "device" for check in found["checks"])


def test_no_device_that_trains(quick, capsys, monkeypatch):
    def fail(device, fused=False):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(doctor, "train_layer", fail)
    code, output = cli(capsys)
    assert code == 1 and "nothing can be trained here: no device can train" in output
    assert "CUDA error: no kernel image is available" in " ".join(output.split())  # however the table wraps it


def test_folders(tmp_path, monkeypatch):
    assert doctor.check_folder("x", tmp_path / "not" / "yet").status == "ok"
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    found = doctor.check_folder("x", tmp_path / "file" / "cache")
    assert (
        found.status == "broken"
        and f"{tmp_path / 'file' / 'cache'} cannot be written: Not a directory" in found.detail
    )
    usage = namedtuple("usage", "total used free")
    for free, status in ((5e8, "broken"), (5e9, "limited"), (5e10, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: usage(1e12, 1e12 - free, int(free)))
        assert doctor.check_folder("x", tmp_path).status == status
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o500)
        assert doctor.check_folder("x", tmp_path / "closed").status == "broken"


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(doctor.Path, "exists", fail)
    found = doctor.check_folder("x", tmp_path)
    assert found.status == "broken" and found.detail == f"{tmp_path} cannot be written: Permission denied"


def test_the_hub_never_keeps_it_waiting(monkeypatch):
    class Silent:
        def head(self, url, timeout):
            time.sleep(30)

    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Silent())
    start = time.monotonic()
    found = doctor.check_hub(limit=0.2)
    assert time.monotonic() - start < 2
    assert found.status == "limited" and "cannot be reached (no answer)" in found.detail

    class Answer:
        def head(self, url, timeout):
            return namedtuple("response", "status_code")(200)

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: Answer())
    assert doctor.check_hub(limit=1).status == "ok"


def test_compiling_that_fails_or_hangs(monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", "x\nFooError: no g++\n")
    )
    with pytest.raises(UserError, match="does not work: FooError: no g.*compile=false"):
        doctor.compile_in_child("cpu")
    monkeypatch.undo()
    with pytest.raises(UserError, match="stopped after 0 s: runs need compile=false"):
        doctor.compile_in_child("cpu", limit=0.1)


def test_what_is_computed_wrong(quick, monkeypatch):
    assert doctor.train_layer("cpu") == "one step of AdamW is right"
    monkeypatch.setattr(torch, "compile", lambda loss: lambda batch: 2 * loss(batch))
    with pytest.raises(AssertionError, match="not close"):
        doctor.train_layer("cpu", compiled=True)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, is_causal: v)
    (found,) = (check for check in doctor.check_device("cpu") if check.name == "cpu sdpa attention")
    assert found.status == "limited" and found.detail.startswith("does not work: Tensor-likes are not close")


def test_llmlab_that_is_not_installed(capsys, monkeypatch):
    def fail(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "metadata", fail)
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 2 and "llmlab is not installed as a package: pip install" in capsys.readouterr().err


def test_optional_packages_say_what_they_enable(quick, monkeypatch):
    monkeypatch.setattr(doctor, "find_devices", list)
    found = {check.name: check for check in doctor.examine()[0] if check.section == "packages"}
    optional = read_table("llmlab.cli", "packages")
    assert found.keys() == optional.keys()
    for name, check in found.items():
        assert optional[name] in check.detail
        assert check.status == "ok" or f"pip install '{name}" in check.detail
    assert "pip install 'x>=1,<2'" in doctor.check_version(Requirement("x<2,>=1")).detail
