"""The hub's data sets: from a server on this machine, from its cache, and from folders laid out as on the hub."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from nostalgia.data.catalog import Entry, Hub
from nostalgia.data.hub import from_hub
from nostalgia.data.prepared import Decoder, Prepared
from nostalgia.data.resizing import Resizing
from nostalgia.data.sources import load_source
from nostalgia.errors import NotFoundError, UsageError
from tests.distributed.harness import ROOT
from tests.unit.data.hub_server import COMMIT, serve
from tests.unit.data.trees import png

NAMES = ["zero", "one", "two"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(
    numbers: Sequence[int],
    *,
    digits: Sequence[int] = (0, 1, 2),
    label: str = "label",
    labels: Any = None,
    more: Mapping[str, tuple[Any, Any]] | None = None,
) -> datasets.Dataset:
    """Images ``numbers`` of each digit; ``labels`` is the label's feature, ``more`` further columns by digit."""
    rows = [(digit, number) for digit in digits for number in numbers]
    text = labels is not None and labels.dtype == "string"
    columns: dict[str, Any] = {
        "image": [{"bytes": png(d, n), "path": None} for d, n in rows],
        label: [NAMES[d] if text else d for d, _ in rows],
    }
    features = {"image": datasets.Image(), label: labels or datasets.ClassLabel(names=NAMES)}
    for name, (feature, value) in (more or {}).items():
        features[name] = feature
        columns[name] = [value(d) for d, _ in rows]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def repository(folder: Path, **splits: datasets.Dataset) -> Path:
    """Parquet files as the hub keeps them."""
    (folder / "data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


# -- the hub itself ---------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
import datasets
from nostalgia.data.sources import load_source
from nostalgia.errors import NostalgiaError
datasets.disable_progress_bars()
answers = []
for name, download in json.loads(sys.argv[1]):
    try:
        s = load_source(name, download=download, root="/nonexistent")
        answers.append([s.kind, s.where, len(s.train), len(s.val), list(s.train.classes)])
    except NostalgiaError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def ask(home: Path, address: str, *requests: tuple[str, bool]) -> list[list[Any]]:
    """`load_source` in a process that takes ``address`` for the hub (libraries read that when imported)."""
    env = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(requests)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_download_once_then_from_the_cache_without_a_request(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo", train=table(range(4)), test=table(range(4, 6)))
    served = ["hub", f"someone/three@{COMMIT[:12]}", 12, 6, NAMES]
    name = "hf:someone/three"
    with serve("someone/three", folder) as (address, asked):
        before, first = ask(tmp_path / "home", address, (name, False), (name, True))
        assert before[0] == "NotFoundError"
        assert "not in the cache" in before[1]
        assert "downloads: off" in before[1]
        assert first == served
        assert any(path.endswith(".parquet") for path in asked)
    # The server is gone: a request would fail, after half a minute of trying again.
    assert ask(tmp_path / "home", address, (name, False), (name, True)) == [served, served]


def test_a_repository_with_code_and_one_that_is_not_there(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo", train=table(range(4)))
    (folder / "three.py").write_text("raise SystemExit('never run')")
    with serve("someone/three", folder) as (address, _):
        code, absent = ask(tmp_path / "home", address, ("hf:someone/three", True), ("hf:someone/missing", True))
    assert code[0] == "UsageError"
    assert "code of its own" in code[1]
    assert absent[0] == "NotFoundError"
    assert "someone/missing" in absent[1]
    assert len(absent[1].splitlines()) <= 12


# -- folders laid out like it -----------------------------------------------------------------------------------------


def test_a_cloned_repository(tmp_path: Path) -> None:
    folder = repository(tmp_path / "mine", train=table(range(4)), validation=table(range(4, 6)), test=table([7]))
    source = load_source(str(folder))
    assert (source.kind, len(source.train), len(source.val)) == ("hub", 12, 6)  # validation before test
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    image = source.train.image(0)
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.uint8)


def test_a_repository_with_a_card_and_folders_by_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        (folder / "cropped").mkdir(parents=True, exist_ok=True)
        table(numbers).to_parquet(folder / "cropped" / f"{split}-00000.parquet")
    card = "configs:\n- config_name: cropped\n  data_files:\n"
    card += "".join(f"  - split: {s}\n    path: cropped/{s}-*\n" for s in ("train", "test"))
    (folder / "README.md").write_text(f"---\n{card}---\n# Three digits\n")
    assert len(load_source(str(folder)).val) == 6


def test_what_workers_are_sent_survives_pickling(tmp_path: Path) -> None:
    source = load_source(str(repository(tmp_path / "mine", train=table(range(4)), test=table([4]))))
    decoder = Decoder(Prepared([source.train], [()], Resizing(8)), ["crop_flip"])
    key = (7, [0.5, 0.1, 0.2, 0.3])
    assert torch.equal(pickle.loads(pickle.dumps(decoder))[key], decoder[key])


def test_saved_to_disk(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": table(range(4)), "test": table(range(4, 6))})
    both.save_to_disk(tmp_path / "both")
    table(range(5)).save_to_disk(tmp_path / "one")
    assert len(load_source(str(tmp_path / "both")).val) == 6
    one = load_source(str(tmp_path / "one"), val_fraction=0.4)
    assert (len(one.train), len(one.val)) == (9, 6)
    assert one.val.labels.bincount().tolist() == [2, 2, 2]


def test_the_catalogs_columns_for_a_copy_of_cifar100(tmp_path: Path) -> None:
    names = [f"class{i}" for i in range(100)]
    rows = {
        "img": [{"bytes": png(i, i), "path": None} for i in range(100)],
        "coarse_label": [i // 5 for i in range(100)],
        "fine_label": list(range(100)),
    }
    kinds = (datasets.Image(), datasets.ClassLabel(num_classes=20), datasets.ClassLabel(names=names))
    features = datasets.Features(dict(zip(rows, kinds, strict=True)))
    split = datasets.Dataset.from_dict(rows, features=features)
    repository(tmp_path / "cifar100", train=split, test=split)
    source = load_source("cifar100", root=tmp_path, download=False)
    assert source.train.classes == tuple(names)
    assert source.train.labels.tolist() == list(range(100))


def test_text_labels_dropped_classes_and_chosen_rows(tmp_path: Path) -> None:
    domain = {"domain": (datasets.ClassLabel(names=["real", "clipart"]), lambda d: 1 - d % 2)}
    split = table(range(4), label="text", labels=datasets.Value("string"), more=domain)
    repo = str(repository(tmp_path / "repo", train=split, test=split))
    source = load_source("mine", entries={"mine": {"hub_id": repo, "label_column": "text"}})
    assert source.train.classes == ("one", "two", "zero")
    assert source.train.labels.tolist() == [2] * 4 + [0] * 4 + [1] * 4
    chosen, why = from_hub(Entry("mine"), Hub(repo, label="text", keep=("domain", "clipart")), 0.2, False)
    assert chosen is not None, why
    assert chosen.train.classes == ("two", "zero")
    dropped, why = from_hub(Entry("mine", drop=("zero",)), Hub(repo, label="text"), 0.2, False)
    assert dropped is not None, why
    assert dropped.train.classes == ("one", "two")
    assert (len(dropped.train), dropped.train.describe(0)) == (8, f"{repo}, row 4")


def test_numbers_without_names_and_splits_joined(tmp_path: Path) -> None:
    number = datasets.Value("int64")
    numbers = {"train": [0], "validation": [1], "test": [2, 3]}
    repo = repository(tmp_path / "repo", **{s: table(n, labels=number) for s, n in numbers.items()})
    entry = {"hub_id": str(repo), "train_split": "train+validation", "val_split": "test"}
    source = load_source("mine", entries={"mine": entry})
    assert source.train.classes == ("0", "1", "2")
    assert (len(source.train), len(source.val)) == (6, 6)


def test_a_class_of_the_repository_without_images_is_left_out(tmp_path: Path) -> None:
    labels = datasets.ClassLabel(names=["never", *NAMES])
    repo = repository(tmp_path / "repo", train=table(range(4), digits=(1, 2), labels=labels))
    assert load_source(str(repo)).train.classes == ("zero", "one")


def refusal(folder: Path, kind: type[Exception], **entry: str) -> str:
    with pytest.raises(kind) as caught:
        load_source("mine", entries={"mine": {"hub_id": str(folder), **entry}}, download=False, root="/nonexistent")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_out_of_range(tmp_path: Path) -> None:
    plain = table(range(4), labels=datasets.Value("int64"))
    info = plain.info.copy()  # the feature promises two classes, the column holds a third: nothing looks but us
    info.features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES[:2])})
    datasets.Dataset(plain.data, info=info).save_to_disk(tmp_path / "broken")
    with pytest.raises(NotFoundError, match="row 8: label 2 in column 'label' is out of range; allowed is 0 to 1"):
        load_source(str(tmp_path / "broken"))
    unlabelled = table(range(4), digits=(0,), more={"y": (datasets.ClassLabel(names=NAMES), lambda _: -1)})
    repo = repository(tmp_path / "repo", train=unlabelled)
    assert "label -1" in refusal(repo, NotFoundError, label_column="y")


@pytest.mark.parametrize("labels", [datasets.ClassLabel(names=NAMES), datasets.Value("int64")])
def test_a_split_without_labels_names_its_remedy_which_helps(tmp_path: Path, labels: Any) -> None:
    train, plain = table(range(4), labels=labels), table(range(4, 6), labels=labels)
    none = plain.map(lambda row: {"label": -1}, features=plain.features)
    repo = repository(tmp_path / "repo", train=train, test=none)
    line = refusal(repo, NotFoundError)
    assert "row 0: label -1 in column 'label': a split without labels" in line
    assert "train_split alone" in line
    found = load_source("mine", entries={"mine": {"hub_id": str(repo), "train_split": "train"}})
    assert (len(found.train), len(found.val)) == (9, 3)


def test_a_cache_that_cannot_be_written_is_not_called_a_damaged_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = repository(tmp_path / "repo", train=table(range(4)))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))

    def line_of() -> str:
        with pytest.raises(NotFoundError) as caught:
            load_source(str(repo))
        return str(caught.value)

    line = line_of()
    assert f"the cache {tmp_path}/file/cache cannot be written ({tmp_path}/file is no folder)" in line
    assert "set HF_DATASETS_CACHE to another folder" in line
    assert "broken" not in line

    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", full)
    assert "cannot be written (No space left on device: somewhere)" in line_of()
    with pytest.raises(NotFoundError, match="cannot be written"):  # as one of the hub
        load_source("mine", entries={"mine": {"hub_id": str(repo)}}, download=False)


