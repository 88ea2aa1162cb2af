"""Graphs are kept as far as memory goes, and no further."""

from __future__ import annotations

import pytest
import torch

from nostalgia.curvature import GGNOperator, HessianOperator, retention
from nostalgia.curvature.retention import GraphCache, free_bytes
from tests.unit.curvature.networks import batches, forward_fn, loss_fn, mlp, vectors

CPU = torch.device("cpu")


def graph_of(numbers: int) -> torch.Tensor:
    """A graph that saves one tensor of float64 ``numbers`` (its own result)."""
    return torch.ones(numbers, dtype=torch.float64, requires_grad=True).exp()


def test_keeps_what_fits_and_rebuilds_the_rest(monkeypatch):
    monkeypatch.setattr(retention, "free_bytes", lambda device: int(20_000 / retention.SHARE))
    cache, built = GraphCache("auto", CPU), []

    def build(index, numbers):
        built.append(index)
        return graph_of(numbers)

    sizes = [1000, 2000, 1000, 500]  # 8, 16, 8 and 4 kB in a budget of 20 kB
    for _ in range(2):
        kept = [cache.get(i, lambda i=i, n=n: build(i, n))[1] for i, n in enumerate(sizes)]
        assert kept == [True, False, True, True]
    assert built == [0, 1, 2, 3, 1]
    assert cache.bytes == 20_000
    assert len(cache) == 3


def test_shared_tensors_are_not_counted():
    weight = torch.ones(1000, 10, dtype=torch.float64, requires_grad=True)
    sizes = []
    for shared in ([], [weight]):
        cache = GraphCache("auto", CPU)
        cache.share(shared)
        cache.get(0, lambda: torch.ones(1, 1000, dtype=torch.float64, requires_grad=True) @ weight)
        sizes.append(cache.bytes)
    assert sizes == [88_000, 8_000]


def test_policies():
    always, never = GraphCache(True, CPU), GraphCache(False, CPU)
    assert always.get(0, lambda: graph_of(10))[1]
    assert not never.get(0, lambda: graph_of(10))[1]
    assert (len(always), len(never)) == (1, 0)
    always.clear()
    assert len(always) == 0


@pytest.mark.parametrize(("make", "function"), [(HessianOperator, loss_fn), (GGNOperator, forward_fn)])
def test_an_operator_says_how_many_it_keeps(monkeypatch, make, function):
    model, data = mlp(), batches("mlp", (5, 5, 5, 5))
    whole = make(model, function, data)
    v = next(vectors(43))
    expected = whole.matvec(v)
    assert whole.retained == 4
    monkeypatch.setattr(retention, "free_bytes", lambda device: whole._graphs.bytes)  # half of which may be used
    partly = make(model, function, data)
    for _ in range(2):
        torch.testing.assert_close(partly.matvec(v), expected, rtol=1e-14, atol=1e-16)
        assert partly.retained == 2
    partly.refresh()
    assert partly.retained == 0


def test_free_memory_is_shared_by_the_machine_s_ranks(monkeypatch):
    monkeypatch.setattr(retention.psutil, "virtual_memory", lambda: type("M", (), {"available": 8000}))
    monkeypatch.setattr(retention, "_container_free", lambda: 6000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_bytes(CPU) == 6000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == 1500


def test_a_container_s_limit_counts(tmp_path):
    assert retention._container_free(tmp_path) == 1 << 62  # no container
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert retention._container_free(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert retention._container_free(tmp_path) == 1 << 62
