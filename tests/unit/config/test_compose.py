"""The command line: what composes, and the one line for what does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from nostalgia.config import parse, save
from nostalgia.config.checks import check_launch
from nostalgia.config.compose import config_folder
from nostalgia.errors import UsageError
from nostalgia.experiment.method_choice import complete_method

REFERENCE = (
    "dataset=cifar100", "dataset.root=/data", "dataset.batch_size=64", "model=resnet18", "model.framework=torchvision",
    "model.arch=resnet34", "model.use_lora=false", "experiment.name=mine", "experiment.tasks=[cifar100,caltech256]",
    "experiment.seed=3", "experiment.output_dir=out", "train.epochs=2", "train.epochs_per_task=[1,2]",
    "train.precision=16", "train.accelerator=gpu", "train.devices=1", "train.log_every_n_steps=5",
    "nostalgia.project_params=backbone", "nostalgia.top_k=8", "logger.use_wandb=true", "logger.project=p",
    "logger.entity=e", "logger.mode=offline", "logger.tags=[a,b]", "logger.group=g", "logger.save_dir=s",
    "logger.name=n",
)  # fmt: skip


def test_the_reference_words_are_understood() -> None:
    config = parse(list(REFERENCE)).config
    assert config.experiment.tasks == ["cifar100", "caltech256"]
    assert (config.model.arch, config.train.precision, config.logger.tags) == ("resnet34", "16", ["a", "b"])


@pytest.mark.parametrize("group", ["dataset", "model", "method", "suite"])
def test_every_file_composes(group: str) -> None:
    options = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
    assert options
    for option in options:
        parse([f"{group}={option}"])


def test_defaults_are_the_documented_ones() -> None:
    config = parse([]).config
    assert (config.train.epochs, config.train.lr, config.method["name"]) == (50, 3e-4, "nostalgia")
    assert config.model.use_lora


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.epchs=3"], "did you mean train.epochs"),
        (["trian.lr=1"], "did you mean train.lr"),
        (["+foo=1"], "unknown key foo"),
        (["train.epochs=abc"], "train.epochs"),
        (["train.epochs=0"], "1 or more"),
        (["train.lr=nan"], "more than 0"),
        (["nostalgia.topk=3"], "did you mean"),
        (["nostalgia.enabled=false"], "method=finetune"),
        (["curvature.kind=fisher"], "ggn, hessian"),
        (["experiment.head=shared"], "experiment.split=classes"),
        (["model=vti"], "did you mean vit"),
        (["--suite", "dmo"], "did you mean demo"),
        (["--sute", "demo"], "did you mean --suite"),
        (["experiment.tasks=[]"], "at least one task"),
        (["experiment.tasks=[a,b]", "experiment.num_tasks=3"], "names 2"),
        (["train.epochs_per_task=[1]"], "1 entries for 2 tasks"),
        (["method=joint", "train.epochs_per_task=[1,2]"], "trains once on all tasks: give train.epochs"),
        (["model=resnet18", "nostalgia.project_params=lora-only"], "without adapters"),
        (["train.lr=["], "cannot be read as KEY=VALUE"),
        (["dataset.root=a,b"], "quoted twice, once for the shell: \"dataset.root='a, b'\""),
        (["experiment.tasks=[./a:b:c,~]]"], "quoted twice"),
        (["model.model_id=${nowhere}"], "'nowhere' not found"),
        (["model=~/mine"], "model.model_id=NAME"),
        (["train.epochs"], "KEY=VALUE"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["train.epochs=99999999999999999999"], "up to 1e+06"),
        (
            ["--suite", "demo", "model.model_id=owner/net"],
            "would not be read: with model.pretrained=false model.config.model_type",
        ),
        (
            ["model=resnet18", "model.pretrained=false", "model.model_id=w.pt"],
            "would not be read: with model.pretrained=false model.arch",
        ),
    ],
)
def test_refusals_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--suite", "methods: {nostalgia: 3}", "methods.nostalgia=3: allowed are options by name"),
        ("--suite", "train: 3", "Merge error: int is not a subclass of TrainConfig"),
        ("--suite", "train: {epochz: 3}", "file.yaml: unknown key train.epochz; did you mean train.epochs?"),
        ("--suite", "trian: {epochs: 3}", "file.yaml: unknown key trian; did you mean train?"),
        ("--config", "[1, 2]", "not sections with values"),
        ("--config", "train: 3", "not sections with values"),
    ],
)
def test_a_file_that_is_none_is_refused_in_a_line_that_says_why(
    flag: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        parse([flag, str(tmp_path / "file.yaml")])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["~/data", "#1", "a=b", "a#b", "x~y", "~", "a b", "für mich", "日本", "(a)", "a]", "it's", 'say "x"', "a;b", "a&b", "!x",
     "a\\b", "\\", "C:\\pics\\", "true", "007", "1_000", "1e3", "/a b/c#d=e ~f/ü", "'", "100%", "<>"],
)  # fmt: skip
def test_a_text_is_taken_as_it_is(value: str, tmp_path: Path) -> None:
    """On the command line, within a list, and from the file of a run."""
    config = parse([f"dataset.root={value}", f"dataset.entries.mine.path={value}"]).config
    assert config.dataset.root == value
    assert str(config.dataset.entries["mine"]["path"]) in (value, "True", "7", "1000", "1000.0")  # of any type
    save(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]).config.dataset.root == value
    again = parse(["--config", str(tmp_path / "config.yaml"), f"logger.name={value}"]).config
    assert again.logger.name == value


@pytest.mark.parametrize("value", ["~/data", "./a#b", "./a=b", "./a b", "./für", "~/x", "./a;b", "hf:user/name"])
def test_a_text_in_a_list_or_a_mapping_is_taken_as_it_is(value: str) -> None:
    words = [f"experiment.tasks=[digits, {value},{{dataset: {value}, classes: [0, 1]}}]"]
    assert parse(words).config.experiment.tasks == ["digits", value, {"dataset": value, "classes": [0, 1]}]


def test_a_saved_configuration_runs_again(tmp_path: Path) -> None:
    first = parse(["--suite", "demo", "experiment.seed=7"]).config
    save(first, tmp_path / "config.yaml")
    again = parse(["--config", str(tmp_path / "config.yaml")]).config
    assert again == first
    assert parse(["--config", str(tmp_path / "config.yaml"), "train.lr=0.5"]).config.train.lr == 0.5


def test_debug_leaves_the_last_word_to_the_command_line() -> None:
    config = parse(["--debug", "--suite", "demo", "train.epochs=3"]).config
    assert (config.train.epochs, config.train.max_steps_per_epoch) == (3, 2)
    samples = []
    for words in ([], ["method.tail_samples=40"], ["nostalgia.top_k=2", "method.tail_samples=40"]):
        config = parse(["--debug", "--suite", "demo", "method=nostalgia", *words]).config
        complete_method(config)
        samples.append((config.method["tail_samples"], config.method["top_k"]))
    assert samples == [(8, 2), (40, 2), (40, 2)]


def test_debug_on_a_cpu_takes_fewer_images_a_step_where_none_are_named() -> None:
    def batch(device: str, *words: str) -> int:
        request = parse(["--debug", "dataset=cifar100", *words])
        notes = request.fit_to(device)
        assert bool(notes) == (request.config.dataset.batch_size == 32), notes
        return request.config.dataset.batch_size

    assert (batch("cpu"), batch("cuda")) == (32, 128)
    assert (batch("cpu", "dataset.batch_size=64"), batch("cpu", "++dataset.batch_size=16")) == (64, 16)
    request = parse(["dataset=cifar100"])
    assert request.fit_to("cpu") == []
    assert request.config.dataset.batch_size == 128


def test_any_name_may_be_a_dataset() -> None:
    assert parse(["dataset=hf:user/name"]).config.dataset.name == "hf:user/name"
    assert parse(["dataset=/a folder/of images"]).config.dataset.name == "/a folder/of images"
    assert parse(["dataset=/an owner's/images"]).config.dataset.name == "/an owner's/images"


def test_what_the_launcher_decides() -> None:
    config = parse([]).config
    assert check_launch(config, device_type="cpu", world_size=2) == "32"
    config.train.precision = "16"
    with pytest.raises(UsageError, match="needs a GPU"):
        check_launch(config, device_type="cpu", world_size=1)
    config.train.precision, config.train.devices = "auto", 4
    with pytest.raises(UsageError, match="nproc_per_node 4"):
        check_launch(config, device_type="cpu", world_size=2)
    config = parse([f"experiment.seed={2**32 - 1}"]).config
    check_launch(config, device_type="cpu", world_size=1)
    with pytest.raises(UsageError, match=r"experiment.seed=4294967295: allowed with 2 processes .* up to 4294967294"):
        check_launch(config, device_type="cpu", world_size=2)


def test_every_data_set_of_the_catalog_goes_by_its_name() -> None:
    """With a file, which suites name in their defaults, or without."""
    from nostalgia.data.catalog import CATALOG

    files = {
        path.stem: yaml.safe_load(path.read_text())["name"] for path in (config_folder() / "dataset").glob("*.yaml")
    }
    assert files == {name: name for name in files}
    assert set(files) < set(CATALOG)
    for name in CATALOG:
        assert parse([f"dataset={name}"]).config.dataset.name == name
    table = (config_folder().parent / "docs" / "data_and_models.md").read_text()
    assert all(f"| `{name}` |" in table for name in CATALOG)


@pytest.mark.parametrize(
    ("suite", "tasks"),
    [
        ("main", ["cifar100", "tinyimagenet", "caltech256"]),
        ("robustness", ["imagenet100", "imagenet-r", "imagenet-a"]),
        ("finegrained", ["cifar100", "cub200", "flowers102"]),
        ("ablation", ["cifar10", "mnist"]),
        ("rank_ablation", ["cifar10", "mnist", "cifar100"]),
        ("five_datasets", ["cifar10", "mnist", "svhn", "fashion_mnist", "eurosat"]),
        (
            "domainnet_6",
            [f"domainnet-{d}" for d in ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]],
        ),
    ],
)
def test_suites_name_their_tasks_and_the_command_line_has_the_last_word(suite: str, tasks: list[str]) -> None:
    config = parse(["--suite", suite]).config
    assert (config.experiment.tasks, config.model.name) == (tasks, "vit")
    config = parse(["--suite", suite, "experiment.tasks=[digits]", "model=resnet18", "train.epochs=2"]).config
    assert (config.experiment.tasks, config.model.arch, config.train.epochs) == (["digits"], "resnet18", 2)


@pytest.mark.parametrize(
    ("suite", "dataset", "num_tasks", "epochs"),
    [
        ("cifar100_10", "cifar100", 10, 20),
        ("cifar100_20", "cifar100", 20, 20),
        ("imagenet_r_10", "imagenet-r", 10, 50),
        ("cub200_10", "cub200", 10, 50),
        ("split_fashion", "fashion_mnist", 5, 1),
    ],
)
def test_suites_that_split_one_data_set(suite: str, dataset: str, num_tasks: int, epochs: int) -> None:
    config = parse(["--suite", suite]).config
    assert (config.dataset.name, config.experiment.split, config.experiment.tasks) == (dataset, "classes", None)
    assert (config.experiment.num_tasks, config.train.epochs) == (num_tasks, epochs)


@pytest.mark.parametrize("path", sorted((config_folder() / "suite").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_suite_says_its_command_data_time_and_figures(path: Path) -> None:
    said = dict(re.findall(r"^# (\w+) +(\S.*)$", path.read_text(), re.MULTILINE))
    assert {"Command", "Needs", "Takes", "Expect"} <= said.keys()
    assert path.stem in said["Command"]
    config = parse(["--suite", path.stem]).config
    assert config.experiment.name == path.stem
    assert parse(["--suite", str(path)]).config == config  # as a file of the user's own


def test_glyphs_lie_under_the_root() -> None:
    config = parse(["--suite", "glyphs", "dataset.root=/there"]).config
    assert config.dataset.entries.keys() == set(config.experiment.tasks or [])
    assert config.dataset.entries["greek"] == {"path": "/there/glyphs/greek"}


def test_another_library_takes_nothing_from_the_files_network() -> None:
    model = parse(["model=vit", "model.framework=torchvision", "model.arch=resnet50"]).config.model
    assert (model.name, model.model_id, model.arch, model.use_lora) == ("resnet50", None, "resnet50", True)
    model = parse(["model=vit_tiny", "model.framework=torchvision", "model.arch=vgg11", "model.config.dropout=0"])
    assert model.config.model.config == {"dropout": 0}
    model = parse(["model=resnet50", "model.framework=hf", "model.model_id=owner/net"]).config.model
    assert (model.name, model.model_id, model.arch) == ("net", "owner/net", None)
    kept = parse(["model=vit", "model.framework=hf"]).config.model
    assert (kept.name, kept.model_id) == ("vit", "google/vit-base-patch16-224")


def test_a_saved_configuration_may_change_its_library(tmp_path: Path) -> None:
    save(parse(["model=vit_tiny"]).config, tmp_path / "config.yaml")
    words = ["model.framework=torchvision", "model.arch=resnet18"]
    model = parse(["--config", str(tmp_path / "config.yaml"), *words]).config.model
    assert (model.arch, model.config) == ("resnet18", {})
    words = ["model.config.hidden_size=32", "dataset.entries.mine.path=/x"]
    config = parse(["--config", str(tmp_path / "config.yaml"), *words]).config
    assert config.model.config["hidden_size"] == 32
    assert config.dataset.entries == {"mine": {"path": "/x"}}


def test_keys_of_the_users_own_need_no_plus() -> None:
    config = parse(["dataset=mine", "dataset.entries.mine.path=/x", "model.config.image_mean=[0.5,0.5,0.5]"]).config
    assert config.dataset.entries == {"mine": {"path": "/x"}}
    assert config.model.config["image_mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "words",
    [
        ["experiment.num_tasks=3", "nostalgia.projection_start_task=3"],
        ["experiment.num_tasks=1"],
        ["method=finetune", "nostalgia.projection_start_task=3"],
    ],
)
def test_a_start_of_projection_that_comes_or_is_not_wanted_is_allowed(words: list[str]) -> None:
    parse(words)


@pytest.mark.parametrize("key", ["retain_graph", "predict_forgetting"])
def test_switches_are_understood_unquoted(key: str) -> None:
    for word in ("true", "false", "auto"):
        config = parse([f"nostalgia.{key}={word}"]).config
        assert (config.curvature.retain_graph, config.analysis.predict_forgetting)[key != "retain_graph"] == word
    with pytest.raises(UsageError, match=f"{key}=maybe: allowed are auto, true, false"):
        parse([f"nostalgia.{key}=maybe"])


def test_joint_training_has_no_forgetting_to_predict() -> None:
    with pytest.raises(UsageError, match=r"predict_forgetting=true with method=joint.*use auto or false"):
        parse(["method=joint", "nostalgia.predict_forgetting=true"])


def test_the_demo_with_another_network() -> None:
    assert parse(["--suite", "demo"]).config.model.config["patch_size"] == 2
    assert parse(["--suite", "demo"]).config.model.config["hidden_size"] == 64
    model = parse(["--suite", "demo", "model=resnet18"]).config.model
    assert (model.name, model.arch, model.config) == ("resnet18", "resnet18", {})
