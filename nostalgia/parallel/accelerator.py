"""Starts Accelerate the one way this project uses it: DDP or FSDP2, on GPUs or on CPU with gloo.

What the launcher decides (number of ranks, FSDP or not) is read from its environment; what the configuration
decides (device, precision, time limit of a collective) comes in as plain values.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from accelerate.utils.environment import parse_flag_from_env
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from nostalgia.errors import UsageError
from nostalgia.linalg.precision import set_float32_products

MIXED_PRECISION = {"64": "no", "32": "no", "tf32": "no", "bf16": "bf16", "16": "fp16"}


@dataclass(frozen=True)
class LaunchInfo:
    """What the launcher gave, read before any process group exists."""

    rank: int
    world_size: int
    device_type: str  # "cuda" or "cpu"
    fsdp: bool


def launch_info(accelerator: str = "auto") -> LaunchInfo:
    """Read rank, world size, device and strategy from the launcher's environment.

    ``accelerator`` is ``auto``, ``cpu`` or ``gpu``; raises UsageError for ``gpu`` without a CUDA device.
    """
    cpu = accelerator == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if accelerator == "gpu" and cpu:
        raise UsageError(
            "train.accelerator=gpu: no CUDA device is visible here (or ACCELERATE_USE_CPU is set); "
            "use train.accelerator=auto or cpu"
        )
    return LaunchInfo(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        device_type="cpu" if cpu else "cuda",
        fsdp=parse_flag_from_env("ACCELERATE_USE_FSDP"),
    )


def make_accelerator(launch: LaunchInfo, precision: str, timeout_minutes: float = 30.0) -> Accelerator:
    """Accelerator for this rank.

    ``precision``: ``64``, ``32``, ``tf32`` (float32 with TF32 matrix products), ``bf16`` or ``16`` (float16 with a
    gradient scaler). Gradients are averaged over ranks by DDP or FSDP2; accumulation is the training step's own.
    Raises UsageError for FSDP2 ranks that share a GPU, or that are to leave GPUs alone which they see.
    """
    cpu = launch.device_type == "cpu"
    if cpu and launch.fsdp and torch.cuda.is_available():
        raise UsageError(
            "FSDP with train.accelerator=cpu where a GPU is visible: its shards would go to the GPU; hide it "
            "(CUDA_VISIBLE_DEVICES=), or leave train.accelerator=auto"
        )
    if cpu:
        # Accelerate only forms a CPU group when this says so, whatever launched the process.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:  # what cuBLAS asks for with experiment.deterministic, before it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_float32_products(tf32=precision == "tf32")
    shared_card = not cpu and _ranks_share_a_card()
    if shared_card and launch.fsdp:
        raise UsageError(
            f"FSDP with {os.environ['LOCAL_WORLD_SIZE']} processes on {torch.cuda.device_count()} GPUs: needs a GPU for each "
            "(gloo, which serves processes that share one, crashes under FSDP); start fewer, or use launch/ddp.sh"
        )
    plugin = _fsdp_plugin(precision) if launch.fsdp else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=MIXED_PRECISION[precision],
            fsdp_plugin=plugin,
            kwargs_handlers=[
                _process_group(timedelta(minutes=timeout_minutes), shared_card),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
    if shared_card:
        # Accelerate gives DDP the local rank as the card's number, also where it put several ranks on one card.
        PartialState._shared_state["local_process_index"] = accelerator.device.index
    if plugin is not None and cpu:
        enable_fsdp_on_cpu(plugin)
    return accelerator


def ranks_note(accelerator: Accelerator) -> str:
    """A line where GPUs talk by gloo, as they do where processes share one; else empty."""
    if accelerator.device.type != "cuda" or accelerator.num_processes == 1 or torch.distributed.get_backend() == "nccl":
        return ""
    return (
        f"{accelerator.num_processes} processes see {torch.cuda.device_count()} GPU: they talk by gloo, slower than NCCL; "
        "where each has a GPU of its own, let all see all of the machine's (CUDA_VISIBLE_DEVICES)"
    )


def _ranks_share_a_card() -> bool:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()


def _process_group(timeout: timedelta, shared_card: bool) -> InitProcessGroupKwargs:
    """gloo where ranks share a card, which NCCL refuses; a restarted job's group is kept apart from the one before it.

    torchrun's store outlives a restart (torch 2.14): a new rank would find the addresses of dead ones in it, and the
    failure watch an old failure.
    """
    backend = {"backend": "gloo"} if shared_card else {}
    handler = InitProcessGroupKwargs(timeout=timeout, **backend)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0":
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        group = {"store": PrefixStore(f"attempt{attempt}", store), "rank": rank, "world_size": world_size}
        # Accelerate takes this very class only, which has no field for a store.
        handler.to_kwargs = lambda: {"timeout": timeout, **backend, **group}
    return handler


def enable_fsdp_on_cpu(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let Accelerate's FSDP2 path run on CPU with gloo, which it offers for accelerators only.

    ``prepare``, ``backward``, ``no_sync`` and clipping then take the very code path GPUs take.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def _fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 whatever version the launcher names: FSDP1's flat parameters have no per-parameter shards."""
    dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision)
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        mixed_precision_policy=policy,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )


def wrap_by_layer(accelerator: Accelerator, backbone: nn.Module) -> None:
    """Tell FSDP2 which layers of ``backbone`` are units of their own: its transformer blocks, where it has any."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    layers = _layer_classes(backbone)
    plugin.transformer_cls_names_to_wrap = layers
    plugin.auto_wrap_policy = plugin.auto_wrap_policy if layers else None


def _layer_classes(model: nn.Module) -> list[str]:
    """Class names of the layers that the model's library says must not be split."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return sorted(names & {type(module).__name__ for module in model.modules()})


def unsplit_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that FSDP2 gathers one at a time."""
    names = _layer_classes(model)
    return [module for module in model.modules() if type(module).__name__ in names]


def strategy(accelerator: Accelerator) -> str:
    """The distribution strategy in one word: ``single``, ``ddp`` or ``fsdp2``."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"
