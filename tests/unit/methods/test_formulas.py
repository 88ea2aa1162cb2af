"""Every method's gradients and steps against its formula written out, and plain fine-tuning at strength 0."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nostalgia.data.transforms import uniform
from nostalgia.methods import Method
from nostalgia.methods.loading import make_method
from nostalgia.models import expand_head
from tests.unit.methods.context import Features, Sequence2, assert_equal


def method(name: str, **options: Any) -> Method:
    return make_method(name, options, seed=0)


def snapshot(run: Sequence2) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.backbone.named_parameters()}


def moved(run: Sequence2) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in run.backbone.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def fisher(run: Sequence2, labels: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean over samples of squared gradients of log p, sample by sample."""
    batches = run.context(method("finetune"), 1).samples(12, 12)
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches:
        for i in range(len(batch)):
            logits = run.heads[0](torch.func.functional_call(run.backbone, parameters, (batch.images[i : i + 1],)))
            target = batch.labels[i]
            if labels == "sampled":
                draw = uniform(0, 0, batch.indices[i : i + 1], 1)
                target = (logits.softmax(1).cumsum(1) < draw).sum()
            own = torch.autograd.grad(F.cross_entropy(logits, target[None]), list(parameters.values()))
            for name, gradient in zip(parameters, own, strict=True):
                sums[name] += gradient.square() / 12
    return sums


def test_l2sp_pulls_to_where_the_run_began() -> None:
    run, l2sp = Sequence2(), method("l2sp", strength=0.7)
    start = snapshot(run)
    run.first_task(l2sp)
    run.begin(l2sp, 2)
    moved(run)
    expected = run.plain_gradients(lambda p: 0.35 * sum((p[n] - start[n]).square().sum() for n in p))
    assert_equal(run.gradients(l2sp), expected)


@pytest.mark.parametrize("labels", ["sampled", "true"])
def test_ewc_weighs_by_the_diagonal_fisher_matrix(labels: str) -> None:
    run, ewc = Sequence2(), method("ewc", strength=5, labels=labels, num_samples=12)
    run.first_task(ewc)
    end = {name: p.detach().clone().requires_grad_() for name, p in run.backbone.named_parameters()}
    weights = fisher(run, labels, end)
    run.begin(ewc, 2)
    moved(run)
    expected = run.plain_gradients(lambda p: 2.5 * sum((weights[n] * (p[n] - end[n]).square()).sum() for n in p))
    assert_equal(run.gradients(ewc), {n: g.detach() for n, g in expected.items()})


def test_ewc_of_two_tasks_is_the_sum_of_both_terms() -> None:
    run, ewc = Sequence2(), method("ewc", strength=1, labels="true", num_samples=12)
    ends, weights = [], []
    for _ in range(2):
        context = run.begin(ewc, 1)
        moved(run)
        ends.append({n: p.detach().clone().requires_grad_() for n, p in run.backbone.named_parameters()})
        weights.append(fisher(run, "true", ends[-1]))
        context = run.begin(ewc, 1)
        ewc.end_task(context)
    run.begin(ewc, 2)
    moved(run)
    expected = run.plain_gradients(
        lambda p: sum(
            0.5 * (w[n] * (p[n] - e[n]).square()).sum() for n in p for w, e in zip(weights, ends, strict=True)
        )
    )
    assert_equal(run.gradients(ewc), {n: g.detach() for n, g in expected.items()})


def test_si_weighs_by_the_path_integral() -> None:
    run, si = Sequence2(), method("si", strength=0.5, damping=0.01)
    start = snapshot(run)
    context = run.begin(si, 1)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    path = {name: torch.zeros_like(p) for name, p in start.items()}
    for _ in range(3):
        gradients, before = run.gradients(si), snapshot(run)
        si.step(optimizer)
        for name, after in snapshot(run).items():
            path[name] -= gradients[name] * (after - before[name])
    si.end_task(context)
    end = snapshot(run)
    omega = {n: path[n].clamp_min(0) / ((end[n] - start[n]).square() + 0.01) for n in path}
    run.begin(si, 2)
    moved(run)
    expected = run.plain_gradients(lambda p: 0.5 * sum((omega[n] * (p[n] - end[n]).square()).sum() for n in p))
    assert_equal(run.gradients(si), expected)


