"""What float32 products are computed in: both spellings of torch's flags agree, during and after every change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nostalgia.curvature.context import float32_products
from nostalgia.linalg.precision import full_precision_matmul, set_float32_products


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with float32_products(tf32=False):
        yield


def older_spelling() -> tuple[bool, bool, str]:
    """Each of these raises where the spellings, or convolutions and recurrent networks, disagree."""
    with torch.backends.cudnn.flags(enabled=True):
        pass
    matmul = torch.backends.cuda.matmul.allow_tf32
    return torch.backends.cudnn.allow_tf32, matmul, torch.get_float32_matmul_precision()


@pytest.mark.parametrize("tf32", [True, False])
def test_the_older_spelling_can_be_read(tf32: bool) -> None:
    expected = (tf32, tf32, "high" if tf32 else "highest")
    for before in (not tf32, tf32):
        set_float32_products(tf32=before)
        set_float32_products(tf32=tf32)
        assert older_spelling() == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("product", [True, False])
def test_a_products_precision_ends_with_it(training: bool, product: bool) -> None:
    set_float32_products(tf32=training)
    before = older_spelling()
    with float32_products(tf32=product):
        assert older_spelling()[0] is product
        with full_precision_matmul("cpu"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert older_spelling()[:2] == (product, product)
    assert older_spelling() == before
