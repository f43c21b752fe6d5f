"""One memory budget for the whole stack, from the memory this process may use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from metrics_pipeline.settings import Settings

MIB = 2**20
GIB = 2**30

POSTGRES_REFERENCE = 32 * GIB
"""The original's PostgreSQL settings are for a machine of this size or more; smaller ones get them in proportion."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How memory is shared out.

    Attributes:
        total: bytes the stack may use.
        source: where the figure comes from, for `doctor`.
        broker_heap: bytes of each broker's JVM heap.
        connect_heap: bytes of each Connect worker's JVM heap.
        postgres: PostgreSQL's memory settings by name.
    """

    total: int
    source: str
    broker_heap: int
    connect_heap: int
    postgres: dict[str, str]

    @classmethod
    def of(cls, settings: Settings) -> Budget:
        """The budget for this process, or for `PIPELINE_MEMORY_GB`."""
        total, source = memory_limit()
        if settings.pipeline_memory_gb:
            total, source = int(settings.pipeline_memory_gb * GIB), "PIPELINE_MEMORY_GB"
        return cls.from_total(total, source, settings.kafka_brokers, settings.connect_workers)

    @classmethod
    def from_total(cls, total: int, source: str, brokers: int = 1, workers: int = 1) -> Budget:
        """Heaps are bounded both ways: below, the JVMs do not start; above, page cache serves better than heap.

        Several brokers or workers share the work of one, and get half as much again between them.
        """
        return cls(
            total=total,
            source=source,
            broker_heap=_heap(total // 16, brokers, least=320 * MIB, most=GIB),
            connect_heap=_heap(total // 8, workers, least=512 * MIB, most=2 * GIB),
            postgres=postgres_memory(total),
        )


def _heap(share: int, processes: int, *, least: int, most: int) -> int:
    """Each one's heap. `least` is for the work of one process alone; a part of it needs three quarters of that."""
    if processes == 1:
        return min(max(share, least), most)
    return min(max(share * 3 // (2 * processes), least * 3 // 4), most)


def postgres_memory(total: int) -> dict[str, str]:
    """PostgreSQL's settings for a machine of `total` bytes: the 32 GiB values, scaled down in proportion."""
    share = min(total, POSTGRES_REFERENCE) / POSTGRES_REFERENCE

    def mib(reference: int, least: int) -> str:
        return f"{max(int(reference * share) // MIB, least)}MB"

    return {
        "shared_buffers": mib(8 * GIB, 128),
        "wal_buffers": mib(64 * MIB, 8),
        "max_wal_size": mib(4 * GIB, 1024),
        "effective_cache_size": mib(24 * GIB, 256),
        "work_mem": mib(64 * MIB, 4),
        "maintenance_work_mem": mib(2 * GIB, 64),
        "checkpoint_completion_target": "0.9",
    }


def memory_limit(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes this process may use, and what sets that limit: the machine, or the tightest of its cgroups.

    Args:
        root: where `proc` and `sys` are mounted.
    """
    physical = psutil.virtual_memory().total
    limits = [(physical, "physical memory")]
    limits += [(limit, f"cgroup limit ({path})") for path, limit in _cgroup_limits(root)]
    return min(limits)


def _cgroup_limits(root: Path) -> list[tuple[Path, int]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: the limit of any ancestor binds too
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        for candidate in (folder, *folder.parents):
            if candidate == base.parent:
                break
            try:
                text = (candidate / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit() and int(text) < 2**62:  # version 1 writes a huge number for "none"
                limits.append((candidate / name, int(text)))
    return limits
