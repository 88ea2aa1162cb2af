"""Files that someone else made, damaged at random or on purpose: one clear error, nothing executed, nothing outside.

Seeds are fixed: a failure comes back.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from nostalgia.analysis.compare import compare
from nostalgia.analysis.report.page import write_report
from nostalgia.analysis.run_folder import read_curvature, read_run
from nostalgia.checkpoint.files import BlockFile, read_manifest
from nostalgia.config import parse, save
from nostalgia.errors import NostalgiaError, NotFoundError, UsageError
from nostalgia.logging.csv_log import read_log
from nostalgia.logging.results import read_matrix_csv, read_results
from nostalgia.logging.run_log import RunLog
from nostalgia.models import norm_statistics
from nostalgia.models.exported import load_classes
from nostalgia.models.heads import load_heads, make_head, save_heads
from tests.unit.analysis.folders import write_run

Mutation = Callable[[bytes, random.Random], bytes]
NASTY = (b"\x00", b"\xff\xfe", b"NaN", b"1e999", b"-1", b"null", b"[]", b"{}", b'"', b"'", b"\n",
         b"!!python/object:os.system ls", b"${oc.env:HOME}", b"9" * 400, b"../../x", b"[/bold]", b"<script>",
         b",", b":", b"&a [*a]", b"2001-99-99")  # fmt: skip


def flip(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def remove(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.randint(1, 20) :]


def repeat(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start : start + draw.randint(1, 40)] * draw.randint(2, 5) + data[start:]


def insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.choice(NASTY) + data[place:]


def other_value(data: bytes, draw: random.Random) -> bytes:
    """One of the numbers, words or lists replaced by something of another kind."""
    found = list(re.finditer(rb"[\w.+-]+|\[[^\[\]]*\]|\"[^\"]*\"", data))
    place = draw.choice(found) if found else None
    return data if place is None else data[: place.start()] + draw.choice(NASTY) + data[place.end() :]


MUTATIONS: tuple[Mutation, ...] = (flip, cut, remove, repeat, insert, other_value)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One good file of each kind."""
    folder = write_run(tmp_path_factory.mktemp("good") / "run")
    save(parse(["--suite", "demo"]).config, folder / "config.yaml")
    save_heads({"task1_digits": make_head(4, 3, 0), "task2_digits": make_head(4, 2, 0)}, folder / "heads.safetensors")
    means = {
        "bn.running_mean": torch.zeros(3),
        "bn.running_var": torch.ones(3),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    norm_statistics.save_statistics({"task1_digits": means}, folder / "norm.safetensors")
    save_file({"basis": torch.eye(3, 7)}, folder / "basis.safetensors")
    (folder / "classes.json").write_text(json.dumps({"task1_digits": ["0", "1"]}))
    return folder


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config": ("config.yaml", lambda file: parse(["--config", str(file)])),
    "results": ("results/results.json", read_results),
    "matrix": ("results/accuracy_matrix.csv", read_matrix_csv),
    "curvature": ("curvature/task2.json", read_curvature),
    "metrics": ("metrics.csv", read_log),
    "heads": ("heads.safetensors", load_heads),
    "statistics": ("norm.safetensors", norm_statistics.load_statistics),
    "basis": ("basis.safetensors", lambda file: list(BlockFile(file, 7))),
    "classes": ("classes.json", lambda file: load_classes(file.parent)),
}
COUNTS = {"config": 40}  # composing takes its time
EACH = 65


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind: str, originals: Path, tmp_path: Path) -> None:
    name, read = READERS[kind]
    good = (originals / name).read_bytes()
    file = tmp_path / Path(name).name
    file.write_bytes(good)
    read(file)  # as it was
    refused = []
    for seed in range(COUNTS.get(kind, EACH)):
        draw = random.Random(f"{kind} {seed}")
        file.write_bytes(draw.choice(MUTATIONS)(good, draw))
        try:
            read(file)
        except NostalgiaError as error:
            refused.append(str(error))
    assert len(refused) > 5  # the damage is real
    assert [line for line in refused if "\n" in line] == []


def test_a_damaged_run_folder_is_shown_or_refused(originals: Path, tmp_path: Path) -> None:
    """What reads all of a run's files together: the report and the comparison of runs."""
    files = ["config.yaml", "metrics.csv", "memory.csv", "curvature/task1.json", "curvature/task3.json",
             "results/results.json", "results/accuracy_matrix.csv"]  # fmt: skip
    good = {name: (originals / name).read_bytes() for name in files}
    folder = tmp_path / "run"
    for seed in range(40):
        draw = random.Random(f"folder {seed}")
        damaged = draw.sample(files, draw.randint(1, 3))
        for name, data in good.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(draw.choice(MUTATIONS)(data, draw) if name in damaged else data)
        read_run(folder)
        with contextlib.suppress(NostalgiaError):
            compare([folder], Console(file=io.StringIO()))
        if seed < 1:  # it draws its figures, which takes a second
            with contextlib.suppress(NostalgiaError):
                write_report([folder], tmp_path / "report.html")
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "report.html"}


class Exploit:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.file, "executed"))


