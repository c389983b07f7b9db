"""Where the tools of NVIDIA are that the checks of the kernels use, and where the compiled kernels are.

`make toolchain` installs the first, `make kernels` compiles the second.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "cuda"
PACKAGES = ROOT / ".venv" / "cuda"
TOOLKIT = Path(os.environ.get("FASTMOE_NVCC_ROOT", PACKAGES / "nvidia" / "cu13"))
NVCC = TOOLKIT / "bin" / "nvcc"
NVDISASM = PACKAGES / "nvidia" / "cu13" / "bin" / "nvdisasm"
CUTLASS = PACKAGES / "cutlass_library" / "source" / "include"
IMAGES = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "kernels"


def run(*command: object) -> str:
    """What a command prints; its errors are raised with all it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout
