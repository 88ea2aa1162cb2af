"""What the other tests hold on the CPU, on CUDA tensors: one process, and two gloo ranks that share one card."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from tests.distributed import cases_device
from tests.faults.soak import Soak
from tests.faults.test_methods import METHODS, SHORT
from tests.ranks import run_ranks, run_train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
ONE_CARD = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "ACCELERATE_USE_CPU": "false",
}


def test_two_ranks_on_one_card_equal_the_dense_matrices_of_the_cpu() -> None:
    # gloo has no FSDP2 on CUDA tensors.
    for errors in run_ranks(cases_device.check_all, 2, environment=ONE_CARD, device="cuda", wraps=["ddp"]):
        assert len(errors) == 3 * 4 + 3
        for what, error in errors.items():
            assert error <= (1e-8 if "eigenvalues" in what else 1e-10), what


def test_a_checkpoint_s_tensors_reach_ranks_whose_group_takes_none_on_the_cpu() -> None:
    assert run_ranks(cases_device.restore_on_cuda_alone, 2, environment=ONE_CARD) == [[3.0, 1.0, 2.0]] * 2


def test_fsdp_ranks_that_share_a_card_are_refused() -> None:
    fsdp = {**ONE_CARD, "ACCELERATE_USE_FSDP": "true"}
    done = run_train(["--suite", "demo", "train.accelerator=gpu"], world_size=2, environment=fsdp)
    assert done.codes == [2, 2]
    assert "needs a GPU for each" in done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["kronecker", "nostalgia", "gpm", "er"])
def test_each_method_runs_in_bf16(tmp_path: Path, name: str) -> None:
    words = ["--suite", "demo", f"method={name}", *METHODS[name], *SHORT, "train.max_steps_per_epoch=4", "--quiet"]
    words += ["train.accelerator=gpu", "train.precision=bf16", "curvature.num_samples=32", "nostalgia.top_k=4"]
    done = run_train([*words, "--run-dir", str(tmp_path / "run")], environment=ONE_CARD)
    assert done.codes == [0], done.stderr


@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("network", [(), ("model=resnet18", "model.pretrained=false")], ids=["vit", "batch_norm"])
def test_one_card_begins_and_two_go_on(tmp_path: Path, network: tuple[str, ...]) -> None:
    """Over NCCL, where batch norms are synchronised."""
    words = ["method=kronecker", *METHODS["kronecker"], *SHORT, "train.accelerator=gpu", *network]
    two_cards = {**ONE_CARD, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
    codes = Soak(tmp_path, "single", 1, words, ONE_CARD).launch(tmp_path / "run", kill=(0, 60)).wait().codes
    assert codes == [-signal.SIGKILL]
    done = Soak(tmp_path, "ddp", 1, words, two_cards).launch(tmp_path / "run").wait()
    assert done.codes == [0, 0], done.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["single", "ddp"])
@pytest.mark.parametrize("name", ["kronecker", "nostalgia"])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path, way: str, name: str) -> None:
    words = [f"method={name}", *METHODS[name], *SHORT, "train.accelerator=gpu", "experiment.deterministic=true"]
    soak = Soak(tmp_path, way, seed=1, words=words, environment=ONE_CARD)
    soak.most_events = 120
    soak.kills(1)
    assert not soak.problems
