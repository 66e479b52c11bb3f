"""The memory plan and the probe of the machine."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexad.config import BLOCK_TOKENS, EngineConfig
from hexad.errors import ConfigError, InsufficientMemoryError
from hexad.placement import Plan, cpu_count, free_memory, plan, probe, thread_cpus

MIB, GIB = 2**20, 2**30


def plan_of(*, free: int = 8 * GIB, context: int = 2048, **changes: Any) -> Plan:
    return plan(
        weight_bytes=100 * MIB,
        kv_bytes_per_block=MIB,
        workspace_bytes=10 * MIB,
        config=EngineConfig(**changes),
        context_length=context,
        free_bytes=free,
    )


def test_the_default_has_room_for_eight_full_sequences() -> None:
    found = plan_of()
    assert found.max_model_len == 2048
    assert found.kv_blocks == 8 * 64
    assert found.kv_bytes == 512 * MIB
    assert found.total == (100 + 10 + 512) * MIB
    assert found.free == 8 * GIB


def test_fewer_sequences_or_a_shorter_context_take_less() -> None:
    assert plan_of(max_num_seqs=2).kv_blocks == 2 * 64
    assert plan_of(max_model_len=100).kv_blocks == 8 * 4
    assert plan_of(max_model_len=100).max_model_len == 100
    assert plan_of(context=1).kv_blocks == 8


def test_the_default_takes_a_quarter_at_most_but_one_sequence_at_least() -> None:
    assert plan_of(free=(110 + 1000) * MIB).kv_blocks == 250
    assert plan_of(free=(110 + 100) * MIB).kv_blocks == 64
    assert plan_of(free=(110 + 64) * MIB).kv_blocks == 64


def test_the_cache_asked_for_is_the_cache_made() -> None:
    assert plan_of(kv_cache_gib=0.5).kv_blocks == 512
    assert plan_of(kv_cache_gib=4).kv_blocks == 4096
    assert plan_of(kv_cache_gib=64 / 1024).kv_blocks == 64
    assert plan_of(kv_cache_tokens=2048).kv_blocks == 64
    assert plan_of(kv_cache_tokens=2049).kv_blocks == 65
    assert plan_of(kv_cache_tokens=100_000).kv_bytes == 3125 * MIB


def test_a_cache_asked_for_may_take_more_than_a_quarter() -> None:
    assert plan_of(free=110 * MIB + GIB).kv_blocks == 256
    assert plan_of(free=110 * MIB + GIB, kv_cache_tokens=1024 * 32).kv_blocks == 1024
    assert plan_of(free=110 * MIB + GIB, kv_cache_gib=1).kv_blocks == 1024


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        InsufficientMemoryError, match=r"weights 100\.0 MiB and workspace 10\.0 MiB.*50\.0 MiB"
    ):
        plan_of(free=50 * MIB)
    with pytest.raises(
        InsufficientMemoryError,
        match=r"63 of at least 64 blocks \(needs 64\.0 MiB, 63\.0 MiB.*at most 2016\.",
    ):
        plan_of(free=(110 + 63) * MIB)
    with pytest.raises(InsufficientMemoryError, match=r"0 of at least 64 blocks.*Choose a smaller model"):
        plan_of(free=110 * MIB)
    with pytest.raises(
        InsufficientMemoryError,
        match=r"1024 of at least 2048 .*needs 2\.00 GiB, 1\.00 GiB.* 32768 instead of kv_cache_gib=2\.",
    ):
        plan_of(free=110 * MIB + GIB, kv_cache_gib=2)
    with pytest.raises(
        InsufficientMemoryError,
        match=r"1024 of at least 1025 blocks.* at most 32768 instead of kv_cache_tokens=32769\.",
    ):
        plan_of(free=110 * MIB + GIB, kv_cache_tokens=32769)
    with pytest.raises(InsufficientMemoryError, match=r"at most 2016 and drop kv_cache_tokens=4000\."):
        plan_of(free=(110 + 63) * MIB, kv_cache_tokens=4000)


def test_the_advice_works() -> None:
    free = (110 + 63) * MIB
    assert plan_of(free=free, max_model_len=2016).kv_blocks == 63
    assert plan_of(free=110 * MIB + GIB, kv_cache_tokens=32768).kv_bytes == GIB


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len 2049 is longer than .* 2048 tokens"):
        plan_of(max_model_len=2049)
    with pytest.raises(
        ConfigError,
        match=r"kv_cache_gib=0\.01 holds 320 tokens; .* needs 2048 \(64\.0 MiB\)\. Raise kv_cache_gib or",
    ):
        plan_of(kv_cache_gib=0.01)
    with pytest.raises(ConfigError, match="holds 0 tokens"):
        plan_of(kv_cache_gib=1e-9)
    with pytest.raises(
        ConfigError, match=r"kv_cache_tokens=2016 holds 2016 tokens.* Raise kv_cache_tokens or"
    ):
        plan_of(kv_cache_tokens=2016)


def test_a_plan_reads_well_and_stays_as_it_is() -> None:
    found = plan_of()
    assert str(found).splitlines() == [
        "weights     100.0 MiB",
        "KV cache    512.0 MiB  16,384 tokens, at most 2,048 a sequence",
        "workspace    10.0 MiB",
        "total       622.0 MiB  of 8.00 GiB free",
    ]
    with pytest.raises(FrozenInstanceError):
        found.kv_blocks = 1  # type: ignore[misc]


@given(
    weights=st.integers(0, 10**12),
    block=st.integers(1, 10**9),
    workspace=st.integers(0, 10**9),
    context=st.integers(1, 10**6),
    free=st.integers(0, 10**12),
    seqs=st.integers(1, 512),
    cache=st.just({})
    | st.fixed_dictionaries({"kv_cache_gib": st.floats(1e-6, 1000)})
    | st.fixed_dictionaries({"kv_cache_tokens": st.integers(1, 10**8)}),
)
def test_a_plan_fits_and_holds_a_sequence_or_is_refused(
    weights: int, block: int, workspace: int, context: int, free: int, seqs: int, cache: dict[str, Any]
) -> None:
    config = EngineConfig(max_num_seqs=seqs, **cache)
    need = weights + workspace + block * -(-context // BLOCK_TOKENS)
    try:
        found = plan(
            weight_bytes=weights, kv_bytes_per_block=block, workspace_bytes=workspace,
            config=config, context_length=context, free_bytes=free,
        )  # fmt: skip
    except (InsufficientMemoryError, ConfigError):
        assert need > free or cache
        return
    assert need <= found.total <= free
    assert found.kv_blocks * BLOCK_TOKENS >= context
    assert found.kv_bytes == found.kv_blocks * block
    if "kv_cache_gib" in cache:
        assert found.kv_bytes <= cache["kv_cache_gib"] * GIB < found.kv_bytes + block
    elif cache:
        assert 0 <= found.kv_blocks * BLOCK_TOKENS - cache["kv_cache_tokens"] < BLOCK_TOKENS
    else:
        one = -(-context // BLOCK_TOKENS)
        left = free - weights - workspace
        assert found.kv_blocks == one or found.kv_bytes * 4 <= left
        assert found.kv_blocks <= min(seqs, 8) * one


# The machine.


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/a/b\n4:memory:/a/b\n3:cpuset:/\n"}


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2),
        (V2 | {"sys/fs/cgroup/a/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.max": "300000 100000"}, 2),
        (V2 | {"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "garbage"}, 8),
        ({"proc/self/cgroup": "0::/../elsewhere\n", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cpus_are_bounded_by_the_cgroup(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    assert cpu_count(machine(tmp_path, files)) == cpus


def nodes(root: Path, *lists: str) -> Path:
    for number, cpus in enumerate(lists):
        file = root / f"sys/devices/system/node/node{number}/cpulist"
        file.parent.mkdir(parents=True)
        file.write_text(cpus)
    return root


def test_threads_belong_to_memory_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = [0, 1, 2, 8, 9, 10], [4, 5, 6]
    # Number 3 is not allowed, node 2 has memory only, and node 10 comes after the others.
    root = nodes(tmp_path, "0-3,8-10\n", "4-6\n", "\n", *["50\n"] * 7, "60\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*first, *second, 60}, raising=False)
    assert thread_cpus(10, root) == [first] * 6 + [second] * 3 + [[60]]
    assert thread_cpus(5, root) == [first] * 3 + [second] * 2
    assert thread_cpus(1, root) == [first]


@pytest.mark.parametrize("lists", [(), ("0-7\n",), ("0-3\n", "8-15\n"), ("nonsense\n", "\n")])
def test_threads_of_one_node_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: tuple[str, ...]
) -> None:
    root = nodes(tmp_path, *lists)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert thread_cpus(2, root) == []
    monkeypatch.delattr(os, "sched_getaffinity")
    assert thread_cpus(2, root) == []


def test_cpus_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_count(tmp_path) == 1


MEMINFO = {"proc/meminfo": "MemTotal:       8000 kB\nMemFree:  1 kB\nMemAvailable:   4000 kB\n"}
KIB = 1024


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, 4000 * KIB),
        (
            MEMINFO | V2 | {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/b/memory.current": "5"},
            4000 * KIB,
        ),
        (
            MEMINFO
            | V2
            | {
                "sys/fs/cgroup/a/b/memory.max": str(3000 * KIB),
                "sys/fs/cgroup/a/b/memory.current": str(2500 * KIB),
                "sys/fs/cgroup/a/b/memory.stat": f"a 7\ninactive_file {300 * KIB}\nactive_file {200 * KIB}",
            },
            1000 * KIB,
        ),
        (
            MEMINFO
            | V2
            | {"sys/fs/cgroup/a/memory.max": str(KIB), "sys/fs/cgroup/a/memory.current": str(2 * KIB)},
            0,
        ),
        (
            MEMINFO
            | V1
            | {
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": str(3000 * KIB),
                "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": str(2500 * KIB),
                "sys/fs/cgroup/memory/a/b/memory.stat": (
                    f"inactive_file 1\nactive_file 1\ntotal_inactive_file {100 * KIB}\ntotal_active_file 0\n"
                ),
            },
            600 * KIB,
        ),
        (
            MEMINFO
            | V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
            },
            4000 * KIB,
        ),
    ],
)
def test_memory_is_bounded_by_the_cgroup(tmp_path: Path, files: dict[str, str], free: int) -> None:
    assert free_memory(machine(tmp_path, files)) == free


def test_memory_without_proc(tmp_path: Path) -> None:
    assert 0 < free_memory(tmp_path) < 2**63


def test_this_machine() -> None:
    found = probe()
    assert 1 <= found.cpus <= (os.cpu_count() or 1)
    assert 0 < found.free_bytes < 2**63
    assert found.bandwidth is None
    assert found.int8_rate is None
