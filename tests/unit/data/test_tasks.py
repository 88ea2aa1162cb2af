"""The task list: what it means, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nostalgia.config import parse
from nostalgia.data.source import Source, stratified_split
from nostalgia.data.sources import load_source
from nostalgia.data.tasks import (
    Missing,
    Task,
    TaskSpec,
    build_tasks,
    data_notes,
    expand_specs,
    find_tasks,
    head_classes,
)
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.experiment.data_check import record_data
from tests.unit.data.trees import write_tree


def load(name: str) -> Source:
    return load_source(name, download=False)


def test_a_list_in_its_order_with_classes_and_transforms() -> None:
    entries = [{"dataset": "digits", "classes": [5, "3"]}, {"dataset": "digits", "transform": "invert"}, "digits"]
    tasks = build_tasks(expand_specs(entries, "cifar100"), load, seed=0)
    assert [t.name for t in tasks] == ["task1_digits", "task2_digits", "task3_digits"]
    assert [t.index for t in tasks] == [1, 2, 3]
    assert tasks[0].classes == ("5", "3")
    assert tasks[0].train.labels.unique().tolist() == [0, 1]
    digits = load("digits")
    assert len(tasks[0].val) == int(((digits.val.labels == 5) | (digits.val.labels == 3)).sum())
    five = int((digits.train.labels == 5).nonzero()[0])
    mine = int((tasks[0].train.labels == 0).nonzero()[0])
    assert torch.equal(tasks[0].train.image(mine), digits.train.image(five))
    assert (tasks[1].transform, tasks[2].transform) == (("invert",), ())
    assert tasks[0].source == "embedded: scikit-learn"


def test_each_data_set_is_loaded_once() -> None:
    asked: list[str] = []

    def counted(name: str) -> Source:
        asked.append(name)
        return load(name)

    build_tasks(expand_specs(["digits", {"dataset": "digits", "classes": [1, 2]}], "x"), counted, seed=0)
    assert asked == ["digits"]


def test_without_a_list() -> None:
    assert expand_specs(None, "digits") == [TaskSpec("digits")] * 2
    assert expand_specs(None, "digits", 3) == [TaskSpec("digits")] * 3


@pytest.mark.parametrize(("count", "sizes"), [(2, [5, 5]), (3, [4, 3, 3]), (10, [1] * 10)])
def test_a_split_by_classes_is_disjoint_whole_and_seeded(count: int, sizes: list[int]) -> None:
    def parts(seed: int) -> list[tuple[str, ...]]:
        return [t.classes for t in build_tasks(expand_specs(None, "digits", count, "classes"), load, seed)]

    assert [len(p) for p in parts(1)] == sizes
    assert sorted(c for part in parts(1) for c in part) == [str(c) for c in range(10)]
    assert parts(1) == parts(1)
    assert parts(1) != parts(2)


def test_a_single_class_under_its_own_head_is_noted() -> None:
    def notes(entries: list[dict[str, object]]) -> list[str]:
        return [note for note in data_notes(build_tasks(expand_specs(entries, ""), load, 0)) if "single class" in note]

    first, second = {"dataset": "digits", "classes": [1]}, {"dataset": "digits", "classes": [2]}
    (note,) = notes([first, {"dataset": "digits", "classes": [3, 4]}, second])
    assert note.startswith("task1_digits and 1 more: a single class under its own head, which is always right")
    assert notes([first, {**second, "head": "task1_digits"}]) == []


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_s_order_of_classes_is_recorded_and_taken_again(shared: bool, tmp_path: Path) -> None:
    """Whatever the seed of the run that takes it; names and indices mean the same."""
    config = parse(["dataset=digits", "experiment.split=classes", "experiment.num_tasks=3"]).config
    tasks = build_tasks(expand_specs(None, "digits", 3, "classes", shared_head=shared), load, seed=1)
    record_data(tmp_path, tasks, config)
    order = tmp_path / "class_order.json"
    assert sorted(json.loads(order.read_text())) == [str(c) for c in range(10)]
    for _ in range(2):
        specs = expand_specs(None, "digits", 3, "classes", shared_head=shared, class_order=str(order))
        again = build_tasks(specs, load, seed=2)
        assert [set(task.classes) for task in again] == [set(task.classes) for task in tasks]
        assert [len(task.train) for task in again] == [len(task.train) for task in tasks]
        order.write_text(json.dumps([int(c) for c in json.loads(order.read_text())]))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read"), ("{}", "JSON list"), ("[]", "JSON list"), ("[1.5]", "JSON list")]
)
def test_an_order_that_is_none_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text(text)
    with pytest.raises(NotFoundError, match=words):
        expand_specs(None, "digits", 3, "classes", class_order=str(tmp_path / "order.json"))
    (tmp_path / "order.json").write_text('["0", "ten"]')
    with pytest.raises(UsageError, match="class 'ten' is not in digits"):
        build_tasks(expand_specs(None, "digits", 2, "classes", class_order=str(tmp_path / "order.json")), load, seed=0)


def test_an_order_of_some_classes_is_noted_and_has_as_many_parts_as_it_can(tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text("[3, 1, 2]")

    def tasks(count: int) -> list[Task]:
        specs = expand_specs(None, "digits", count, "classes", class_order=str(tmp_path / "order.json"))
        return build_tasks(specs, load, seed=0)

    assert [task.classes for task in tasks(2)] == [("1", "3"), ("2",)]
    assert "digits: 7 of 10 classes are in no task: experiment.class_order" in data_notes(tasks(2))
    with pytest.raises(UsageError, match=r"num_tasks=4 .* experiment.class_order of digits has 3 classes"):
        tasks(4)


def test_more_parts_than_classes() -> None:
    with pytest.raises(UsageError, match=r"num_tasks=11 .* digits has 10 classes"):
        build_tasks(expand_specs(None, "digits", 11, "classes"), load, seed=0)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "name at least one task"),
        ([3], "allowed are a data set's name"),
        ([{"classes": [1]}], "allowed are a data set's name"),
        ([{"dataset": "digits", "clases": [1]}], "unknown key 'clases'"),
        ([{"dataset": "digits", "classes": 3}], "allowed is a list"),
        ([{"dataset": "digits", "classes": []}], "allowed is a list"),
        ([{"dataset": "digits", "transform": "invrt"}], "did you mean invert"),
        ([{"dataset": "digits", "transform": 3}], "transform=3; allowed is the name of a shift, or a list"),
        ([{"dataset": "digits", "transform": {"invert": 1}}], "allowed is the name of a shift, or a list"),
    ],
)
def test_malformed_lists(tasks: list, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        expand_specs(tasks, "digits")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [[10], [-1], ["ten"], [True], [1, 1], [1, "1"]])
def test_classes_that_are_not_there_or_twice(classes: list) -> None:
    with pytest.raises(UsageError, match=r"0 to 9|twice"):
        build_tasks(expand_specs([{"dataset": "digits", "classes": classes}], "digits"), load, seed=0)


def test_a_folder_with_an_odd_name_makes_a_name_for_paths(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "my ../ data (v1.0)".replace("/", "_"), ["a", "b"])
    (task,) = build_tasks([TaskSpec(str(folder))], load, seed=0)
    assert task.name == "task1_my_____data__v1_0_"
    assert task.dataset == folder.name
    long = write_tree(tmp_path / ("x" * 200), ["a", "b"])
    assert len(build_tasks([TaskSpec(str(long))], load, seed=0)[0].name) < 80


def test_held_out_split_is_stratified_and_fixed() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2)
    train, val = stratified_split(labels, 0.2)
    assert torch.bincount(labels[val]).tolist() == [2, 1, 1]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(17))
    assert torch.equal(stratified_split(labels, 0.2)[1], val)


def test_a_head_that_goes_on_has_the_old_classes_first() -> None:
    entries = [
        {"dataset": "digits", "classes": [3, 1]},
        "digits",
        {"dataset": "digits", "classes": [7, 1], "head": "task1_digits"},
        {"dataset": "digits", "classes": [0, 3], "transform": "invert", "head": "task3_digits"},
    ]
    tasks = build_tasks(expand_specs(entries, "x"), load, seed=0)
    assert [t.head for t in tasks] == ["task1_digits", "task2_digits", "task1_digits", "task1_digits"]
    assert (tasks[2].classes, tasks[3].classes) == (("3", "1", "7"), ("3", "1", "7", "0"))
    assert head_classes(tasks) == {"task1_digits": ("3", "1", "7", "0"), "task2_digits": tasks[1].classes}
    digits = load("digits")
    for task, wanted in ((tasks[2], {2: 7, 1: 1}), (tasks[3], {3: 0, 0: 3})):
        assert set(task.train.labels.unique().tolist()) == set(wanted)
        for split, source in ((task.train, digits.train), (task.val, digits.val)):
            for label, number in wanted.items():
                assert int((split.labels == label).sum()) == int((source.labels == number).sum())
                first = int((split.labels == label).nonzero()[0])
                assert torch.equal(split.image(first), source.image(int((source.labels == number).nonzero()[0])))


def test_a_head_goes_on_over_another_data_set_by_the_names_of_classes(tmp_path: Path) -> None:
    write_tree(tmp_path / "other", ("7", "many", "3"))
    entries = ["digits", {"dataset": str(tmp_path / "other"), "head": "task1_digits"}]
    other = build_tasks(expand_specs(entries, "x"), load, seed=0)[1]
    assert other.classes == (*map(str, range(10)), "many")
    assert other.train.labels.unique().tolist() == [3, 7, 10]
    assert other.train.image(0).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("entry", "words"), [("task2_digits", "is no earlier task; there are task1_digits"), (1, "name")]
)
def test_a_head_that_is_not_there(entry: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_tasks(expand_specs(["digits", {"dataset": "digits", "head": entry}], "x"), load, seed=0)


def test_tasks_are_all_found_or_missing() -> None:
    entries = [
        "digits",
        "nothing",
        {"dataset": "digits", "head": "task2_nothing"},
        {"dataset": "digits", "head": "task1_digits"},
    ]

    def some(name: str) -> Source:
        if name == "nothing":
            raise NotFoundError("not there")
        return load(name)

    found = find_tasks(expand_specs(entries, "x"), some, seed=0)
    assert [one.name for one in found] == ["task1_digits", "task2_nothing", "task3_digits", "task4_digits"]
    assert [one.why for one in found if isinstance(one, Missing)] == [
        "not there", "it goes on with the head of task2_nothing",
    ]  # fmt: skip
    assert found[3].head == "task1_digits"
