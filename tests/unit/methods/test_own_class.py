"""A method of the user's own, ``module:Class``: what is wrong with it is one line, and two of them are two."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from nostalgia import sweep
from nostalgia.config import parse, save
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.experiment.method_choice import complete_method
from nostalgia.logging.results import RunResults, write_results
from nostalgia.methods.loading import make_method, method_class, method_code

MODULES = {
    "fails": "import math\n\nmath.sqrt(-1)\n",
    "leaves": "raise SystemExit(3)\n",
    "misses": "import no_such_module_at_all\n",
    "unfinished": "def f(:\n",
    "one": "from nostalgia.methods import Method\n\nclass M(Method):\n    pass\n\nclass Odd(Method):\n    name = 'a b'\n"
    "\nclass Bad(Method):\n    def __init__(self, config, seed):\n        raise ValueError('no')\n\nNotOne = 3\n",
    "derived": "from nostalgia.methods.l2sp import L2Sp\n\nclass Mine(L2Sp):\n    pass\n\n"
    "class Named(L2Sp):\n    name = 'ewc'\n",
    "two": "from nostalgia.methods import Method\n\nclass M(Method):\n    name = 'mine'\n",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"own_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("own_fails:M", UsageError, "own_fails.py, line 3: ValueError"),
        ("own_leaves:M", UsageError, "own_leaves.py, line 1: SystemExit"),
        ("own_misses:M", UsageError, "own_misses.py, line 1: ModuleNotFoundError"),
        ("own_unfinished:M", UsageError, "SyntaxError"),
        ("own_nowhere:M", NotFoundError, "there is no module own_nowhere"),
        ("own_derived:Named", UsageError, "its name is 'ewc', as a built-in method's; give the class another"),
        ("own_one:Nothing", NotFoundError, "has no Nothing"),
        ("own_one:NotOne", UsageError, "not a class derived from"),
        ("own_one:Odd", UsageError, "its name is 'a b'"),
        ("own_one:Bad", UsageError, "own_one.py, line 11: ValueError: no"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        make_method(name, {}, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_without_a_name_has_its_class_s() -> None:
    assert method_class("own_one:M").name == "M"
    assert method_class("own_two:M").name == "mine"


def test_two_modules_methods_of_one_name_are_two_of_a_sweep(tmp_path: Path) -> None:
    words = ["--suite", "demo", "--methods", "own_one:M,own_two:M,finetune", "--seeds", "0"]
    cells = sweep.cells(sweep.read_options([*words, f"experiment.output_dir={tmp_path / 'runs'}"]))
    folders = [cell.job.folder for cell in cells]
    assert [cell.method for cell in cells] == ["own_one:M", "own_two:M", "finetune"]
    assert len(set(folders)) == 3


def test_a_class_derived_from_a_built_in_one_has_a_name_of_its_own() -> None:
    assert method_class("own_derived:Mine").name == "Mine"
    assert method_class("l2sp").name == "l2sp"


def test_a_finished_run_of_other_code_is_not_one_of_a_sweep(tmp_path: Path) -> None:
    config = parse(["--suite", "demo", "method=own_two:M"]).config
    complete_method(config)
    (tmp_path / "run").mkdir()
    save(config, tmp_path / "run" / "config.yaml")
    results = RunResults.of(
        tasks=["a"], classes=[["x"]], accuracy_matrix=[[1.0]], method="mine", seed=0, world_size=1, seconds=1.0,
        details={"method_code": method_code("own_two:M")},
    )  # fmt: skip
    write_results(tmp_path / "run" / "results", results)
    assert sweep.is_complete(tmp_path / "run", config)
    source = inspect.getsourcefile(method_class("own_two:M"))  # of the test that imported it
    assert source is not None
    with Path(source).open("a") as file:
        file.write("\nclass Other(M):\n    pass\n")
    with pytest.raises(UsageError, match=r"run of other settings \(the code of method=own_two:M"):
        sweep.is_complete(tmp_path / "run", config)


def test_code_is_that_of_the_user_s_files_alone() -> None:
    assert method_code("l2sp") == ""
    assert method_code("own_derived:Mine") != method_code("own_two:M")