@pytest.mark.parametrize("kind", READERS)
def test_a_pickle_under_another_name_is_not_run(kind: str, tmp_path: Path) -> None:
    name, read = READERS[kind]
    victim, file = tmp_path / "victim", tmp_path / Path(name).name
    file.write_bytes(pickle.dumps(Exploit(victim)))
    with pytest.raises(NostalgiaError):
        read(file)
    torch.save({"basis": Exploit(victim)}, file)
    with pytest.raises(NostalgiaError):
        read(file)
    assert not victim.exists()


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("experiment: !!python/object/apply:os.system ['touch {victim}']", "a tag"),
        ("experiment: !!python/object/apply:pathlib.Path ['/etc/passwd']", "a tag"),
        ("experiment: !!python/name:os.system", "a tag"),
        (bomb(30), "a reference"),
        ("x: " + "[" * 4000 + "]" * 4000, "levels deep"),
        ("x: " + "y" * (1 << 20), "characters of YAML"),
        ("x: 2001-99-99", "not YAML"),
        ("x: [1", "not YAML"),
    ],
    ids=["apply", "path", "name", "bomb", "deep", "long", "date", "open"],
)
def test_yaml_that_is_more_than_values(text: str, reason: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "config.yaml").write_text(text.replace("{victim}", str(victim)))
    with pytest.raises(UsageError, match=reason):
        parse(["--config", str(tmp_path / "config.yaml")])
    assert reason in read_run(tmp_path).problems["config.yaml"]
    assert not victim.exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:WANDB_API_KEY}",
        "a ${oc.env:HF_TOKEN,none}",
        "${oc.decode:${oc.env:WANDB_API_KEY}}",
        "${experiment.seed}",
    ],
)
def test_a_saved_configuration_draws_nothing_from_the_environment(
    value: str, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret123")
    monkeypatch.setenv("HF_TOKEN", "secret456")
    file = tmp_path / "config.yaml"
    good = (originals / "config.yaml").read_text()
    for hostile in (good.replace("project: nostalgia", f"project: {value}"),
                    good.replace("tags: []", f"tags: ['{value}']"),
                    good.replace("entries: {}", f"entries: {{x: {{hub_id: '{value}'}}}}")):  # fmt: skip
        assert hostile != good
        file.write_text(hostile)
        with pytest.raises(UsageError, match="a saved configuration has no") as caught:
            parse(["--config", str(file)])
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", ".", "", " ", "a\nb", "a\x00b", "-rf", "x" * 200])
def test_the_name_of_a_run_does_not_lead_out_of_its_folder(name: str, originals: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    good = (originals / "config.yaml").read_text()
    file.write_text(good.replace("name: demo", f"name: {json.dumps(name)}", 1))
    with pytest.raises(UsageError, match=r"experiment\.name="):
        parse(["--config", str(file)])


def strange_heads() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    yield "no bias", {"a.weight": torch.zeros(2, 3)}
    yield "no weight", {"a.bias": torch.zeros(2)}
    yield "one dimension", {"a.weight": torch.zeros(2), "a.bias": torch.zeros(2)}
    yield "another size", {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(3)}
    yield (
        "whole numbers",
        {"a.weight": torch.zeros(2, 3, dtype=torch.int64), "a.bias": torch.zeros(2, dtype=torch.int64)},
    )
    yield "no classes", {"a.weight": torch.zeros(0, 3), "a.bias": torch.zeros(0)}
    yield "not finite", {"a.weight": torch.full((2, 3), torch.nan), "a.bias": torch.zeros(2)}
    yield "strangers", {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "x": torch.zeros(1)}


@pytest.mark.parametrize(("what", "tensors"), list(strange_heads()), ids=[what for what, _ in strange_heads()])
def test_whole_files_of_something_else_are_no_heads(
    what: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "heads.safetensors")
    with pytest.raises(NotFoundError, match=r"heads\.safetensors"):
        load_heads(tmp_path / "heads.safetensors")


def test_statistics_that_no_network_has(tmp_path: Path) -> None:
    file = tmp_path / "norm.safetensors"
    save_file({"t/bn.running_var": torch.tensor([1.0, -1.0])}, file)
    with pytest.raises(NotFoundError, match="negative variance"):
        norm_statistics.load_statistics(file)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    other = {name: torch.zeros(4) for name in norm_statistics.capture(network)}
    with pytest.raises(NotFoundError, match="has shape"):
        norm_statistics.apply(network, other)


def test_json_too_deep_or_with_numbers_too_long(tmp_path: Path) -> None:
    for text in ("[" * 200_000, '{"eigenvalues": [' + "9" * 5000 + "]}", '{"eigenvalues": [1e999]}'):
        (tmp_path / "task1.json").write_text(text)
        with pytest.raises(NotFoundError):
            read_curvature(tmp_path / "task1.json")
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(NotFoundError):
        read_manifest(tmp_path)


def test_words_of_others_are_shown_as_they_are(tmp_path: Path) -> None:
    """Names that are markup to the terminal or to HTML stay text."""
    run = write_run(tmp_path / "run", method="[/red]<b>x</b>", tasks=["[bold]", "</td><script>", "[link=x]"])
    shown = io.StringIO()
    compare([run], Console(file=shown, width=200))
    assert "[/red]<b>x</b>" in shown.getvalue()
    page = write_report([run]).read_text()
    assert "<script>alert" not in page
    assert "</td><script>" not in page
    assert "<b>x</b>" not in page


def test_keys_in_the_environment_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Config, logs, TensorBoard and W&B (offline) of a run that was started with keys in its environment."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    secrets = {"WANDB_API_KEY": "secret123" * 5, "HF_TOKEN": "secret456"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_SILENT", "true")
    accelerator = Accelerator(cpu=True)
    config = parse(["--suite", "demo"]).config
    save(config, tmp_path / "config.yaml")
    log = RunLog(tmp_path, accelerator, wandb={"mode": "offline"}, config={"name": config.experiment.name})
    log.train_step(step=1, task="task1_digits", epoch=1, loss=1.0)
    log.finish()
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert not any(value[:9].encode() in path.read_bytes() for value in secrets.values()), path
