"""What the operating system counts of this process and its host. Standard library only; Linux, elsewhere zeros."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import NamedTuple

_THROTTLES = "cpu[0-9]*/thermal_throttle/*_throttle_count"


def involuntary_switches() -> int:
    """Return how often a thread of this process had to leave a processor to somebody else so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def most_bytes() -> int:
    """Return the most host memory that this process has held; a call of the kernel, where reading /proc takes long."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class HostCounts(NamedTuple):
    """What the kernel has counted of all processors since the host was started."""

    ticks: int = 0
    """Of processor time, whoever had it."""
    stolen: int = 0
    """Of these, those that a hypervisor gave to other virtual machines."""
    throttles: int = 0
    """How often a processor was slowed down because it was hot; 0 where the kernel does not tell."""

    def since(self, before: HostCounts) -> HostCounts:
        """Return what was counted since then."""
        return HostCounts(*(now - then for now, then in zip(self, before, strict=True)))


def host_counts() -> HostCounts:
    """Return the counts as they are now; reads a file a processor."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().partition("\n")[0].split()[1:]]
    except (OSError, ValueError):
        fields = []
    throttles = 0
    for file in Path("/sys/devices/system/cpu").glob(_THROTTLES):
        try:
            throttles += int(file.read_text())
        except (OSError, ValueError):
            continue
    # user nice system idle iowait irq softirq steal; guests' time is in that of users.
    return HostCounts(sum(fields[:8]), fields[7] if len(fields) > 7 else 0, throttles)
