"""What figures were measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's own name, or else the architecture's."""
    return cpuinfo("model name") or platform.processor() or platform.machine()


def cpuinfo(field: str) -> str:
    """What Linux says of the first core under this name; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in entries if name.strip() == field), "")


def device_name(device: torch.device) -> str:
    """The model of the card, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