class Skipping(torch.optim.SGD):
    """As Accelerate's optimizer where float16's scaler leaves a step out."""

    step_was_skipped = True

    def step(self, closure: Any = None) -> None:
        pass


def test_si_leaves_out_the_steps_that_the_scaler_leaves_out() -> None:
    run, si = Sequence2(), method("si", strength=0.5)
    run.begin(si, 1)
    run.gradients(si)
    si._gradient.fill_(torch.inf)  # type: ignore[attr-defined]
    si.step(Skipping(run.backbone.parameters(), lr=0.1))
    assert not si.path.any()  # type: ignore[attr-defined]
    run.steps(si)
    assert bool(torch.isfinite(si.path).all())  # type: ignore[attr-defined]
    assert si.path.any()  # type: ignore[attr-defined]


def test_lwf_distils_the_old_heads_outputs() -> None:
    run, lwf = Sequence2(), method("lwf", strength=0.8, temperature=3)
    run.first_task(lwf)
    teacher, head = copy.deepcopy(run.backbone), run.heads[0]
    run.begin(lwf, 2)
    moved(run)
    images = run.batch(lwf).images

    def term(parameters: dict[str, Tensor]) -> Tensor:
        old, new = head(teacher(images)).detach(), head(run.backbone(images))
        q, p = (old / 3).softmax(1), (new / 3).softmax(1)
        return 0.8 * 9 * (q * (q.log() - p.log())).sum() / len(images)

    assert_equal(run.gradients(lwf), run.plain_gradients(term))


def test_lwf_holds_the_classes_that_a_shared_head_had() -> None:
    run, lwf = Sequence2(), method("lwf", strength=0.8, temperature=3)
    run.first_task(lwf)
    teacher, head = copy.deepcopy(run.backbone), copy.deepcopy(run.heads[0])
    run.heads = [expand_head(run.heads[0], 5, seed=0)]
    run.tasks[1] = replace(run.tasks[1], head=run.tasks[0].head, classes=tuple("abcde"))
    run.begin(lwf, 2)
    moved(run)
    batch = run.batch(lwf)
    now = run.heads[0](run.backbone(batch.images))
    q, p = (head(teacher(batch.images)) / 3).softmax(1), (now[:, :3] / 3).softmax(1)
    expected = F.cross_entropy(now, batch.labels, reduction="sum") + 0.8 * 9 * (q * (q.log() - p.log())).sum()
    torch.testing.assert_close(lwf.loss(run.model, batch).loss, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("passes", "forwards"), [(1.0, 2), (1.5, 3)])
def test_lwf_asks_its_teacher_once_for_each_image_where_that_costs_less(passes: float, forwards: int) -> None:
    """Of 12 images in batches of 5, 5 and 2, or of 12 at each of two steps: with the same gradients to 1e-10."""
    run, lwf = Sequence2(), method("lwf", strength=0.8, temperature=3)
    run.first_task(lwf)
    run.passes = passes
    run.begin(lwf, 2)
    asked: list[int] = []
    lwf.distillation.teacher.register_forward_hook(lambda module, arguments, output: asked.append(len(arguments[0])))
    teacher = copy.deepcopy(run.backbone)
    found = []
    for _ in range(2):
        moved(run)
        found.append(run.gradients(lwf))
        images, head = run.batch(lwf).images, run.heads[0]

        def term(parameters: dict[str, Tensor]) -> Tensor:
            q, p = (head(teacher(images)).detach() / 3).softmax(1), (head(run.backbone(images)) / 3).softmax(1)  # noqa: B023
            return 0.8 * 9 * (q * (q.log() - p.log())).sum() / 12

        assert_equal(found[-1], run.plain_gradients(term))
    assert len(asked) == forwards
    assert sum(asked) == (24 if passes == 1 else 12)


