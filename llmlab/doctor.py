"""What this machine is tried on before a run: versions, devices, memory, folders, the hub, optional packages.

Nothing is judged by its name: whatever a run would use is used once, small, and its result is compared. Torch is
imported late, so that a machine without a working torch is told so. Printing is `llmlab/cli/doctor.py`'s.
"""

import getpass
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from llmlab.settings.errors import UserError, reason_of
from llmlab.terminal import human

if TYPE_CHECKING:
    from llmlab.hardware import Hardware

COMPILE_LIMIT = 120.0  # seconds; from an empty cache it took 30 on two cores
HUB_LIMIT = 5.0  # seconds
LITTLE_DISK, NO_DISK = 20e9, 1e9  # bytes: a checkpoint of the default model takes 6e9
SLOW = 0.9  # of fp32's speed: a dtype that computes slower than this is no gain
OPTIONAL = {  # distribution: what it enables
    "bitsandbytes": "use_qlora, and optimizers with 8-bit states (adamw_8bit, paged_adamw_8bit)",
    "liger-kernel": "fused kernels on GPUs: less memory for logits and norms",
    "flash-attn": "attn_implementation = flash_attention_2: long and packed rows on NVIDIA GPUs",
    "vllm": "use_vllm: faster sampling in grpo and ppo, on a GPU",
    "deepspeed": "ZeRO: a model's states divided over several GPUs",
    "trackio": "report_to = trackio: local experiment tracking",
    "tensorboard": "report_to = tensorboard: curves in a browser",
    "ruff": "the reward lint_pass",
    "lm-eval": "public benchmarks",
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried; `limited` still trains, `broken` does not, `absent` is optional."""

    section: Literal["versions", "device", "folders", "hub", "packages"]
    name: str
    status: Literal["ok", "limited", "broken", "absent"]
    detail: str


@dataclass(frozen=True)
class Checkup:
    """All checks of a machine, the preset that fits it, and why nothing could train here (None: something could)."""

    checks: list[Check]
    preset: str | None
    problem: str | None


def examine(say: Callable[[str], None] = lambda text: None) -> Checkup:
    """Tries everything once.

    Args:
        say: is told what is being tried.

    Returns:
        The checks in the order of their sections, the recommended hardware preset, and what keeps all runs from
        training.
    """
    checks = list(check_versions())
    problem = next((f"{check.name}: {check.detail}" for check in checks if check.status == "broken"), None)
    say("importing torch and the trainers")
    imports = check_imports()
    checks.append(imports)
    preset = None
    if imports.status == "broken":
        problem = f"{imports.name}: {imports.detail}"
    else:
        from llmlab.hardware import probe, recommend_preset

        devices = [check for device in find_devices() for check in check_device(device, say)]
        if all(check.status == "broken" for check in devices if check.name.endswith(" training")):
            problem = problem or "no device can train"
        checks += devices
        preset = recommend_preset(probe())
    say("looking at folders and the hub")
    return Checkup([*checks, *check_folders(), check_hub(), *check_packages()], preset, problem)


# Versions ---------------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    """Returns what llmlab's own package requires, with its extras."""
    try:
        return [Requirement(line) for line in requires("llmlab") or ()]
    except PackageNotFoundError:
        raise UserError("llmlab is not installed as a package: pip install -e . in its checkout") from None


def check_versions() -> Iterator[Check]:
    """Compares Python and the required packages with the range that llmlab is tested with."""
    python = platform.python_version()
    wanted = Requirement(f"python{metadata('llmlab')['Requires-Python']}").specifier
    yield Check("versions", "python", "ok" if wanted.contains(python) else "broken", f"{python} (needs {wanted})")
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield check_version(requirement)


def check_version(requirement: Requirement) -> Check:
    """Compares an installed package with its tested range."""
    tested = bounds(requirement)
    command = f"pip install '{requirement.name}{tested}'"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check("versions", requirement.name, "broken", f"not installed: {command}")
    if requirement.specifier.contains(found, prereleases=True):
        return Check("versions", requirement.name, "ok", f"{found} (tested with {tested})")
    outside = f"{found} is outside of the tested range {tested}: {command}"
    return Check("versions", requirement.name, "broken", outside)


def bounds(requirement: Requirement) -> str:
    """Returns a package's range with the lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def check_imports() -> Check:
    """Imports what every stage imports, which a package that is half installed or of another build fails."""
    name = "torch"
    try:
        import torch  # noqa: F401

        name = "trainers"
        from trl import DPOTrainer, GRPOTrainer, SFTTrainer  # noqa: F401  # with Transformers, PEFT and Accelerate
    except (Exception, SystemExit) as error:
        return Check("versions", name, "broken", f"cannot be imported: {reason_of(error)}")
    return Check("versions", name, "ok", "torch, Transformers and TRL can be imported together")


# Devices ----------------------------------------------------------------------------------------------------------


def find_devices() -> list[str]:
    """Returns every GPU, then the CPU."""
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*gpus, *(["mps"] if torch.mps.is_available() else []), "cpu"]


def check_device(device: str, say: Callable[[str], None] = lambda text: None) -> Iterator[Check]:
    """Describes a device, and tries on it what a run may use."""
    from llmlab.hardware import probe

    trials: dict[str, Callable[[str], str]] = {
        "training": train_layer,
        "bf16": lambda device: compare_products(device, "bfloat16"),
        "fp16": lambda device: compare_products(device, "float16"),
        "sdpa attention": lambda device: try_attention(device, "sdpa"),
        "flash attention": lambda device: try_attention(device, "flash"),
        "flex attention": lambda device: try_attention(device, "flex"),
        "fused AdamW": lambda device: train_layer(device, fused=True),
        "torch.compile": compile_in_child,
    }
    try:
        found = probe(device.partition(":")[0])
        yield Check("device", f"{device} memory", *describe_memory(device, found))
    except Exception as error:  # a driver that does not fit to torch
        yield Check("device", f"{device} memory", "limited", f"cannot be read: {reason_of(error)}")
    for name, trial in trials.items():
        say(f"trying {name} on {device}")
        try:
            yield Check("device", f"{device} {name}", "ok", trial(device))
        except Exception as error:
            status = "broken" if name == "training" else "limited"
            reason = str(error) if isinstance(error, UserError) else f"does not work: {reason_of(error)}"
            yield Check("device", f"{device} {name}", status, reason)


def describe_memory(device: str, found: "Hardware") -> tuple[Literal["ok", "limited"], str]:
    """Returns whether much of a device's memory is free, and its name, memory and chosen dtype in words."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    free = min(free, found.memory or free)
    words = f"{found.name}: {human(free, 'B')} of {human(found.memory, 'B')} free; dtype auto is {found.dtype}"
    return ("ok" if free > found.memory / 4 else "limited"), f"{words} ({found.reason})"


def train_layer(device: str, *, fused: bool = False) -> str:
    """Takes one step of AdamW on a layer, and compares it with the formula."""
    import torch

    layer = torch.nn.Linear(64, 64, device=device)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0, fused=fused)
    layer(torch.ones(8, 64, device=device)).square().mean().backward()
    optimizer.step()
    # the first step of Adam is the learning rate times the gradient's sign
    expected = before - 0.1 * layer.weight.grad.sign()
    torch.testing.assert_close(layer.weight.detach(), expected, atol=1e-3, rtol=0)
    return "one step of AdamW is right"


