"""Memory of a process."""

import sys

import psutil


def memory_bytes(field: str) -> int:
    """Resident memory of this process: `VmRSS`, what it is now, or `VmHWM`, what it was at most."""
    if sys.platform == "linux":
        # `ru_maxrss` would count what the process that started this one held.
        with open("/proc/self/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) if field == "VmHWM" else memory.rss
