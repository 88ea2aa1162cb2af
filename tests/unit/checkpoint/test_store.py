"""Checkpoints on disk: whole or absent, verified before use, and nothing in them that runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
import torch

from nostalgia.checkpoint import files, store
from nostalgia.checkpoint.store import TASK_END, CheckpointContents, CheckpointStore, newest
from nostalgia.errors import NotFoundError


def contents(number: int, kind: str = "step", references: dict[str, str] | None = None) -> CheckpointContents:
    tensors = {"backbone/weight": torch.full((3, 2), float(number)), "ranks/0/torch": torch.arange(9).byte()}
    label = f"task1_{kind if kind == TASK_END else 'train'}"
    return CheckpointContents(label, kind, {"run": {"step": number}}, tensors, references or {})


def write(run_dir: Path, *numbers: int, keep: int = 2) -> CheckpointStore:
    made = CheckpointStore(run_dir, keep)
    for number in numbers:
        made.write(contents(number), background=number % 2 == 0)
    made.wait()
    return made


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = newest(tmp_path)
    assert found is not None
    assert found.state() == {"run": {"step": 1}}
    assert torch.equal(found.tensors()["backbone/weight"], torch.ones(3, 2))
    assert found.tensors()["ranks/0/torch"].dtype == torch.uint8


def test_no_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None


def test_the_last_ones_and_those_at_the_end_of_a_task_stay(tmp_path: Path) -> None:
    made = write(tmp_path, 1, 2)
    made.write(contents(3, TASK_END), background=False)
    for number in (4, 5, 6):
        made.write(contents(number), background=True)
    made.wait()
    assert names(tmp_path) == ["000003_task1_end_of_task", "000005_task1_train", "000006_task1_train"]
    assert CheckpointStore(tmp_path, 2)._next == 7


def test_vectors_of_an_eigensolve_go_with_their_checkpoint(tmp_path: Path) -> None:
    made = CheckpointStore(tmp_path, 1)
    for number in (1, 2):
        name = f"checkpoints/blocks/eigensolve_{number}.safetensors"
        digest = files.write_block(tmp_path / name, iter(torch.ones(2, 5)), (2, 5), torch.float32)
        made.write(contents(number, references={name: digest}), background=False)
    assert names(tmp_path / "checkpoints" / "..") == ["000002_task1_train", "blocks"]
    assert [p.name for p in (tmp_path / "checkpoints/blocks").iterdir()] == ["eigensolve_2.safetensors"]


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_serves(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / "checkpoints/000002_task1_train" / name
    whole, draw = path.read_bytes(), random.Random(name)
    damaged = [flipped(whole, draw) for _ in range(50)] + [whole[: draw.randrange(len(whole))] for _ in range(10)]
    for data in [*damaged, b""]:
        path.write_bytes(data)
        found = newest(tmp_path)
        assert found is not None
        assert found.folder.name == "000001_task1_train"
        assert len(found.damaged) == 1
        assert str(path) in found.damaged[0]
    path.unlink()
    found = newest(tmp_path)
    assert found is not None
    assert str(path) in found.damaged[0]


def test_all_damaged_is_an_error_and_no_new_beginning(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoints/000001_task1_train/state.json").unlink()
    with pytest.raises(NotFoundError, match=r"no whole checkpoint .*state\.json: cannot be read"):
        newest(tmp_path)


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        made.write(contents(3), background=False)
    made.write(contents(4), background=True)
    with pytest.raises(OSError, match="No space left"):
        made.wait()
    assert names(tmp_path) == ["000001_task1_train"]
    monkeypatch.undo()
    found = newest(tmp_path)
    assert found is not None
    assert found.damaged == ()


def test_what_a_killed_process_left_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    write(tmp_path, 1)
    half = tmp_path / "checkpoints/.000002_task1_train.tmp"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    found = newest(tmp_path)
    assert found is not None
    assert found.folder.name.startswith("000001")
    store.clean(tmp_path)
    assert names(tmp_path) == ["000001_task1_train"]


def test_a_manifest_cannot_point_outside_the_run(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    run_dir = tmp_path / "run"
    made = CheckpointStore(run_dir, 2)
    made.write(contents(1, references={"../secret": files.checksum(tmp_path / "secret")}), background=False)
    with pytest.raises(NotFoundError, match="outside the run's folder"):
        newest(run_dir)


def test_a_block_is_read_row_by_row_in_its_own_precision(tmp_path: Path) -> None:
    block = torch.randn(3, 7).to(torch.bfloat16)
    path = tmp_path / "deep" / "block.safetensors"
    digest = files.write_block(path, iter(block), (3, 7), torch.bfloat16)
    assert digest == files.checksum(path)
    assert torch.equal(torch.stack(list(files.BlockFile(path, 7))), block)
    assert torch.equal(files.read_tensors(path)["basis"], block)  # as any reader of the format sees it
    with pytest.raises(NotFoundError, match="expected are rows of 8 numbers"):
        files.BlockFile(path, 8)
    files.write_block(path, iter([torch.tensor([1.0, float("nan")])]), (1, 2), torch.float32)
    with pytest.raises(NotFoundError, match="row 1 holds values that are not finite"):
        list(files.BlockFile(path, 2))


def test_mutated_checkpoints_never_run_code_nor_crash(tmp_path: Path) -> None:
    """500 folders with changed bytes, pickles for tensors, well-signed nonsense: served, passed over or one error."""
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints/000001_task1_train"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    marker = tmp_path / "ran"
    pickled = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    draw = random.Random(5)
    for _ in range(500):
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        name = draw.choice(sorted(whole))
        data = draw.choice([flipped(whole[name], draw), pickled, nonsense(draw)])
        (folder / name).write_bytes(data)
        if draw.random() < 0.7:
            sign(folder)
        with contextlib.suppress(NotFoundError):
            found = newest(tmp_path)
            assert found is not None
            assert isinstance(found.state(), dict)
            assert all(isinstance(value, torch.Tensor) for value in found.tensors().values())
    assert not marker.exists()


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def nonsense(draw: random.Random) -> bytes:
    value = draw.choice([None, [], {"a": 1}, "text", 7, {"files": []}, {"__class__": "os.system"}, [[[[]]]]])
    return draw.choice([json.dumps(value).encode(), draw.randbytes(40), (2**60).to_bytes(8, "little") + b"{}", b""])


def sign(folder: Path) -> None:
    """A manifest that fits the files as they are, where the manifest itself is one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        manifest.pop("checksum", None)
        for name, entry in manifest["files"].items():
            data = (folder / name).read_bytes()
            entry.update(bytes=len(data), sha256=files.checksum(folder / name))
    except (ValueError, AttributeError, TypeError, KeyError, OSError):
        return
    manifest["checksum"] = files._digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
