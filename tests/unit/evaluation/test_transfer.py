"""Hand-computed values of the transfer measures."""

from __future__ import annotations

import pytest

from nostalgia.evaluation import transfer

THREE = [[0.9, None, None], [0.95, 0.8, None], [0.6, 0.7, 0.85]]
JOINT = [[None, None, None], [None, None, None], [0.9, 0.8, 0.7]]


def test_three_tasks_by_hand() -> None:
    assert transfer.acc(THREE) == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    assert transfer.bwt(THREE) == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    # Task 1 was best after task 2 (0.95), not when it was learned.
    assert transfer.forgetting(THREE) == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2)
    assert transfer.forgetting_per_task(THREE) == pytest.approx([0.35, 0.1])
    assert transfer.learning_accuracy(THREE) == pytest.approx((0.9 + 0.8 + 0.85) / 3)
    assert transfer.average_accuracies(THREE) == pytest.approx([0.9, 0.875, (0.6 + 0.7 + 0.85) / 3])


def test_forgetting_is_negative_where_later_tasks_helped() -> None:
    matrix = [[0.5, None], [0.7, 0.8]]
    assert transfer.forgetting(matrix) == pytest.approx(-0.2)
    assert transfer.bwt(matrix) == pytest.approx(0.2)


def test_one_task_has_no_transfer() -> None:
    assert transfer.acc([[0.7]]) == 0.7
    assert transfer.learning_accuracy([[0.7]]) == 0.7
    assert transfer.bwt([[0.7]]) is None
    assert transfer.forgetting([[0.7]]) is None
    assert transfer.fwt([0.5], [0.4]) is None


def test_joint_fills_only_the_last_row() -> None:
    assert transfer.acc(JOINT) == pytest.approx(0.8)
    assert transfer.bwt(JOINT) is None
    assert transfer.forgetting(JOINT) is None
    assert transfer.learning_accuracy(JOINT) is None
    assert transfer.average_accuracies(JOINT) == [None, None, pytest.approx(0.8)]


def test_a_run_under_way_counts_the_tasks_it_has_finished() -> None:
    under_way = [*THREE[:2], [None, None, None]]
    assert transfer.finished_rows(under_way) == [[0.9, None], [0.95, 0.8]]
    assert transfer.acc(under_way) == pytest.approx(0.875)
    assert transfer.bwt(under_way) == pytest.approx(0.05)
    assert transfer.acc([[None, None], [None, None]]) is None
    assert transfer.acc([]) is None


def test_rows_may_end_at_the_diagonal() -> None:
    ragged = [[0.9], [0.95, 0.8], [0.6, 0.7, 0.85]]
    for measure in (transfer.acc, transfer.bwt, transfer.forgetting, transfer.learning_accuracy):
        assert measure(ragged) == measure(THREE)


def test_a_missing_accuracy_makes_what_needs_it_none() -> None:
    matrix = [[0.9, None, None], [None, 0.8, None], [0.6, 0.7, 0.85]]
    assert transfer.bwt(matrix) == pytest.approx(-0.2)
    assert transfer.forgetting(matrix) is None
    assert transfer.acc([[0.9, None], [None, 0.8]]) is None


def test_fwt_skips_the_first_task() -> None:
    assert transfer.fwt([0.1, 0.6, 0.5], [0.9, 0.5, 0.2]) == pytest.approx((0.1 + 0.3) / 2)
    assert transfer.fwt([None, 0.6], [None, 0.5]) == pytest.approx(0.1)
    assert transfer.fwt(None, [0.1, 0.2]) is None
    assert transfer.fwt([0.1, None], [0.1, 0.2]) is None
    with pytest.raises(ValueError, match="zip"):
        transfer.fwt([0.1, 0.2], [0.1, 0.2, 0.3])