def test_factors_of_a_model_with_several_heads_cost_as_many_passes_as_with_one() -> None:
    """Two a batch: one for the layers, one under vmap for the norm's single samples, of 12 samples in three batches.

    Before them two samples, on which the layers' formula is tried: one, both, and each by itself for autograd.
    """
    run = Sequence2(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.LayerNorm(4)))
    kronecker = method("kronecker", anchor=0.5, num_samples=12, draws=2)
    run.first_task(kronecker)
    context = run.begin(kronecker, 2)
    run.steps(kronecker)
    passes: list[int] = []
    run.backbone.register_forward_hook(lambda module, arguments, output: passes.append(len(arguments[0])))
    kronecker.end_task(context)
    assert len(context.model.heads) == 2
    assert passes[:4] == [1, 2, 1, 1]
    assert len(passes[4:]) == 6


def test_er_adds_the_mean_loss_of_paired_exemplars() -> None:
    run, er = Sequence2(), method("er", budget_bytes=7 * 12, strength=0.6)
    run.first_task(er)
    assert er.bytes_remembered() == 7 * 12
    run.begin(er, 2)
    exemplars = er.exemplars.paired(run.batch(er))  # type: ignore[attr-defined]
    stored = set(er.memory.per_task[1])  # type: ignore[attr-defined]
    assert set(exemplars.indices.tolist()) <= stored
    assert len(set(exemplars.indices.tolist())) > 2

    def term(parameters: dict[str, Tensor]) -> Tensor:
        return 0.6 * F.cross_entropy(run.heads[0](run.backbone(exemplars.images)), exemplars.labels)

    assert_equal(run.gradients(er), run.plain_gradients(term))
    output = er.loss(run.model, run.batch(er))
    assert int(output.correct) <= len(run.batch(er))


def test_derpp_adds_the_distance_to_stored_outputs() -> None:
    run, derpp = Sequence2(), method("derpp", budget_bytes=7 * 24, strength=0.6, alpha=0.4)
    run.first_task(derpp)
    then, head = copy.deepcopy(run.backbone), copy.deepcopy(run.heads[0])
    run.begin(derpp, 2)
    moved(run)
    exemplars = derpp.exemplars.paired(run.batch(derpp))  # type: ignore[attr-defined]

    def term(parameters: dict[str, Tensor]) -> Tensor:
        logits = run.heads[0](run.backbone(exemplars.images))
        stored = head(then(exemplars.images)).detach().float().double()
        return 0.6 * F.cross_entropy(logits, exemplars.labels) + 0.4 * (logits - stored).square().mean()

    found, expected = run.gradients(derpp), run.plain_gradients(term)
    for name, value in expected.items():  # outputs are stored in float32
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_agem_takes_out_what_points_against_the_exemplars() -> None:
    run, agem = Sequence2(), method("agem", budget_bytes=6 * 12, reference_size=4)
    run.first_task(agem)
    run.begin(agem, 2)
    drawn = agem.exemplars.drawn(4, agem.steps + 1)  # type: ignore[attr-defined]
    loss = F.cross_entropy(run.heads[0](run.backbone(drawn.images)), drawn.labels)
    parameters = list(run.backbone.parameters())
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    g = torch.cat([v.flatten() for v in run.plain_gradients().values()])
    if g @ reference > 0:  # make the two disagree, so that the projection has something to do
        run.heads[1].weight.data.neg_()
        g = torch.cat([v.flatten() for v in run.plain_gradients().values()])
    expected = g - (g @ reference) / (reference @ reference) * reference if g @ reference < 0 else g
    found = torch.cat([v.flatten() for v in run.gradients(agem).values()])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert g @ reference < 0
    assert abs(float(found @ reference)) < 1e-10


