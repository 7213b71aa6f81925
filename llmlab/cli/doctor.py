"""`llmlab doctor`: what this machine can do, tried: versions, devices, memory, folders, the hub, optional packages.
Nothing is judged by its name: whatever a run would use is used once, small, and its result is compared. Torch is
imported late, so that a machine without a working torch is told so."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, version
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer import Exit

from llmlab.cli.arguments import AsJson
from llmlab.settings.errors import UserError, reason_of
from llmlab.terminal import Terminal, human, safe, say_json

COMPILE_LIMIT = 120.0  # seconds; from an empty cache it took 30 on two cores
HUB_LIMIT = 5.0  # seconds
LITTLE_DISK, NO_DISK = 20e9, 1e9  # bytes: a checkpoint of the default model takes 6e9
STYLES = {"ok": "green", "limited": "yellow", "broken": "bold red", "absent": "dim"}


@dataclass(frozen=True)
class Check:
    """One thing that was tried; `limited` still trains, `broken` does not, `absent` is optional."""

    section: Literal["versions", "device", "folders", "hub", "packages"]
    name: str
    status: Literal["ok", "limited", "broken", "absent"]
    detail: str


def doctor(as_json: AsJson = False) -> None:
    """Try what this machine can do: versions, devices, memory, folders, hub, optional packages."""
    with Terminal(stderr=True).status("trying this machine, at most a few minutes"):
        checks, preset, problem = examine()
    if as_json:
        say_json({"checks": [asdict(check) for check in checks], "preset": preset, "problem": problem}, indent=2)
        raise Exit(1 if problem else 0)
    console = Terminal(whole_rows=True)
    for section, rows in groupby(checks, key=lambda check: check.section):
        console.print(f"[bold]{section.capitalize()}[/bold]")
        cells = ((f"  {safe(c.name)}", f"[{STYLES[c.status]}]{c.status}[/]", safe(c.detail)) for c in rows)
        console.table(("", "", ""), cells, show_header=False)
    if preset:
        console.print(f"[bold]Preset[/bold] for this machine: --hardware {safe(preset)}")
    bad = f"[bold red]nothing can be trained here[/]: {safe(problem)}"
    console.print(bad if problem else "[green]this machine can train[/]")
    raise Exit(1 if problem else 0)


def examine() -> tuple[list[Check], str | None, str | None]:
    """Tries everything once; returns the checks, the recommended hardware preset, and what keeps all runs from
    training."""
    try:
        package = metadata("llmlab")
    except PackageNotFoundError:
        raise UserError("llmlab is not installed as a package: pip install -e . in its checkout") from None
    required, extras = [], {}
    for requirement in map(Requirement, package.get_all("Requires-Dist") or ()):
        if "extra" in str(requirement.marker):
            extras[requirement.name] = requirement
        elif requirement.marker is None or requirement.marker.evaluate():
            required.append(requirement)
    python, tested = platform.python_version(), package["Requires-Python"]
    status = "ok" if SpecifierSet(tested).contains(python, prereleases=True) else "broken"
    checks = [*map(check_version, required), Check("versions", "python", status, f"{python} (tested with {tested})")]
    checks.append(check_imports())
    problem = next((f"{check.name}: {check.detail}" for check in checks if check.status == "broken"), None)
    preset = None
    if checks[-1].status == "ok":
        from llmlab.hardware import probe, recommend_preset

        devices = [check for device in find_devices() for check in check_device(device)]
        if all(check.status == "broken" for check in devices if check.name.endswith(" training")):
            problem = problem or "no device can train"
        checks += devices
        preset = recommend_preset(probe())
    from llmlab.settings.files import read_table  # not for the help

    optional = read_table("llmlab.cli", "packages").items()
    packages = (check_version(extras.get(name, Requirement(name)), f"{use}; ") for name, use in optional)
    return [*checks, *check_folders(), check_hub(), *packages], preset, problem


def check_version(requirement: Requirement, use: str = "") -> Check:
    """Compares an installed package with its tested range; one with a `use` is optional."""
    section, missing, wrong = ("packages", "absent", "limited") if use else ("versions", "broken", "broken")
    tested = ",".join(sorted(map(str, requirement.specifier), reverse=True))  # the lower bound first
    unisolated = " --no-build-isolation" if requirement.name == "flash-attn" else ""  # it builds with the torch here
    command = f"pip install '{requirement.name}{tested}'{unisolated}"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(section, requirement.name, missing, f"{use}not installed: {command}")
    if requirement.specifier.contains(found, prereleases=True):
        return Check(section, requirement.name, "ok", use + found + (f" (tested with {tested})" if tested else ""))
    return Check(section, requirement.name, wrong, f"{use}{found} is outside of the tested range {tested}: {command}")


def check_imports() -> Check:
    """Imports what every stage imports."""
    for name in ("torch", "trl.trainer.grpo_trainer"):  # with Transformers, PEFT and Accelerate
        try:
            import_module(name)
        except (Exception, SystemExit) as error:
            return Check("versions", name, "broken", f"cannot be imported: {reason_of(error)}")
    return Check("versions", "trainers", "ok", "torch, Transformers and TRL can be imported together")


def find_devices() -> list[str]:
    """Returns every GPU, then the CPU."""
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*gpus, *(["mps"] if torch.mps.is_available() else []), "cpu"]


def check_device(device: str) -> Iterator[Check]:
    """Tries on a device what a run may use; a UserError of a trial is its whole reason."""
    trials: dict[str, Callable[[str], str]] = {
        "memory": describe_memory,
        "training": train_layer,
        "bf16": partial(multiply, dtype="bf16"),
        "fp16": partial(multiply, dtype="fp16"),
        "sdpa attention": attend,
        "flash attention": partial(attend, flash=True),
        "fused AdamW": partial(train_layer, fused=True),
        "torch.compile": compile_in_child,
    }
    for name, trial in trials.items():
        try:
            yield Check("device", f"{device} {name}", "ok", trial(device))
        except Exception as error:
            status = "broken" if name == "training" else "limited"
            reason = str(error) if isinstance(error, UserError) else f"does not work: {reason_of(error)}"
            yield Check("device", f"{device} {name}", status, reason)


def describe_memory(device: str) -> str:
    """Returns a device's name, free memory and dtype, and raises UserError with them where little memory is free."""
    import psutil
    import torch

    from llmlab.hardware import probe

    is_cuda = device.startswith("cuda")
    with torch.cuda.device(device if is_cuda else -1):
        found = probe(device.partition(":")[0])
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    free = min(free, found.memory or free)
    room = f"{found.name}: {human(free, 'B')} of {human(found.memory, 'B')} free"
    words = f"{room}; dtype auto is {found.dtype} ({found.reason})"
    if free < found.memory / 4:
        raise UserError(words)
    return words


