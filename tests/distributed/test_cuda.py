"""Two gloo ranks that share one card: what the other tests hold on the CPU, on CUDA tensors."""

from __future__ import annotations

import os

import pytest
import torch

from tests.distributed import cases_device
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def test_two_ranks_on_one_card_equal_the_dense_matrices_of_the_cpu() -> None:
    one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    for errors in run_ranks(cases_device.check_all, 2, environment=one, device="cuda"):
        assert len(errors) == 3 * 2 * 4 + 2 * 3
        for what, error in errors.items():
            assert error <= (1e-8 if "eigenvalues" in what else 1e-10), what
