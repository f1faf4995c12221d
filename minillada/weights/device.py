"""Choose a device, and find out what it can do and how much memory it has left."""

import re
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import BadLuck, check_one_of
from ..model import ModelConfig


def pick_device(name: str) -> str:
    """Return a device that works; "auto" is an NVIDIA GPU, or Apple's, or the CPU. Raises BadInput, BadLuck."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    check_one_of("device", name.split(":")[0], there)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        what = f"device: expected a working {name}, got none in this PyTorch {torch.__version__}"
        raise BadLuck(f"{what}; use cpu") from None
    return name


def capability(device: str | torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU, (9, 0) for an H100; (0, 0) for any other device."""
    there = torch.device(device).type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if there else (0, 0)


def bfloat16_instructions(device: str) -> str:
    """Return the name of the instructions that a type of device multiplies bfloat16 with, "" if it has none."""
    if device == "cuda":
        return "CUDA" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return next((name for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16") if able.get(name)), "")


def groups_products(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Return whether PyTorch multiplies all experts of a layer in one go on this device: in bfloat16 on Hopper and
    Blackwell. Elsewhere `grouped_mm` waits for the device, and then multiplies one expert after the other."""
    return capability(device)[0] in (9, 10) and dtype == torch.bfloat16


def slow_experts(c: ModelConfig, device: str | torch.device, dtype: torch.dtype) -> list[str]:
    """Return a line for the user if a model's experts are slower on this GPU than they could be, or none."""
    if not c.n_expert or torch.device(device).type == "cpu" or groups_products(device, dtype):
        return []
    kind = str(dtype).removeprefix("torch.")
    return [f"experts: {kind} on this device multiplies them one by one; fast is bfloat16 on a Hopper or Blackwell GPU"]


def check_memory(need: int, device: torch.device) -> None:
    """Raise BadLuck if the device is known to have less than `need` bytes free."""
    if (free := free_memory(device)) is not None and need > free:
        what = f"memory on {device}: expected {need / 1e9:.2f} GB free for the weights, got {free / 1e9:.2f} GB"
        raise BadLuck(f"{what}; use a smaller dtype or another device")


def free_memory(device: torch.device) -> int | None:
    """Return a device's free bytes, the CPU's within the process's own limit; None if they cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with suppress(OSError, TypeError):  # TypeError: the file has no such line
        limits.append(1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]))
    with suppress(OSError, ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(soft - pages * resource.getpagesize())
    return min(limits, default=None)
