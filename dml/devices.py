"""What the system shows of devices, asked without loading anything that uses them."""

import os
import platform
from pathlib import Path


def shows_cuda() -> bool:
    """Whether there is a device that may be a CUDA one; False also where CUDA_VISIBLE_DEVICES hides all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    nodes = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return nodes or platform.system() == "Windows"