def compare_products(device: str, dtype: str) -> str:
    """Multiplies matrices in a 16-bit dtype, and raises UserError where that is slower than in fp32."""
    import torch

    size = 512 if device == "cpu" else 4096
    synchronize = torch.get_device_module(device.partition(":")[0]).synchronize

    def measure(kind: torch.dtype) -> float:
        ones = torch.ones(size, size, device=device, dtype=kind)
        product = ones @ ones  # the first call loads kernels
        if not bool((product == size).all()):
            raise UserError("computes wrong products: not used")
        seconds = []
        for _ in range(10):  # other programs may be busy
            synchronize()
            start = time.perf_counter()
            ones @ ones
            synchronize()
            seconds.append(time.perf_counter() - start)
        return 2 * size**3 / min(seconds)

    single, half = measure(torch.float32), measure(getattr(torch, dtype))
    words = f"{human(half, 'FLOP/s')}, {half / single:.2g} times fp32's"
    if half < SLOW * single:
        raise UserError(f"computed, but slower than fp32: {words}")
    return words


def try_attention(device: str, kind: Literal["sdpa", "flash", "flex"]) -> str:
    """Compares causal attention with its formula."""
    import warnings

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(0)).to(device)
    if kind == "flash":
        heads = heads.half() if device == "mps" else heads.bfloat16()
    scores = (heads.float() @ heads.float().mT) / 32**0.5
    causal = torch.ones(64, 64, device=device, dtype=torch.bool).tril()
    expected = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ heads.float()
    if kind == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        with warnings.catch_warnings(action="ignore"):  # that it is not compiled here
            found = flex_attention(heads, heads, heads, lambda s, b, h, q, k: torch.where(q >= k, s, -torch.inf))
    else:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if kind == "flash" else list(SDPBackend.__members__.values())[1:]):
            found = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    words = {"sdpa": "torch's own", "flash": "torch's kernel, in 16 bits", "flex": "fast where it is compiled"}
    return f"right: {words[kind]}"


