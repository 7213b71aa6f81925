"""What this machine has: device, dtype, memory and peak FLOP/s, probed and never assumed."""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env

from llmlab.settings.errors import UserError
from llmlab.settings.files import read_table

GLIBC_CHOICES = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
NO_TF32 = "asked for, but CUDA GPUs since Ampere alone have it: no effect here"
GPU_EXTRA = "'llmlab[gpu]'"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TABLE = read_table("llmlab", "hardware")
RATES: dict[str, tuple[float, float]] = _TABLE["rates"]
BANDWIDTHS = {"cuda": 0.8e12, "mps": 0.2e12, "cpu": 0.04e12}  # bytes/s of devices that are not there
MACHINES = {name: (device, title, gib * 2**30) for name, (device, title, gib) in _TABLE["machines"].items()}


@dataclass(frozen=True)
class Hardware:
    """The device that a run uses and its dtype, with the reason for it; memory in bytes, peak in FLOP/s if known."""

    device: str
    name: str
    dtype: str
    reason: str
    memory: int
    peak_flops: float | None
    processes: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the device's memory."""
        return _rates(self.name)[1] or BANDWIDTHS[self.device]

    @property
    def has_tf32(self) -> bool:
        return self.device == "cuda" and torch.cuda.get_device_capability()[0] >= 8

    def rows(self, tf32: bool | None = None) -> list[tuple[str, str]]:
        """Returns the rows of a run's plan; `tf32` is whether the settings ask for it."""
        rows = [("device", f"{self.name} ({self.device})"), ("dtype", f"{self.dtype}: {self.reason}")]
        return [*rows, ("tf32", NO_TF32)] if tf32 and not self.has_tf32 else rows

    def record(self) -> dict[str, Any]:
        """Returns plain values for a run's record."""
        return {**asdict(self), "platform": platform.platform(), "cores": os.cpu_count()}