class Normalised(Features):
    """With a batch norm between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.norm(self.first(images.flatten(1))))))


def test_agem_s_exemplars_leave_the_running_statistics_alone() -> None:
    statistics = []
    for name, options in (("agem", {"budget_bytes": 6 * 12, "reference_size": 4}), ("finetune", {})):
        run, one = Sequence2(Normalised), method(name, **options)
        run.first_task(one)
        run.begin(one, 2)
        run.gradients(one)
        statistics.append([buffer.clone() for buffer in run.backbone.buffers()])
    assert len(statistics[0]) == 3
    for own, plain in zip(*statistics, strict=True):
        torch.testing.assert_close(own, plain, atol=0, rtol=0)


def test_agem_takes_no_step_where_the_exemplars_overflow_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    run, agem = Sequence2(), method("agem", budget_bytes=6 * 12, reference_size=4)
    run.first_task(agem)
    run.begin(agem, 2)

    def overflow(exemplars: object) -> None:
        for parameter in run.backbone.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)

    monkeypatch.setattr(agem, "_reference", overflow)
    run.accelerator.scaler = object()  # type: ignore[assignment]
    assert run.gradients(agem) == {}


def test_derpp_s_exemplars_are_counted_by_what_each_task_keeps_beside_them() -> None:
    run, derpp = Sequence2(), method("derpp", budget_bytes=24 * 6)
    many = replace(run.tasks[0], classes=tuple("abcdefghijkl"))
    for index, classes in ((1, many.classes), (2, run.tasks[1].classes)):
        context = run.context(derpp, index)
        context.tasks = [replace(context.tasks[-1], classes=classes)]
        derpp.memory.add(context, 4 * len(classes))  # type: ignore[attr-defined]
    kept = {task: len(indices) for task, indices in derpp.memory.per_task.items()}  # type: ignore[attr-defined]
    assert kept == {1: 24 * 6 // 60 // 2, 2: 24 * 6 // 24 // 2}
    assert derpp.bytes_remembered() == kept[1] * 60 + kept[2] * 24 <= 24 * 6


def test_gpm_moves_a_layer_only_across_earlier_inputs() -> None:
    run, gpm = Sequence2(), method("gpm", threshold=0.9, num_samples=12)
    context = run.first_task(gpm)
    (batch,) = context.samples(12, 12)
    inputs = batch.images.flatten(1)
    span = gpm.spans["first.weight"]  # type: ignore[attr-defined]
    torch.testing.assert_close(span.T @ span, torch.eye(span.shape[1], dtype=span.dtype), atol=1e-10, rtol=0)
    assert float((inputs @ span).square().sum() / inputs.square().sum()) >= 0.9
    assert span.shape[1] < 12
    run.begin(gpm, 2)
    before = snapshot(run)
    run.steps(gpm, 1)
    after = snapshot(run)
    change = after["first.weight"] - before["first.weight"]
    assert float((change @ span).abs().max()) < 1e-12
    assert float(change.abs().max()) > 1e-3
    assert torch.equal(after["first.bias"], before["first.bias"])


def test_gpm_holds_a_weight_that_is_read_without_a_call() -> None:
    """Nothing says what its inputs are: it is one of the others."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.read = nn.Linear(12, 4), nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            return F.linear(self.first(images.flatten(1)).tanh(), self.read.weight)

    run, gpm = Sequence2(Reads), method("gpm", threshold=0.9, num_samples=12)
    run.first_task(gpm)
    assert set(gpm.spans) == {"first.weight"}  # type: ignore[attr-defined]
    run.begin(gpm, 2)
    before = snapshot(run)
    run.steps(gpm, 1)
    after = snapshot(run)
    assert torch.equal(after["read.weight"], before["read.weight"])
    assert not torch.equal(after["first.weight"], before["first.weight"])


