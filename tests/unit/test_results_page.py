"""Every number of the page of results is one of the files of results beside it."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from bench.study import choice_table, overview, table
from nostalgia.analysis.frontier import Frontier, Point, Row, markdown

DOCS = Path(__file__).resolve().parents[2] / "docs"


def study(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text())
    return found


def test_the_tables_of_the_study_are_made_of_its_runs() -> None:
    page = (DOCS / "results.md").read_text()
    assert table(study("study")) in page
    assert choice_table(study("study_variants")) in page
    assert table(study("study_rates")) in page
    assert choice_table(study("study_rates")) in page
    assert table(study("study_default")).strip() in page
    assert table(study("study_whole_head_rate")) in page
    assert choice_table(study("study_whole_head_rate")) in page
    assert overview(study("study_four_seeds")) in page
    assert choice_table(study("study_rates_others")) in page
    assert overview(study("study_rates_others")) in page
    for part in study("study_settings")["parts"].values():
        assert choice_table(part) in page


def test_the_runs_of_the_studies_are_what_their_accuracy_matrices_say() -> None:
    found = [
        study(name)
        for name in (
            "study", "study_variants", "study_four_seeds", "study_resnet", "study_whole", "study_anew", "study_cpu",
            "study_rates", "study_rates_others", "study_default", "study_whole_head_rate", "demo",
        )
    ]  # fmt: skip
    found += study("study_settings")["parts"].values()
    runs = [run for one in found for run in [*one.get("runs", []), *one.get("choice", [])]]
    assert len(runs) == 702
    for run in runs:
        matrix = run["accuracy_matrix"]
        last, count = matrix[-1], len(matrix)
        changes = [last[task] - matrix[task][task] for task in range(count - 1)]
        assert math.isclose(run["acc"], statistics.fmean(last), abs_tol=1e-12)
        assert math.isclose(run["bwt"], statistics.fmean(changes), abs_tol=1e-12)


def test_every_number_of_the_measured_table_is_one_of_its_file() -> None:
    points = json.loads((DOCS / "results" / "split_digits_frontier.json").read_text())["points"]
    part = (DOCS / "results.md").read_text().split("<!-- measured: begin -->")[1].split("<!-- measured: end -->")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| ")
    ]
    names, table_rows = rows[0], rows[1:]
    assert {row[0] for row in table_rows} == {point["method"] for point in points}
    columns = {"ACC": "acc", "BWT": "bwt", "LA": "learning_accuracy", "class-inc": "class_incremental"}
    for row in table_rows:
        point = the_point(points, row)
        for column, key in columns.items():
            mean, error = point["mean"][key], point["error"][key]
            assert row[names.index(column)] == ("-" if mean is None else f"{mean:.3f} ± {error:.3f}"), row
        assert row[names.index("bytes")] == f"{point['mean']['bytes'] / 1e6:.1f} MB"
        assert row[names.index("s")] == f"{point['mean']['seconds']:.0f}"


def the_point(points: list[dict[str, Any]], row: list[str]) -> dict[str, Any]:
    shown = re.sub("[ *]", "", row[1])
    strength = None if shown == "-" else float(shown)
    (point,) = [point for point in points if point["method"] == row[0] and point["strength"] == strength]
    return point


def test_the_table_of_split_fashion_is_made_of_its_file() -> None:
    found = json.loads((DOCS / "results" / "split_fashion_frontier.json").read_text())
    rows = [Row(Point(**row["point"]), row["reaches"], row["p_value"]) for row in found["rows"]]
    points = [Point(**point) for point in found["points"]]
    assert markdown(Frontier(points, rows, found["selected_on"])) in (DOCS / "results.md").read_text()
    plain = next(point.mean["bwt"] for point in points if point.method == "finetune")
    assert plain is not None
    for method in {point.method for point in points} - {"finetune", "joint", "heads_only"}:
        assert max(point.mean["bwt"] or 0.0 for point in points if point.method == method) > plain, method


def test_the_terms_of_the_expansion_are_those_of_the_file() -> None:
    page, found = (DOCS / "results.md").read_text(), study("orders")
    for name, label in (("finetune", "fine-tuning"), ("kronecker", "`kronecker`, strength 10")):
        row = found[name]
        terms = [row["measured"][-1], *(row[term] for term in ("linear", "hessian", "ggn", "blocks", "kronecker"))]
        assert f"| {label} | {' | '.join(f'{term:.4f}' for term in terms)} |" in page
    rows = found["predicted"]["rows"]
    explained = sum(r["linear"] + r["exact"] for r in rows) / sum(r["measured"] for r in rows)
    assert math.isclose(found["predicted"]["explained_exactly"], explained)
    assert f"second order then explains {100 * explained:.0f} %" in page


def test_shares_of_predicted_pairs_are_those_of_the_study() -> None:
    shares = []
    runs = [run for run in study("study")["runs"] if run["arm"] == "kronecker"]
    for stream in dict.fromkeys(run["stream"] for run in runs):
        pairs = [pair for run in runs if run["stream"] == stream for pair in run["prediction_rows"]]
        close = [m != 0 and 1 / 1.5 <= predicted / m <= 1.5 for m, predicted in pairs]
        shares.append(round(100 * sum(close) / len(close)))
    assert len(runs) == 9
    assert f"for {shares[0]}, {shares[1]} and {shares[2]} % of the pairs" in (DOCS / "results.md").read_text()


def test_the_rows_of_the_resnet_are_its_runs() -> None:
    page, found = (DOCS / "results.md").read_text(), study("study_resnet")
    assert len(found["runs"]) >= 4
    for run in found["runs"]:
        arm = run["arm"].removesuffix(", whole")
        assert (
            f"| {run['stream']} | {arm} | {run['acc']:.3f} | {run['bwt']:.3f} | {run['learning_accuracy']:.3f} |"
            in page
        )
    for run in found["choice"]:
        assert f"{run['acc']:.3f} | {run['bwt']:.3f} | {run['learning_accuracy']:.3f}" in page


def test_the_rows_of_the_vit_trained_whole_are_its_runs() -> None:
    page, found = (DOCS / "results.md").read_text().split("## The ViT, the whole")[1], study("study_whole")
    for run in [*found["choice"], *found["runs"]]:
        plain = next(r for r in [*found["choice"], *found["runs"]] if r["stream"] == run["stream"])
        figures = " | ".join(f"{run[key]:.3f}" for key in ("acc", "bwt", "learning_accuracy"))
        options = " ".join(f"{name}={value:g}" for name, value in run.get("options", {}).items())
        arm, left = run["arm"].removesuffix(", whole"), round(100 * run["bwt"] / plain["bwt"])
        row = (
            f"| {arm} | {options} | {figures} | {left} % |"
            if "options" in run
            else f" | {arm} | {figures} | {left} % |"
        )
        assert row in page


def test_the_rows_of_directions_in_b_alone_are_its_runs() -> None:
    page = (DOCS / "results.md").read_text().split("**Directions in B alone.**")[1]
    for run in study("study_anew")["runs"]:
        figures = " | ".join(f"{run[key]:.3f}" for key in ("acc", "bwt", "learning_accuracy"))
        assert f"| {run['stream']} | {run['seed']} | {run['arm']} | {figures} |" in page


def test_the_rows_of_the_seeds_run_on_a_cpu_are_its_runs() -> None:
    page, found = (DOCS / "results.md").read_text(), study("study_cpu")
    assert found["chosen"] == {arm: study("study")["chosen"][arm] for arm in found["chosen"]}
    assert len(found["runs"]) == 15
    for run in found["runs"]:
        figures = " | ".join(f"{run[key]:.3f}" for key in ("acc", "bwt", "learning_accuracy"))
        assert f"| {run['stream']} | {run['seed']} | {run['arm']} | {figures} |" in page


def test_the_rows_of_the_demo_are_its_runs() -> None:
    page, runs = (DOCS / "results.md").read_text(), study("demo")["runs"]
    plain = statistics.fmean(run["bwt"] for run in runs if run["arm"] == "finetune")
    for arm in {run["arm"] for run in runs}:
        own = [run for run in runs if run["arm"] == arm]
        assert [run["seed"] for run in own] == [40, 41, 42, 43, 44, 45]
        means = {key: statistics.fmean(run[key] for run in own) for key in ("acc", "bwt", "learning_accuracy")}
        row = next(line for line in page.split("## The demo over six")[1].splitlines() if line.startswith(f"| {arm} |"))
        assert [cell.split()[0] for cell in row.split(" | ")[2:5]] == [f"{mean:.3f}" for mean in means.values()]
        assert f"| {100 * means['bwt'] / plain:.0f} % |" in row