def train_layer(device: str, *, fused: bool = False, compiled: bool = False) -> str:
    """Takes one step of AdamW on a layer, and compares gradient and weights with the formulas."""
    import torch

    layer = torch.nn.Linear(64, 64, bias=False, device=device)
    torch.nn.init.constant_(layer.weight, 0.5)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0, fused=fused)

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return layer(batch).square().mean()

    (torch.compile(loss) if compiled else loss)(torch.ones(8, 64, device=device)).backward()
    optimizer.step()
    # d/dw mean((64 w)^2) = 2 * 64 * 0.5 / 64 = 1; Adam's first step is the learning rate times its sign
    for found, expected in ((layer.weight.grad, 1.0), (layer.weight.detach(), 0.5 - 0.1)):
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-3, rtol=0)
    return "one step of AdamW is right"


def multiply(device: str, dtype: str) -> str:
    """Multiplies matrices in a 16-bit dtype, and raises UserError where runs refuse it."""
    import torch

    from llmlab.hardware import probe

    ones = torch.ones(64, 64, device=device, dtype=probe(device.partition(":")[0], dtype).torch_dtype)
    torch.testing.assert_close(ones @ ones, 64 * ones)
    return "products of matrices are right"


def attend(device: str, *, flash: bool = False) -> str:
    """Compares causal attention with its formula."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = torch.float32 if not flash else torch.float16 if device == "mps" else torch.bfloat16
    heads = torch.randn(1, 2, 64, 32, device=device, dtype=dtype)
    future = torch.ones(64, 64, device=device, dtype=torch.bool).triu(1)
    scores = (heads.float() @ heads.float().mT / 32**0.5).masked_fill(future, -torch.inf)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
        found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.testing.assert_close(found.float(), scores.softmax(-1) @ heads.float(), atol=0.02, rtol=0.02)
    return "right, by torch's kernel in 16 bits" if flash else "right"


def compile_in_child(device: str, limit: float = COMPILE_LIMIT) -> str:
    """Trains a compiled layer in a process of its own, which can be stopped."""
    code = f"from llmlab.cli.doctor import train_layer; train_layer({device!r}, compiled=True)"
    start = time.monotonic()
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise UserError(f"stopped after {limit:.0f} s: runs need compile=false") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error: " in line or ".exc." in line] or [done.stderr]
        raise UserError(f"does not work: {lines[-1][-200:].strip()}: runs need compile=false")
    return f"compiled and right, after {time.monotonic() - start:.0f} s with torch's own start"


def check_folders() -> Iterator[Check]:
    """Tries to write where runs and caches go, and looks at the room there."""
    from huggingface_hub import constants

    environment = os.environ.get
    for name, folder in {
        "run folders (here)": Path.cwd(),
        "models (HF_HOME)": constants.HF_HUB_CACHE,
        "data (HF_HOME)": environment("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets"),
        "tokens (LLMLAB_CACHE)": environment("LLMLAB_CACHE") or "~/.cache/llmlab",
        "compiled code (TORCHINDUCTOR_CACHE_DIR)": environment("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(),
    }.items():
        yield check_folder(name, Path(os.path.expanduser(folder)).absolute())


def check_folder(name: str, folder: Path) -> Check:
    """Writes a temporary file where a folder is or would be made."""
    try:
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0" * 4096)
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Check("folders", name, "broken", f"{folder} cannot be written: {error.strerror}")
    status = "broken" if free < NO_DISK else "limited" if free < LITTLE_DISK else "ok"
    return Check("folders", name, status, f"{folder}: {human(free, 'B')} free")


def check_hub(limit: float = HUB_LIMIT) -> Check:
    """Asks Hugging Face's hub for an answer, for so many seconds at most, name look-up included."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return Check("hub", "hub", "limited", "HF_HUB_OFFLINE is set: only what is in the caches can be used")
    answer: list[Any] = ["no answer"]

    def ask() -> None:
        try:
            answer[0] = huggingface_hub.get_session().head(constants.ENDPOINT, timeout=limit).status_code
        except Exception as error:  # whatever the client and the network raise
            answer[0] = reason_of(error)

    thread, start = Thread(target=ask, daemon=True), time.monotonic()
    thread.start()
    thread.join(limit)
    if isinstance(answer[0], int) and answer[0] < 500:
        account = "with" if huggingface_hub.get_token() else "without"
        words = f"{constants.ENDPOINT} answers in {time.monotonic() - start:.1f} s, {account} an access token"
        return Check("hub", "hub", "ok", words)
    rest = "only local models and data, demo/... and the caches"
    return Check("hub", "hub", "limited", f"{constants.ENDPOINT} cannot be reached ({answer[0]}): {rest}")
