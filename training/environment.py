"""What a run ran on and from: source revision, versions, devices."""

import platform
import resource
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "flash-linear-attention",
    "transformers",
    "datasets",
    "sentencepiece",
    "numpy",
)

PEAK_BF16_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s from the vendor's data sheets, by a part of the device's name, the longer name first."""


def describe_environment(topology: dict[str, Any]) -> dict[str, Any]:
    """`environment.json`: git revision and uncommitted diff, package versions, device, topology."""
    root = Path(__file__).resolve().parent.parent
    cuda = torch.cuda.is_available()
    return {
        "git_revision": _git(root, "rev-parse", "HEAD"),
        "git_diff": _git(root, "diff", "HEAD"),
        "git_untracked": (_git(root, "ls-files", "--others", "--exclude-standard") or "").splitlines(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads a rank",
        "cuda": torch.version.cuda,
        "topology": topology,
    }


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, None where it is not tabled: then no utilisation is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_BF16_FLOPS.items() if key in name), None)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: of the GPU, or of the host where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


def _git(root: Path, *arguments: str) -> str | None:
    """Output of a git command, None outside a checkout or where git is missing."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
