"""The vector space in one process, and the layouts of any number of ranks as arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nostalgia.errors import UsageError
from nostalgia.linalg.layout import Layout
from nostalgia.linalg.precision import full_precision_matmul
from nostalgia.linalg.vector_space import CHUNK, VectorSpace
from tests.unit.linalg.operators import shapes_of

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES, world_size=st.integers(1, 7), placement=st.sampled_from(["sliced", "sharded"]))
def test_every_number_is_held_once(shapes, world_size, placement):
    layout = Layout([torch.Size(shape) for shape in shapes], placement, world_size)
    held = [i for rank in range(world_size) for low, high in layout.flat_ranges(rank) for i in range(low, high)]
    assert sorted(held) == list(range(layout.size))
    assert sum(layout.local_sizes) == layout.size
    assert layout.padded == max(layout.local_sizes)


@settings(max_examples=100, deadline=None)
@given(shapes=SHAPES, world_size=st.integers(1, 7), placement=st.sampled_from(["sliced", "sharded"]))
def test_buffers_of_collectives_hold_each_rank_s_part(shapes, world_size, placement):
    layout = Layout([torch.Size(shape) for shape in shapes], placement, world_size)
    whole = torch.arange(1.0, layout.size + 1)
    buffer = torch.zeros(world_size, layout.padded)
    layout.spread(whole.split(layout.numels), buffer)
    assert torch.equal(layout.collect(buffer), whole)
    for rank, row in enumerate(buffer):
        own = torch.cat([whole[:0], *(whole[low:high] for low, high in layout.flat_ranges(rank))])
        assert torch.equal(layout.narrowed(row, rank), own)
        assert torch.equal(layout.widened(own, rank), row)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shards_are_those_of_torch_chunk(rows, world_size):
    layout = Layout([torch.Size([rows, 3])], "sharded", world_size)
    chunks = list(torch.chunk(torch.arange(rows * 3).view(rows, 3), world_size)) if rows else []
    chunks += [torch.zeros(0)] * (world_size - len(chunks))
    for (interval,), chunk in zip(layout.intervals, chunks, strict=True):
        assert list(range(*interval)) == chunk.flatten().tolist()


def test_inner_products_against_float64():
    parameters = {"w": torch.zeros(3 * CHUNK["cpu"] + 5)}  # several pieces, an incomplete last one
    space = VectorSpace.of(parameters)
    assert (space.placement, space.dtype, space.size) == ("local", torch.float32, 3 * CHUNK["cpu"] + 5)
    x, y = torch.stack([space.randn(i) for i in range(3)]), torch.stack([space.randn(i) for i in (7, 8)])
    expected = x.double() @ y.double().T
    scale = space.size**0.5
    assert space.gram(x, y).dtype == torch.float64
    torch.testing.assert_close(space.gram(x, y) / scale, expected / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(space.gram(x, y, exact=True), expected, atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(space.dot(x[0], y[0]), expected[0, 0], atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(space.norm(x[0]), x[0].double().norm(), rtol=1e-6, atol=0)
    coefficients = torch.randn(2, 3, dtype=torch.float64)
    combined = space.combine(coefficients, x)
    torch.testing.assert_close(combined, (coefficients @ x.double()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(space.axpy(2.0, x[0], x[1]), 2 * x[0] + x[1])
    last = x[2].clone()
    assert space.combine_(coefficients, x).data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, torch.stack([*combined, last]))


def test_low_precision_blocks_are_multiplied_in_float32():
    space = VectorSpace.of({"w": torch.zeros(5000)})
    x = torch.stack([space.randn(1), space.randn(2)]).bfloat16()
    torch.testing.assert_close(space.gram(x, x), x.double() @ x.double().T, rtol=1e-6, atol=1e-3)


def test_products_ignore_low_precision_flags_and_autocast():
    """bfloat16 products on a CPU by torch's flag, or by autocast, are wrong in the third digit."""
    space = VectorSpace.of({"w": torch.zeros(4096)})
    x = torch.stack([space.randn(i) for i in range(32)])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gram, combined = space.gram(x, x), space.combine(torch.eye(32), x)
            assert (torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")) == (
                "medium",
                True,
            )
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(gram, x.double() @ x.double().T, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(combined, x, rtol=1e-6, atol=0)


def test_precision_guard_restores_flags_after_an_error():
    flags = torch.backends.cuda.matmul
    flags.fp32_precision = "tf32"
    try:
        seen = []
        with pytest.raises(RuntimeError, match="inside"), full_precision_matmul("cpu"):
            raise RuntimeError(seen.append(flags.fp32_precision) or "inside")
        assert seen == ["ieee"]
        assert flags.fp32_precision == "tf32"
    finally:
        flags.fp32_precision = "none"


def test_random_vectors_are_fixed_by_the_seed():
    space = VectorSpace.of(shapes_of(5000))
    a = space.randn(3)
    assert a.shape == (5000,)
    assert torch.equal(a, space.randn(3))
    assert not torch.equal(a, space.randn(4))
    assert not torch.equal(a, space.randn(3 + (1 << 32)))  # all of the seed counts
    assert abs(float(a.mean())) < 0.06
    assert abs(float(a.std()) - 1) < 0.05
    signs = space.rademacher(3)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_to_vector_and_back(dtype):
    parameters = shapes_of(20)
    space = VectorSpace.of(parameters, dtype=dtype)
    x = space.randn(0)
    assert x.dtype == dtype
    whole = space.gather(x)
    assert [t.shape for t in whole] == [t.shape for t in parameters.values()]
    assert torch.equal(space.take(whole), x)
    assert torch.equal(space.scatter(whole), x)
    space.put(x, parameters.values())
    assert torch.equal(space.take(parameters.values()), x.float().to(dtype))
    block = torch.stack([x, 2 * x])
    assert torch.equal(space.slice_flat(space.gather_flat(block)), block)
    assert (space.traffic.large, space.traffic.small, space.traffic.bytes) == (0, 0, 0)


def test_take_is_a_copy_also_of_one_parameter():
    parameter = torch.zeros(4)
    taken = VectorSpace.of({"w": parameter}).take([parameter])
    taken += 1
    assert torch.equal(parameter, torch.zeros(4))


def test_put_keeps_memory_formats():
    parameter = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    space = VectorSpace.of({"w": parameter})
    x = space.randn(0)
    space.put(x, [parameter])
    assert torch.equal(parameter.flatten(), x)
    assert torch.equal(space.take([parameter]), x)


def test_dtype_follows_parameters():
    assert VectorSpace.of({"w": torch.zeros(2, dtype=torch.bfloat16)}).dtype == torch.float32
    assert VectorSpace.of({"w": torch.zeros(2, dtype=torch.float64)}).dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VectorSpace.of({}), "no parameters"),
        (lambda: VectorSpace.of({"w": torch.zeros(2)}, placement="both"), "placement='both'"),
        (lambda: VectorSpace.of({"w": torch.zeros(2)}, placement="sharded"), "parameter w is not sharded"),
        (lambda: VectorSpace.of({"w": torch.zeros(2)}, dtype=torch.bfloat16), "float32 or torch.float64"),
        (
            lambda: VectorSpace.of({"w": torch.zeros(2)}).take([torch.zeros(3)]),
            r"w: a tensor of shape \(3,\)",
        ),
    ],
)
def test_refusals(build, message):
    with pytest.raises(UsageError, match=message):
        build()
