"""Heads: a function of the seed, grown without losing what they learned, saved and read."""

from __future__ import annotations

import pytest
import torch

from nostalgia.errors import NotFoundError, UsageError
from nostalgia.models import expand_head, load_heads, make_head, save_heads


def test_a_head_is_small_and_depends_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_head(64, 10, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.weight, make_head(64, 10, seed=3).weight)
    assert not torch.equal(first.weight, make_head(64, 10, seed=4).weight)
    assert first.weight.shape == (10, 64)
    assert 0.005 < float(first.weight.detach().std()) < 0.02
    assert not first.bias.any()


def test_a_grown_head_keeps_its_rows():
    head = make_head(8, 3, seed=0).double()
    with torch.no_grad():
        head.bias.fill_(2.0)
    grown = expand_head(head, 5, seed=1)
    assert grown.weight.dtype == torch.float64
    assert torch.equal(grown.weight[:3], head.weight)
    assert torch.equal(grown.bias, torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0]).double())
    assert grown.weight[3:].abs().max() > 0
    assert grown.weight.requires_grad
    with torch.no_grad():
        grown.weight.zero_()
    assert head.weight.abs().max() > 0


def test_a_head_does_not_shrink():
    with pytest.raises(UsageError, match="cannot shrink to 2"):
        expand_head(make_head(8, 3, seed=0), 2, seed=0)
    with pytest.raises(UsageError, match="0 classes"):
        make_head(8, 0, seed=0)


def test_heads_are_read_as_they_were_saved(tmp_path):
    heads = {"task1_digits": make_head(8, 3, seed=0), "task2_a.b": make_head(8, 2, seed=1)}
    save_heads(heads, tmp_path / "heads.safetensors")
    read = load_heads(tmp_path / "heads.safetensors")
    assert read.keys() == heads.keys()
    x = torch.randn(4, 8)
    for name, head in heads.items():
        assert torch.equal(read[name](x), head(x))
        assert read[name].weight.requires_grad


def test_heads_that_cannot_be_read(tmp_path):
    (tmp_path / "heads.safetensors").write_bytes(b"no heads")
    for file in ("heads.safetensors", "nothing.safetensors"):
        with pytest.raises(NotFoundError, match=file):
            load_heads(tmp_path / file)