def compile_in_child(device: str, limit: float = COMPILE_LIMIT) -> str:
    """Compiles a layer in a process of its own, which can be stopped."""
    command = [sys.executable, "-c", f"from llmlab.doctor import compile_layer; compile_layer({device!r})"]
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise UserError(f"stopped after {limit:.0f} s: runs need compile=false") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error: " in line or ".exc." in line] or [done.stderr]
        raise UserError(f"does not work: {lines[-1][-200:].strip()}: runs need compile=false")
    return f"compiled and right, after {time.monotonic() - start:.0f} s with torch's own start"


def compile_layer(device: str) -> None:
    """Compiles a small layer, and compares its output and gradient."""
    import torch

    layer = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)).to(device)
    batch = torch.randn(4, 32, device=device, requires_grad=True)
    results = []
    for function in (layer, torch.compile(layer)):
        output = function(batch)
        results.append((output, *torch.autograd.grad(output.square().sum(), batch)))
    torch.testing.assert_close(*results, atol=1e-2, rtol=1e-2)


# Folders, hub, packages -------------------------------------------------------------------------------------------


def check_folders() -> Iterator[Check]:
    """Tries to write where runs and caches go, and looks at the room there."""
    from huggingface_hub import constants

    home, environment = Path.home(), os.environ
    compiled = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    folders = {
        "run folders (here)": Path.cwd(),
        "models (HF_HOME)": constants.HF_HUB_CACHE,
        "data (HF_HOME)": environment.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets",
        "tokens (LLMLAB_CACHE)": environment.get("LLMLAB_CACHE") or home / ".cache" / "llmlab",
        "compiled code (TORCHINDUCTOR_CACHE_DIR)": environment.get("TORCHINDUCTOR_CACHE_DIR") or compiled,
    }
    for name, folder in folders.items():
        yield check_folder(name, Path(folder).expanduser().absolute())


def check_folder(name: str, folder: Path) -> Check:
    """Writes a temporary file where a folder is or would be made."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
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
            answer[:] = [huggingface_hub.get_session().head(constants.ENDPOINT, timeout=limit).status_code]
        except Exception as error:  # whatever the client and the network raise
            answer[:] = [reason_of(error)]

    asking = Thread(target=ask, daemon=True)
    start = time.monotonic()
    asking.start()
    asking.join(limit)
    if isinstance(answer[0], int) and answer[0] < 500:
        account = "with" if huggingface_hub.get_token() else "without"
        words = f"{constants.ENDPOINT} answers in {time.monotonic() - start:.1f} s, {account} an access token"
        return Check("hub", "hub", "ok", words)
    words = (
        f"{constants.ENDPOINT} cannot be reached ({answer[0]}): only local models and data, demo/... and the caches"
    )
    return Check("hub", "hub", "limited", words)


def check_packages() -> Iterator[Check]:
    """Looks for the optional packages."""
    listed = {requirement.name: requirement for requirement in requirements() if requirement.marker}
    for name, use in OPTIONAL.items():
        requirement = listed.get(name, Requirement(name))
        found = check_version(requirement)
        if found.detail.startswith("not installed"):
            yield Check("packages", name, "absent", f"{use}: {found.detail.partition(': ')[2]}")
        else:
            status = "ok" if found.status == "ok" else "limited"
            yield Check("packages", name, status, f"{found.detail.partition(' (')[0]}: {use}")
