"""Words and number formats of the reports: captions of the figures, definitions, texts of numbers."""

from __future__ import annotations

import math
from typing import Any

CAPTIONS = {
    "accuracy_matrix": "Row: after training a task. Column: accuracy on a task's validation images.",
    "accuracy_vs_task": "Each line starts where its task is learned; where it falls, the task is forgotten.",
    "forgetting": "Drop from the best accuracy a task had before; below zero a later task has helped.",
    "average_accuracy": "Mean over the tasks seen so far.",
    "frontier": "A curve a method over its strengths, bars of a standard error over seeds. Right of the dotted line learning "
    "accuracy is within half a point of fine-tuning's.",
    "spectrum": "Largest eigenvalues of each task's curvature at its end. The rank cut is where the memory stops.",
    "curvature_share": "How much of a task's curvature its first eigenpairs hold.",
    "subspace_overlap": "0: orthogonal eigenspaces, protecting one costs the other nothing. 1: the same directions.",
    "importance": "Share of each parameter tensor in the protected directions, weighted by eigenvalue.",
    "projection": "The gradient's share that was removed, and the displacement's that is left in the memory's span.",
    "forgetting_prediction": "Left: on the line the theory is exact. Right: in the grey the loss rose by more than the "
    "bound, so the displacement is too large for second order, or the gradient at the task's end was not small.",
    "train_loss": "A line for each task; the warm-up trains the new head alone.",
    "throughput": "Images per second over all ranks, between logged steps.",
    "memory": "Of each rank.",
}
# The word joiner keeps the square at its letter where the line breaks.
PREDICTION = (
    "At the end of each task its gradient g, its top eigenpairs (λᵢ, qᵢ), the trace of its curvature H (Hutchinson) "
    "and its parameters are kept. With d the displacement of the P projected parameters since then, and d⊥ its part "
    "outside the k eigenvectors, second order predicts that the task's loss rises by",
    "g·d + ½ Σᵢ λᵢ (qᵢ·d)² + ½ (tr H - Σᵢ λᵢ) / (P - k) |d⊥|\u2060²",
    "The measured increase is over the samples the curvature was taken from, in evaluation mode. The bound "
    "½ λₖ |d⊥|\u2060² is the most that the directions left free can add while second order holds.",
)


def fraction(value: float | None) -> str:
    """An accuracy or a difference of two; a dash for what was not measured."""
    return "-" if value is None else f"{value:.3f}"


def significant(value: Any) -> str:
    """Three significant digits; a dash for what is not there or not finite."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
