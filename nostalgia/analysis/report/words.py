"""Words and number formats of the reports: definitions, texts of numbers."""

from __future__ import annotations

import math
from typing import Any

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
