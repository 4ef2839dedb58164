"""What every result file says about where it was made."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path


def machine() -> dict:
    """CPU, cores, memory, GPU, versions and command, as plain JSON values."""
    import psutil
    import torch

    from fastsmc.vllm.attend_costs import device_name
    from fastsmc.vllm.compat import vllm_version

    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm_version(),
        "preload": [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path],
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
