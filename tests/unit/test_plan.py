"""``nostalgia.plan``: what it counts of a network, and what it refuses."""

from __future__ import annotations

import shlex

import pytest
from accelerate import Accelerator
from torch import Tensor, nn

from nostalgia import plan
from nostalgia.config import parse
from nostalgia.curvature.layer_sides import layer_sides
from nostalgia.errors import UsageError
from nostalgia.experiment.components import build_components
from nostalgia.experiment.method_choice import complete_method
from nostalgia.experiment.scale import forward_cost, load_of
from nostalgia.models import Backbone, attach_lora, build_backbone

WIDTH, INNER, LAYERS, SIDE, PATCH = 32, 64, 2, 16, 4


def vit() -> Backbone:
    config = {
        "model_type": "vit", "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "patch_size": PATCH, "image_size": SIDE,
    }  # fmt: skip
    return build_backbone(framework="hf", pretrained=False, config=config, image_size=SIDE)


def test_operations_are_those_of_the_matrices() -> None:
    patches = (SIDE // PATCH) ** 2
    tokens = patches + 1
    layer = 2 * tokens * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * tokens**2 * WIDTH
    flops, kept = forward_cost(vit(), SIDE)
    assert flops == LAYERS * layer + 2 * patches * WIDTH * 3 * PATCH**2
    inputs = LAYERS * tokens * (6 * WIDTH + INNER)  # at least: of q, k, v; of the projections; of both layers within
    assert inputs <= kept <= 5 * inputs


def test_operations_of_torch_s_own_attention_are_counted() -> None:
    """Torchvision's ViT has it: in evaluation mode one fused operator, of which nothing is known from outside."""

    class Attention(nn.MultiheadAttention):
        def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
            tokens = images.flatten(2).transpose(1, 2).repeat(1, 1, WIDTH)[..., :WIDTH]
            return super().forward(tokens, tokens, tokens, need_weights=False)[0]

    tokens = SIDE**2
    flops, _ = forward_cost(Attention(WIDTH, 2, batch_first=True), SIDE)  # type: ignore[arg-type]
    assert flops == 2 * tokens * 4 * WIDTH**2 + 4 * tokens**2 * WIDTH


def test_factors_are_those_of_the_layers_in_scope() -> None:
    whole, adapted = vit(), vit()
    attach_lora(adapted, r=3, alpha=3, dropout=0.0, target_modules=["q_proj", "fc1"])
    scope = {name: p.shape for name, p in adapted.named_parameters() if p.requires_grad}
    assert sorted(layer_sides(adapted, scope)) == sorted([(WIDTH, WIDTH, 3), (INNER, WIDTH, 3)] * LAYERS)
    sides = layer_sides(whole, {name: p.shape for name, p in whole.named_parameters()})
    attention, patches = [(WIDTH, WIDTH, 0)] * 4, (WIDTH, 3 * PATCH**2, 0)
    expected = [*(LAYERS * [*attention, (INNER, WIDTH, 0), (WIDTH, INNER, 0)]), patches]
    assert [side for side in sorted(sides) if side != (WIDTH, WIDTH, 0)] == sorted(
        side for side in expected if side != (WIDTH, WIDTH, 0)
    )
    assert len(sides) >= len(expected)  # and the pooler, where there is one


@pytest.mark.parametrize("method", ["finetune", "nostalgia", "kronecker", "ewc", "joint"])
def test_a_run_s_load(method: str) -> None:
    words = ["--suite", "demo", f"method={method}", "train.epochs=2", "curvature.last_task=false"]
    config = parse(words).config
    complete_method(config)
    run = build_components(config, Accelerator(cpu=True), "32")
    load = load_of(run, "32")
    assert load_of(run, "bf16").activation_bytes == load.activation_bytes // 2
    assert sum(load.images) == 2 * sum(len(task.train) for task in run.tasks)
    assert load.scope == run.space.size
    assert (load.top_k > 0, load.factor_terms > 0) == {
        "nostalgia": (True, True), "kronecker": (False, True),
    }.get(method, (False, False))  # fmt: skip
    assert load.curved == (0 if method == "joint" else 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "3", "--nodes", "2"], "--gpus 3 --nodes 2: allowed is a whole number of GPUs a node"),
        (["--gpus", "0"], "--gpus 0"),
        (["--tflops", "-1"], "--tflops -1: allowed is a number above 0"),
        (["--strategy", "zero"], "--strategy"),
        (["train.epoch=3"], "did you mean train.epochs"),
        (["--gpu", "8"], "--gpu"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan.parse(["--suite", "demo", *words])


@pytest.mark.parametrize(("given", "planned"), [(None, "bf16"), ("16", "16"), ("32", "32")])
def test_the_precision_is_that_of_the_gpus(given: str | None, planned: str) -> None:
    """The network is built on the CPU, which has no float16, and would take float32 by itself."""
    request = plan.parse(["--suite", "demo", *([f"train.precision={given}"] if given else [])])
    assert (request.precision, request.config.train.precision) == (planned, "32")


def test_the_examples_of_its_help_can_be_given() -> None:
    lines = plan.EPILOG.replace("\\\n", " ").splitlines()
    examples = [line.split("-m nostalgia.plan")[1] for line in lines if "-m nostalgia.plan" in line]
    assert len(examples) == 3
    wide = [plan.parse(shlex.split(example)) for example in examples][-1]
    assert wide.config.model.config["intermediate_size"] == 6144