def test_nostalgia_ewc_is_a_quadratic_form_along_the_kept_directions() -> None:
    run, penalised = Sequence2(), method("nostalgia_ewc", top_k=3, strength=2)
    run.first_task(penalised)
    end = torch.cat([p.flatten() for p in snapshot(run).values()])
    memory = penalised.eigenspace.memory  # type: ignore[attr-defined]
    run.begin(penalised, 2)
    moved(run)

    def term(parameters: dict[str, Tensor]) -> Tensor:
        d = torch.cat([p.flatten() for p in parameters.values()]) - end
        return (memory.eigenvalues * (memory.basis @ d).square()).sum()

    assert memory.basis is not None
    assert_equal(run.gradients(penalised), run.plain_gradients(term))


@pytest.mark.parametrize("mode", ["uniform", "interpolation"])
def test_averaging_leaves_the_mean_of_task_ends(mode: str) -> None:
    run, averaging = Sequence2(), method("averaging", mode=mode, share=0.25)
    run.first_task(averaging)
    first = snapshot(run)
    context = run.begin(averaging, 2)
    run.steps(averaging)
    second = snapshot(run)
    averaging.end_task(context)
    share = 0.5 if mode == "uniform" else 0.25
    assert_equal(snapshot(run), {n: first[n] + share * (second[n] - first[n]) for n in first})


def test_averaged_weights_get_batch_norm_statistics_of_their_own() -> None:
    class Normalised(nn.Sequential):
        norm_frozen = False

    run = Sequence2(lambda: Normalised(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)))
    averaging = method("averaging", share=0.25)
    run.first_task(averaging)
    context = run.begin(averaging, 2)
    run.steps(averaging)
    _, linear, norm = run.backbone
    before = norm.running_mean.clone()
    averaging.end_task(context)
    expected = linear(run.batch(averaging).images.flatten(1)).mean(0)  # of the 12 images, in one batch
    torch.testing.assert_close(norm.running_mean, expected, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(before, expected)


def test_a_merge_is_noted_at_the_end_of_its_own_task_alone() -> None:
    run, kronecker = Sequence2(), method("kronecker", num_samples=12, draws=2, budget_bytes=0)
    run.first_task(kronecker)
    context = run.begin(kronecker, 2)
    kronecker.end_task(context)
    assert kronecker.note().startswith("factors of 2 tasks are merged")
    run.begin(kronecker, 2)
    assert kronecker.note() == ""


def test_soft_projection_shrinks_by_curvature() -> None:
    run, soft = Sequence2(), method("nostalgia", top_k=3, project="soft")
    run.first_task(soft)
    memory = soft.eigenspace.memory  # type: ignore[attr-defined]
    run.begin(soft, 2)
    g = torch.cat([v.flatten() for v in run.plain_gradients().values()])
    assert memory.basis is not None
    values = memory.eigenvalues
    expected = g - memory.basis.T @ (values / (values.median() + values) * (memory.basis @ g))
    found = torch.cat([v.flatten() for v in run.gradients(soft).values()])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


NOTHING = {
    "l2sp": {"strength": 0},
    "ewc": {"strength": 0, "num_samples": 12},
    "si": {"strength": 0},
    "lwf": {"strength": 0},
    "er": {"budget_bytes": 11},
    "derpp": {"budget_bytes": 11},
    "agem": {"budget_bytes": 11},
    "gpm": {"threshold": 0},
    "nostalgia_ewc": {"strength": 0, "top_k": 2},
    "kronecker": {"strength": 0, "anchor": 0},
    "averaging": {"mode": "interpolation", "share": 1.0},
}


@pytest.mark.parametrize("name", NOTHING)
def test_at_strength_0_a_method_is_fine_tuning_to_the_bit(name: str) -> None:
    ends = []
    for chosen in (method(name, **NOTHING[name]), method("finetune")):
        run = Sequence2()
        run.first_task(chosen)
        context = run.begin(chosen, 2)
        run.steps(chosen)
        chosen.end_task(context)
        ends.append(snapshot(run))
    if name == "averaging":  # its mean is rounded
        assert_equal(*ends)
    else:
        assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[1])


def test_heads_only_and_joint_say_what_they_are() -> None:
    assert method("heads_only").frozen_backbone
    assert method("joint").joint
    assert isinstance(Features(), nn.Module)
