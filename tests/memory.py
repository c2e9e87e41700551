"""The memory of this process, as the attacks and benchmarks tell it, in MB of 1,000,000 bytes."""

from __future__ import annotations

import sys
from pathlib import Path

MB = 1e6


def peak_mb() -> float:
    """Give the most memory that this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss begins with what the parent held, however small the program is
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MB
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / MB if sys.platform == "darwin" else most * 1024 / MB