def probe(device: str = "auto", dtype: str = "auto") -> Hardware:
    """Chooses the device (`auto`, `cpu`, `cuda`, `mps`) and the dtype (`auto`, `bf16`, `fp16`, `fp32`)."""
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # of a launch
    available = [name for name in ("cuda", "mps") if not on_cpu and getattr(torch, name).is_available()]
    if device == "auto":
        device = available[0] if available else "cpu"
    elif device != "cpu" and device not in available:
        expected = f"expected one of {', '.join([*available, 'cpu'])}"
        raise UserError(f"device = {device}: this machine has no such device; {expected}")
    name, memory = _identify(device)
    dtype, reason = _choose_dtype(device, dtype)
    return Hardware(device, name, dtype, reason, memory, _rates(name)[0], int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def reuse_freed_memory(device: str, *, forks: bool = False) -> Iterator[None]:
    """On a CPU with glibc, keeps freed memory in the process for the next tensors. By default glibc unmaps large
    tensors as soon as they are freed, and the page faults of the next ones take up to a quarter of a training step.
    Not where the user has chosen, nor with workers that `forks` makes: each would hold a copy of what is free."""
    if device != "cpu" or forks or GLIBC_CHOICES & os.environ.keys() or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    most_mappings, least_mapping, least_trim = -4, -3, -1  # M_MMAP_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    libc.mallopt(most_mappings, 0)
    libc.mallopt(least_trim, -1)
    try:
        yield
    finally:
        libc.mallopt(most_mappings, 65536)  # glibc's default
        libc.mallopt(least_mapping, 32 << 20)  # the most that glibc's dynamic threshold reaches
        libc.mallopt(least_trim, 64 << 20)
        libc.malloc_trim(0)


def recommend_preset(hardware: Hardware, gpus: int | None = None) -> str:
    """Returns the hardware preset for so many GPUs (None counts them), by the memory where a GPU is unknown."""
    if hardware.device != "cuda":
        return {"cpu": "cpu", "mps": "m1_max_64gb"}[hardware.device]
    if (torch.cuda.device_count() if gpus is None else gpus) > 1:
        return "multi_gpu_ddp"
    known = ("h200_141gb", "a100_80gb", "a100_40gb", "rtx_4090")
    fits = (name for name in known if hardware.memory >= 0.92 * MACHINES[name][2])  # of which some is never free
    name = next(fits, "rtx_4080")
    return "h100_80gb" if name == "a100_80gb" and "H100" in hardware.name else name


def check_packages(settings: Any, hardware: Hardware) -> None:
    """Refuses settings of a training stage that need a package, device or dtype which is not here."""
    optimizer, attention = f"optimizer = {settings.optimizer}", f"attn_implementation = {settings.attn_implementation}"
    for wish, asked_for, package, install, devices in (
        ("use_qlora = true", getattr(settings, "use_qlora", False), "bitsandbytes", GPU_EXTRA, ("cuda", "cpu")),
        (optimizer, optimizer.endswith("bit"), "bitsandbytes", GPU_EXTRA, ("cuda", "cpu")),
        ("use_liger_kernel = true", settings.use_liger_kernel, "liger_kernel", GPU_EXTRA, ("cuda",)),
        (attention, "flex" in attention, "torch", "torch", ("cuda",)),  # elsewhere it has no gradients
        (attention, "flash" in attention, "flash_attn", "flash-attn --no-build-isolation", ("cuda",)),
        *((f"report_to = {name}", True, name, name, (hardware.device,)) for name in settings.report_to),
    ):
        where = "" if hardware.device in devices else f"; it runs on {' or '.join(devices)}, not on {hardware.device}"
        if asked_for and find_spec(package) is None:
            raise UserError(f"{wish}: it needs {package}, which is not installed: pip install {install}{where}")
        if asked_for and where:
            raise UserError(f"{wish}: not supported by {package} on this device{where}")
    if "flash" in attention and hardware.dtype == "fp32":
        raise UserError(f"{attention}: it computes in bf16 or fp16 alone, and dtype is fp32")


def describe_machine(preset: str, dtype: str = "auto") -> Hardware:
    """Returns the device of a hardware preset, which need not be here; `auto` and `cpu` are this machine's."""
    if preset not in MACHINES:
        return probe("cpu" if preset == "cpu" else "auto", dtype)
    device, name, memory = MACHINES[preset]
    chosen = {"mps": "fp16", "cuda": "bf16"}[device] if dtype == "auto" else dtype
    return Hardware(device, name, chosen, "as planned", int(memory), _rates(name)[0])


def free_disk(folder: Path) -> int:
    """Returns the free bytes of the disk that holds a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _rates(name: str) -> tuple[float | None, float | None]:
    return next((rates for part, rates in RATES.items() if part in name), (None, None))


def _identify(device: str) -> tuple[str, int]:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return properties.name, properties.total_memory
    name = _cpu_info("model name")
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    memory = torch.mps.recommended_max_memory() if device == "mps" else psutil.virtual_memory().total
    return name or platform.processor() or platform.machine(), memory


def peak_memory(device: str) -> int:
    """Returns the bytes that this process had in use at most, on a GPU those of its tensors; 0 if nothing says."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()  # at present: there is no peak
    if platform.system() == "Windows":
        return 0
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _cpu_info(key: str) -> str:
    """Returns a field of the first processor in Linux's /proc/cpuinfo, empty on other systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _choose_dtype(device: str, dtype: str) -> tuple[str, str]:
    has_bf16, why = _supports_bf16(device)
    if dtype == "auto":
        if has_bf16:
            return "bf16", why
        return ("fp32", why) if device == "cpu" else ("fp16", f"{why}, but fp16")
    if dtype == "fp16" and device == "cpu":
        raise UserError("dtype = fp16: a CPU computes fp16 hundreds of times slower than fp32; expected bf16 or fp32")
    if dtype == "bf16" and not has_bf16:
        raise UserError(f"dtype = bf16: {why}; expected {'fp16 or fp32' if device != 'cpu' else 'fp32'}")
    return dtype, "as asked"


def _supports_bf16(device: str) -> tuple[bool, str]:
    if device == "cuda":
        supported, what = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    elif device == "mps":
        supported, what = _computes_bf16(device), "this chip or macOS"
    else:
        supported, what = bool({"avx512_bf16", "amx_bf16"} & set(_cpu_info("flags").split())), "this CPU"
    return supported, f"{what} {'has' if supported else 'has no'} bf16{' instructions' if device == 'cpu' else ''}"


def _computes_bf16(device: str) -> bool:
    """Whether a product of matrices in bf16 comes out right, which no property of an Apple chip says."""
    try:
        ones = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        return bool((ones @ ones == 8).all())
    except (RuntimeError, TypeError):  # what torch raises where a dtype is not supported
        return False
