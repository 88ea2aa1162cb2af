"""Recomputes a sweep's frontier.json from its run folders alone, without the package, and says whether both agree.

python -m bench.recompute SWEEP_FOLDER

Reads <method>[/strength_<v>]/seed<k>/results/results.json and frontier.json; exit code 0 where every mean agrees to the last
digit, 1 where one does not.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path


def cells(folder: Path) -> dict[tuple[str, float | None], dict[int, dict]]:
    """Results by (method, strength) and seed."""
    found: dict[tuple[str, float | None], dict[int, dict]] = {}
    for file in sorted(folder.glob("**/seed*/results/results.json")):
        place = file.parents[2].relative_to(folder).parts
        strength = float(place[1].removeprefix("strength_")) if len(place) > 1 else None
        results = json.loads(file.read_text())
        found.setdefault((place[0], strength), {})[results["seed"]] = results
    return found


def measures(results: dict) -> dict[str, float | None]:
    """ACC, BWT and LA from the accuracy matrix, class-incremental ACC from its own; a joint run has its last row alone."""
    matrix, count = results["accuracy_matrix"], len(results["tasks"])
    learned = [matrix[u][u] for u in range(count)]
    whole = None not in learned
    unknown = results.get("class_incremental")
    return {
        "acc": math.fsum(matrix[-1]) / count,
        "bwt": math.fsum(matrix[-1][u] - learned[u] for u in range(count - 1)) / (count - 1) if whole else None,
        "learning_accuracy": math.fsum(learned) / count if whole else None,
        "class_incremental": None if unknown is None else math.fsum(unknown["accuracy_matrix"][-1]) / count,
    }


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    frontier, own = json.loads((folder / "frontier.json").read_text()), cells(folder)
    wrong = 0
    for point in frontier["points"]:
        runs = own[point["method"].split(":")[-1], point["strength"]]
        values = [measures(runs[seed]) for seed in point["seeds"]]
        means = {
            name: None if values[0][name] is None else math.fsum(v[name] for v in values) / len(values)  # type: ignore[misc]
            for name in values[0]
        }
        plain = [
            measures(run)["bwt"] for seed, run in own.get(("finetune", None), {}).items() if seed in point["seeds"]
        ]
        if means["bwt"] is not None and len(plain) == len(values) and math.fsum(plain) < 0:  # type: ignore[arg-type]
            means["forgetting_left"] = means["bwt"] / (math.fsum(plain) / len(plain))  # type: ignore[arg-type]
        for name, mine in means.items():
            theirs = point["mean"][name]
            if mine != theirs and (mine is None or theirs is None or abs(mine - theirs) > 1e-12):
                wrong += 1
                print(f"{point['method']} {point['strength']} {name}: {theirs} in the file, {mine} recomputed")
    print(f"{len(frontier['points'])} points, {wrong} numbers differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
