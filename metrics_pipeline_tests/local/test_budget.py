"""The memory budget: what a machine of which size gives to whom, and where its size is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from metrics_pipeline.local.budget import GIB, MIB, Budget, memory_limit, postgres_memory
from metrics_pipeline.settings import Settings

DESIGN = {
    "shared_buffers": "8192MB",
    "wal_buffers": "64MB",
    "max_wal_size": "4096MB",
    "effective_cache_size": "24576MB",
    "work_mem": "64MB",
    "maintenance_work_mem": "2048MB",
    "checkpoint_completion_target": "0.9",
}


@pytest.mark.parametrize("total", [32 * GIB, 64 * GIB, 512 * GIB])
def test_from_32_gib_on_postgresql_gets_the_design_values(total: int) -> None:
    assert postgres_memory(total) == DESIGN


def test_half_the_memory_gives_half_of_each() -> None:
    assert postgres_memory(16 * GIB) == {
        "shared_buffers": "4096MB",
        "wal_buffers": "32MB",
        "max_wal_size": "2048MB",
        "effective_cache_size": "12288MB",
        "work_mem": "32MB",
        "maintenance_work_mem": "1024MB",
        "checkpoint_completion_target": "0.9",
    }


def test_a_small_machine_gets_what_postgresql_needs_to_run() -> None:
    assert postgres_memory(GIB // 4) == {
        "shared_buffers": "128MB",
        "wal_buffers": "8MB",
        "max_wal_size": "1024MB",
        "effective_cache_size": "256MB",
        "work_mem": "4MB",
        "maintenance_work_mem": "64MB",
        "checkpoint_completion_target": "0.9",
    }


@pytest.mark.parametrize("gib", [4, 8, 16, 32, 256])
def test_heaps_and_shared_buffers_leave_half_of_the_memory(gib: int) -> None:
    budget = Budget.from_total(gib * GIB, "test")
    buffers = int(budget.postgres["shared_buffers"].removesuffix("MB")) * MIB
    assert budget.broker_heap + budget.connect_heap + buffers <= budget.total / 2
    assert 320 * MIB <= budget.broker_heap <= GIB
    assert 512 * MIB <= budget.connect_heap <= 2 * GIB


@pytest.mark.parametrize("gib", [8, 16, 32, 256])
def test_a_cluster_leaves_a_third_of_the_memory(gib: int) -> None:
    alone, cluster = (Budget.from_total(gib * GIB, "test", brokers, workers) for brokers, workers in ((1, 1), (3, 2)))
    buffers = int(cluster.postgres["shared_buffers"].removesuffix("MB")) * MIB
    assert 3 * cluster.broker_heap + 2 * cluster.connect_heap + buffers <= cluster.total * 2 / 3
    assert cluster.postgres == alone.postgres
    assert 240 * MIB <= cluster.broker_heap <= alone.broker_heap
    assert 384 * MIB <= cluster.connect_heap <= alone.connect_heap


def test_the_heaps_of_one_of_each_are_what_they_were() -> None:
    budget = Budget.of(Settings.load(pipeline_memory_gb=16))
    assert (budget.broker_heap, budget.connect_heap) == (GIB, 2 * GIB)


def test_a_setting_replaces_what_the_machine_has() -> None:
    budget = Budget.of(Settings.load(pipeline_memory_gb=1.5))
    assert (budget.total, budget.source) == (3 * GIB // 2, "PIPELINE_MEMORY_GB")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder of a machine with 64 GiB; `cgroup` says where this process is."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def tree(root: Path, cgroup: str, **limits: str) -> None:
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in limits.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


def test_without_cgroups_the_machine_is_the_limit(machine: Path) -> None:
    assert memory_limit(machine) == (64 * GIB, "physical memory")


def test_version_2_limit(machine: Path) -> None:
    tree(machine, "0::/a/b\n", **{"a/b/memory.max": str(4 * GIB)})
    limit, source = memory_limit(machine)
    assert limit == 4 * GIB
    assert source == f"cgroup limit ({machine}/sys/fs/cgroup/a/b/memory.max)"


def test_version_2_limit_of_a_parent_binds(machine: Path) -> None:
    tree(
        machine,
        "0::/a/b/c\n",
        **{"a/memory.max": str(2 * GIB), "a/b/memory.max": str(4 * GIB), "a/b/c/memory.max": "max"},
    )
    assert memory_limit(machine)[0] == 2 * GIB


def test_version_2_limit_at_the_mount_point_as_containers_see_it(machine: Path) -> None:
    tree(machine, "0::/\n", **{"memory.max": str(3 * GIB)})
    assert memory_limit(machine)[0] == 3 * GIB


def test_version_2_without_a_limit(machine: Path) -> None:
    tree(machine, "0::/a\n", **{"a/memory.max": "max"})
    assert memory_limit(machine) == (64 * GIB, "physical memory")


def test_version_1_limit_of_a_parent_binds_and_its_number_for_none_does_not(machine: Path) -> None:
    none = str(2**63 - 4096)
    tree(
        machine,
        "5:cpu,cpuacct:/x\n4:memory:/a/b\n1:name=systemd:/x\n",
        **{"memory/a/memory.limit_in_bytes": str(5 * GIB), "memory/a/b/memory.limit_in_bytes": none},
    )
    assert memory_limit(machine)[0] == 5 * GIB


def test_version_1_path_that_only_the_host_knows(machine: Path) -> None:
    tree(machine, "4:memory:/docker/0123\n", **{"memory/memory.limit_in_bytes": str(6 * GIB)})
    assert memory_limit(machine)[0] == 6 * GIB


def test_a_limit_above_the_machine_means_nothing(machine: Path) -> None:
    tree(machine, "0::/a\n", **{"a/memory.max": str(512 * GIB)})
    assert memory_limit(machine) == (64 * GIB, "physical memory")


def test_this_machine_has_some() -> None:
    assert memory_limit()[0] > 256 * MIB