def test_columns_that_do_not_say_enough(tmp_path: Path) -> None:
    second = {"other": (datasets.Image(), lambda d: {"bytes": png(d, 0), "path": None})}
    two = repository(tmp_path / "two", train=table(range(4), more=second))
    message = refusal(two, UsageError)
    assert "2 columns could be the images (image, other)" in message
    assert "image_column" in message
    source = load_source("mine", entries={"mine": {"hub_id": str(two), "image_column": "image"}})
    assert len(source.train) == 9
    none = repository(tmp_path / "none", train=table(range(4), label="kind", labels=datasets.Value("int64")))
    assert "no label column" in refusal(none, UsageError)
    assert "no column 'kinds'; it has" in (told := refusal(none, UsageError, label_column="kinds"))
    assert told.endswith(": set label_column in dataset.entries.<name>")
    assert "holds no images" in refusal(none, UsageError, label_column="kind", image_column="kind")
    assert "no split 'trian'; it has train" in refusal(none, NotFoundError, label_column="kind", train_split="trian")


def test_one_of_several_columns_of_labels_is_taken_and_named(tmp_path: Path) -> None:
    fine = {"fine_label": (datasets.Value("string"), str)}
    table(range(4), more=fine).save_to_disk(tmp_path / "saved")
    source = load_source(str(tmp_path / "saved"))
    assert source.train.classes == tuple(NAMES)
    assert "labels are column 'label'; label_column takes fine_label" in source.notes
    chosen = load_source("mine", entries={"mine": {"path": str(tmp_path / "saved"), "label_column": "fine_label"}})
    assert chosen.train.classes == ("0", "1", "2")
    assert chosen.notes == tuple(note for note in source.notes if "label_column" not in note)


