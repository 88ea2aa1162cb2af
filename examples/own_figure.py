"""A figure of one's own: how far the loss fell while each task was trained."""

from matplotlib.figure import Figure

from nostalgia.analysis.run_folder import RunFolder


def loss_drop(run: RunFolder) -> Figure:
    """The first and the last logged training loss of each task."""
    losses: dict[str, list[float]] = {}
    for row in run.metrics:  # a row of metrics.csv: its columns by name, None where a cell is empty
        if row["split"] == "train" and row["loss"] is not None:
            losses.setdefault(row["task"], []).append(row["loss"])
    if not losses:
        raise ValueError("no training loss in metrics.csv")  # the report says so under "Not shown"
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Training loss, first and last", loc="left")
    for place, (task, values) in enumerate(losses.items()):
        axes.annotate("", xy=(place, values[-1]), xytext=(place, values[0]), arrowprops={"arrowstyle": "->"})
        axes.plot([place, place], [values[0], values[-1]], ".", label=task)
    axes.set_xticks(range(len(losses)), losses)
    axes.set_ylabel("loss")
    return figure
