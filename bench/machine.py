"""What the measurements ran on: the columns that every row carries, and a fuller record."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata

import torch

# Used by some tests or commands; the yardsticks themselves need torch alone.
OPTIONAL = (
    "numpy",
    "triton",
    "setuptools",
    "pytest",
    "pytest_benchmark",
    "pytest_timeout",
    "torchvision",
    "sklearn",
    "rich",
    "yaml",
    "tensorboard",
    "onnx",
)
DISTRIBUTIONS = ("numpy", "torchvision", "setuptools", "pip", "pytest")
NO_CUDA = (
    "no CUDA device: torch {version} sees none. "
    "For a dry run at toy sizes: bench/gpu_suite.sh --device cpu --quick"
)


class NoDeviceError(RuntimeError):
    """The device that was asked for is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stamp:
    """Columns that say where a row comes from."""

    device: str
    torch: str
    triton: str
    cuda: str
    driver: str
    clocks: str
    timestamp: str


def find_device(name: str) -> torch.device:
    """`cuda` or `cpu` as a device with an index; NoDeviceError where torch sees no GPU."""
    if name not in ("cuda", "cpu"):
        raise ValueError(f"device: expected 'cuda' or 'cpu', got {name!r}")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise NoDeviceError(NO_CUDA.format(version=torch.__version__))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's architecture."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()}"


def slug(name: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200`: letters, digits and hyphens only."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache; 0 on a CPU, where inputs are not rotated."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 0)) or 64 << 20


def version_of(package: str) -> str:
    """Installed version without importing the package; "" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _output(command: list[str]) -> list[str]:
    """Lines a short command prints; none where it fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return answer.stdout.strip().splitlines()


def _nvidia_smi(query: str, device: torch.device) -> str:
    """One answer of nvidia-smi for this device; "" where it cannot be had."""
    program = shutil.which("nvidia-smi")
    if program is None or device.type != "cuda":
        return ""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    which = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    lines = _output([program, *which, f"--query-gpu={query}", "--format=csv,noheader"])
    return lines[0].strip() if lines else ""


def stamp(device: torch.device) -> Stamp:
    """The columns as of now: ask right after measuring, while the clocks are still up."""
    return Stamp(
        device=device_name(device),
        torch=str(torch.__version__),
        triton=version_of("triton"),
        cuda=str(torch.version.cuda or ""),
        driver=_nvidia_smi("driver_version", device),
        clocks=clocks(device),
        timestamp=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )


def _compiler_version() -> str:
    """Last lines of `nvcc --version`; "" without nvcc."""
    home = os.environ.get("CUDA_HOME", "")
    program = shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))
    if program is None:
        return ""
    return " ".join(_output([program, "--version"])[-2:])


def missing_packages() -> list[str]:
    """Which of OPTIONAL cannot be imported here."""
    return [name for name in OPTIONAL if importlib.util.find_spec(name) is None]


def clocks(device: torch.device) -> str:
    """Current clocks of multiprocessors and memory, as nvidia-smi words them; "" without it."""
    return _nvidia_smi("clocks.sm,clocks.mem", device).replace(", ", " / ")


def describe(device: torch.device) -> dict[str, object]:
    """Everything worth knowing about machine and software, ready for JSON."""
    record: dict[str, object] = dict(asdict(stamp(device)))
    record |= {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": os.cpu_count(),
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": _compiler_version(),
        "packages": {name: version_of(name) for name in DISTRIBUTIONS},
        "missing": missing_packages(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": cache_bytes(device),
            "clocks_max": _nvidia_smi("clocks.max.sm,clocks.max.mem", device).replace(", ", " / "),
        }
    return record