def test_columns_of_a_folder_are_named_beside_its_path(tmp_path: Path) -> None:
    table(range(4), label="kind", labels=datasets.Value("int64")).save_to_disk(tmp_path / "saved")
    folder = str(tmp_path / "saved")
    with pytest.raises(UsageError, match="set label_column beside path or hub_id"):
        load_source(folder)
    source = load_source("mine", entries={"mine": {"path": folder, "label_column": "kind"}})
    assert (len(source.train), source.train.classes) == (9, ("0", "1", "2"))
    (tmp_path / "plain").mkdir()
    files = [png(digit, number) for digit in (0, 1) for number in range(4)]
    rows = datasets.Dataset.from_dict({"picture": files, "label": [0] * 4 + [1] * 4})  # bytes, as pandas keeps them
    rows.to_parquet(tmp_path / "plain" / "train.parquet")
    plain = load_source(str(tmp_path / "plain")).train
    assert torch.equal(plain.image(0), source.train.image(0))


def test_validation_with_a_class_of_its_own_or_without_one(tmp_path: Path) -> None:
    whole, part = table(range(4)), table(range(4), digits=(0, 2))
    less = repository(tmp_path / "less", train=whole, test=part)
    assert "'one' is missing from validation" in refusal(less, NotFoundError)
    more = repository(tmp_path / "more", train=part, test=whole)
    assert "'one' of the validation split does not occur in training" in refusal(more, NotFoundError)


def test_a_clone_without_its_large_files(tmp_path: Path) -> None:
    (tmp_path / "clone" / "data").mkdir(parents=True)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (tmp_path / "clone" / "data" / "train-00000-of-00001.parquet").write_text(pointer)
    with pytest.raises(NotFoundError, match="broken or partial"):
        load_source(str(tmp_path / "clone"))


def test_an_unreadable_image_is_named_by_its_row(tmp_path: Path) -> None:
    contents = [{"bytes": png(0, 0), "path": None}, {"bytes": b"junk", "path": None}, None]
    rows = {"image": contents, "label": [0, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    split = datasets.Dataset.from_dict(rows, features=features)
    source = load_source(str(repository(tmp_path / "repo", train=split, test=split)))
    with pytest.raises(NotFoundError, match=r"repo, row 1: not a readable image"):
        source.train.image(1)
    with pytest.raises(NotFoundError, match=r"repo, row 2: no image in column 'image'"):
        source.train.image(2)


@pytest.mark.parametrize("name", ["hf:", "hf:../x", "hf:a/b/c", "hf:/etc", "hf:a b", "hf:a/.."])
def test_malformed_hub_names(name: str) -> None:
    with pytest.raises(UsageError, match="hf:user/name"):
        load_source(name)
