"""Composes the configuration from the files under ``configs/`` and the command line, by Hydra's compose API."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nostalgia.config.aliases import EVERY_METHOD, present_key, translate_saved
from nostalgia.config.checks import check
from nostalgia.config.saved import load_saved, load_suite
from nostalgia.config.schema import Config
from nostalgia.config.words import quoted, read_word
from nostalgia.errors import NotFoundError, UsageError
from nostalgia.options import nearest
from nostalgia.utils.arguments import CommandParser

GROUPS = ("dataset", "model", "method", "train", "logger", "suite")
FREE_KEYS = ("model.config", "dataset.entries")  # what stands below them is the user's

# What --debug changes; the command line still has the last word.
DEBUG = (
    "train.epochs=1",
    "train.epochs_per_task=null",
    "train.warmup_epochs=0",
    "train.max_steps_per_epoch=2",
    "train.max_eval_batches=1",
    "train.log_every_n_steps=1",
    "nostalgia.top_k=2",
    "nostalgia.k_max=null",
    f"methods.{EVERY_METHOD}.num_samples=8",
    f"methods.{EVERY_METHOD}.tail_samples=8",
    "curvature.max_basis=null",
    "curvature.num_samples=8",
    "curvature.tol=0.5",
    "curvature.max_products=8",
    "analysis.captured_energy_samples=8",
    "analysis.top_k=2",
    "analysis.trace_samples=1",
    "dataset.num_workers=0",
    "experiment.deterministic=true",
)

EXAMPLES = """examples:
  accelerate launch -m nostalgia.train --suite main
  python -m nostalgia.train --suite demo method=finetune
  python -m nostalgia.train dataset=digits model=vit_tiny experiment.num_tasks=2 train.epochs=20
  python -m nostalgia.train experiment.tasks=[cifar100,cub200,flowers102] model=vit dataset.root=/data
  python -m nostalgia.train dataset=digits experiment.split=classes experiment.num_tasks=5 model=vit_tiny
  python -m nostalgia.train --debug --suite main      a few batches a task, everything else real
  python -m nostalgia.train --suite main --dry-run    what would run, and which data is there; trains nothing
  python -m nostalgia.train --config RUN_DIR/config.yaml
  python -m nostalgia.train --resume RUN_DIR          go on where a run was interrupted, to the bit

KEY=VALUE words are Hydra overrides of the files under configs/. Exit codes: 0 done, 2 wrong usage or
configuration, 3 data or weights not found, 4 run failed, 75 interrupted with a checkpoint written.
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    config: Config
    suite: str | None
    debug: bool
    dry_run: bool
    quiet: bool
    argv: tuple[str, ...]
    run_dir: Path | None = None  # the run's folder, where it is given
    resume: str | None = None  # "must" go on in ``run_dir``, or "auto": begin there where there is no run
    resume_override: bool = False


def parse(argv: list[str]) -> Request:
    """The checked configuration for a command line; raises UsageError with one line for anything wrong in it."""
    flags, words = _parser().parse_known_args(argv)
    for word in words:
        if word.startswith("-"):
            raise UsageError(f"unknown option {word.split('=')[0]}{_nearest(word.split('=')[0], _flags())}")
        if "=" not in word and not word.startswith("~"):
            raise UsageError(f"cannot read {word!r}: expected KEY=VALUE, such as train.epochs=20")
    if flags.suite is not None:
        words.insert(0, f"suite={_suite(flags.suite)}")
    words = [translated for word in words if (translated := _translate(word))]
    if flags.resume_override and flags.resume is None:
        raise UsageError("--resume-override goes with --resume RUN_DIR")
    suite = next((w.removeprefix("suite=") for w in reversed(words) if w.startswith("suite=")), None)
    debug = [_translate(word) for word in DEBUG] if flags.debug else []
    groups = [w for w in words if w.split("=")[0].lstrip("+") in GROUPS]
    run_dir = None if flags.run_dir is None else Path(flags.run_dir)
    resume = flags.resume
    if resume == "auto" and run_dir is None:
        raise UsageError("--resume auto needs --run-dir DIR: the folder to go on in, or to begin in")
    if resume not in (None, "auto", "latest"):
        if run_dir is not None:
            raise UsageError(f"--resume {resume} names the folder itself: leave --run-dir out")
        run_dir = Path(resume)
    if flags.config is not None:
        config = _checked(_with_own_model(debug + words, lambda given: _from_file(Path(flags.config), given)))
    elif resume not in (None, "auto", "latest") and not groups:
        config = _checked(_with_own_model(debug + words, lambda given: _from_run(Path(resume), given)))
    else:
        words = groups + debug + [w for w in words if w not in groups]
        config = _checked(_with_own_model(words, _compose))
    if resume == "latest" and run_dir is None:
        run_dir = (Path(config.experiment.output_dir).expanduser() / "latest").resolve()
    return Request(
        config=config,
        suite=None if suite is None else suite.removeprefix(OWN_SUITE),
        debug=flags.debug,
        dry_run=flags.dry_run,
        quiet=flags.quiet,
        argv=tuple(argv),
        run_dir=run_dir,
        resume=None if resume is None else "auto" if resume == "auto" else "must",
        resume_override=flags.resume_override,
    )


def config_folder() -> Path:
    """``configs/``: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UsageError(f"no configs/config.yaml in {package} or beside it: the installation is incomplete")


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def save(config: Config, path: Path) -> None:
    """Write the complete configuration, so that ``--config PATH`` runs it again; whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(to_yaml(config), encoding="utf-8")
    os.replace(temporary, path)


def known_keys() -> list[str]:
    """All dotted keys of the configuration."""

    def walk(kind: Any, prefix: str) -> list[str]:
        keys = []
        for item in fields(kind):
            value = item.default_factory() if callable(item.default_factory) else item.default
            name = f"{prefix}{item.name}"
            keys.append(name)
            if is_dataclass(value):
                keys += walk(value, f"{name}.")
        return keys

    return walk(Config, "")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="nostalgia.train",
        usage="python -m nostalgia.train [--suite NAME|FILE.yaml] [options] [KEY=VALUE ...]",
        description="Continual fine-tuning of a vision backbone that does not forget.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--suite", metavar="NAME", help=f"one of {', '.join(_options('suite'))}, or a YAML file of your own"
    )
    parser.add_argument("--debug", action="store_true", help="a few batches and products a task, deterministic")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, with each data set; train nothing"
    )
    parser.add_argument("--config", metavar="FILE", help="run a saved config.yaml again")
    parser.add_argument(
        "--resume",
        metavar="RUN_DIR",
        help="go on with a run that was interrupted: its folder, `latest`, or `auto` (go on in --run-dir where there "
        "is a run, else begin there)",
    )
    parser.add_argument("--run-dir", metavar="DIR", help="the run's folder, instead of a new one by date and time")
    parser.add_argument("--resume-override", action="store_true", help="go on although the configuration has changed")
    parser.add_argument("--quiet", action="store_true", help="do not print the configuration")
    return parser


def _flags() -> list[str]:
    return [option for action in _parser()._actions for option in action.option_strings]


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


OWN_SUITE = "own__"  # how Hydra knows a suite of the user's own: its file's name after this


def _suite(given: str) -> str:
    """The name that Hydra knows a suite by; one in a file of the user's own is made known to it."""
    if not given.endswith((".yaml", ".yml")):
        return given
    name = OWN_SUITE + re.sub(r"\W", "_", Path(given).stem)
    ConfigStore.instance().store(group="suite", name=name, node=load_suite(given), package="_global_")
    return name


def _translate(word: str) -> str:
    """A word under its present key, its group choice checked before Hydra does; ``dataset=`` takes any name."""
    key, _, value = word.partition("=")
    bare = key.lstrip("+~")
    if bare == "nostalgia" and value == "default":
        return ""  # the group that once held what is now in the method's own file
    if "=" not in word:
        return word
    if bare != present_key(bare):
        return f"{present_key(bare)}={value}"
    if any(key.startswith(f"{free}.") for free in FREE_KEYS):
        return f"++{word}"  # new there or not
    if bare not in GROUPS:
        return word
    if value in _options(bare) or (key == "suite" and (value == "null" or value.startswith(OWN_SUITE))):
        return word
    if key == "dataset":
        return f"dataset.name={quoted(value)}"
    if key == "method" and ":" in value:
        return f"method.name={quoted(value)}"
    options = _options(bare)
    own = "; a folder or hub name goes by model.model_id=NAME" if key == "model" and "/" in value else ""
    raise UsageError(f"unknown {bare} {value!r}{_nearest(value, options)}; there are {', '.join(options)}{own}")


def _with_own_model(words: list[str], compose: Callable[[list[str]], Any]) -> Any:
    """``compose(words)``, in which a network that the words choose takes nothing from the file of another.

    Another library than the file's: its weights, architecture and settings belong to the other one and go, unless
    they are given too. The name in results follows what was chosen.
    """
    try:
        return _own_model(words, compose)
    except OmegaConfBaseException as error:  # what a word's ${...} refers to
        raise UsageError(_one_line(error)) from None


def _own_model(words: list[str], compose: Callable[[list[str]], Any]) -> Any:
    given = {word.partition("=")[0].lstrip("+") for word in words}
    model = (composed := compose(words)).model
    if "model.framework" in given:
        file = compose([word for word in words if not word.startswith("model.framework=")]).model
        if file.framework != model.framework:
            model.arch = model.arch if "model.arch" in given else None
            model.model_id = model.model_id if "model.model_id" in given else None
            if "model.lora.target_modules" not in given:
                model.lora.target_modules = None
            with open_dict(model.config):
                for key in set(file.config) - {name.removeprefix("model.config.") for name in given}:
                    model.config.pop(key)
    if given & {"model.arch", "model.model_id"} and "model.name" not in given:
        network = model.arch or model.model_id
        model.name = Path(network).name if network else model.name
    return composed


def _compose(words: list[str]) -> Any:
    ConfigStore.instance().store(name="schema", node=Config)
    GlobalHydra.instance().clear()
    try:
        overrides = _parsed(words)
        of_methods = [one for one in overrides if _of_methods(one)]
        with initialize_config_dir(version_base=None, config_dir=str(config_folder())):
            composed = compose("config", overrides=[str(one.input_line) for one in overrides if not _of_methods(one)])
        _apply_method_words(composed, of_methods)
        return composed
    except HydraException as error:
        raise UsageError(_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from None


def _parsed(words: list[str]) -> list[Override]:
    """Words as Hydra's grammar reads them, their keys checked."""
    overrides = [read_word(word) for word in words]
    for override in overrides:
        _check_key(override)
    return overrides


def _of_methods(override: Override) -> bool:
    return override.key_or_group.startswith(("method.", "methods."))


def _apply_method_words(composed: Any, overrides: list[Override]) -> None:
    """Options of the method: those of its file, then `methods.<name>`, then the command line's ``method.<option>``.

    What is meant for every method that has it (`EVERY_METHOD`), or for none of the built-in ones, is left for when the
    method's class is known.
    """
    method: dict[str, Any] = OmegaConf.to_container(composed["method"], resolve=True)  # type: ignore[assignment]
    methods: dict[str, Any] = OmegaConf.to_container(composed["methods"], resolve=True)  # type: ignore[assignment]
    given: dict[str, Any] = {}
    for override in overrides:
        group, _, rest = override.key_or_group.partition(".")
        if override.is_delete():
            raise UsageError(f"~{override.key_or_group}: leave the option out instead")
        if group == "method":
            given[rest] = override.value()
        else:
            owner, _, option = rest.rpartition(".")
            methods.setdefault(owner, {})[option] = override.value()
    name = str(given.get("name", method.get("name")))
    if name != method.get("name"):
        method = {"name": name}
    every = {key: value for key, value in methods.get(EVERY_METHOD, {}).items() if key not in given}
    method = {**method, **methods.get(name, {}), **given}
    known = {*_options("method"), name, EVERY_METHOD}
    # The name of a class of the user's own is known when it is loaded.
    left = {owner: values for owner, values in methods.items() if owner not in known}
    with open_dict(composed):
        composed["method"], composed["methods"] = method, {**left, **({EVERY_METHOD: every} if every else {})}


def _from_file(path: Path, words: list[str]) -> Any:
    """A saved configuration, complete, with overrides of values on top."""
    if any(word.split("=")[0].lstrip("+") in GROUPS for word in words):
        raise UsageError("--config FILE is a complete configuration: override values (train.lr=1e-3), not groups")
    try:
        loaded = OmegaConf.create(translate_saved(OmegaConf.to_container(load_saved(path))))  # type: ignore[arg-type]
        missing = [key for key in Config.__dataclass_fields__ if key not in loaded and key != "methods"]
        if missing:
            raise UsageError(f"{path}: no section {missing[0]!r}; give a config.yaml that a run has written")
        method, methods = loaded.pop("method"), loaded.pop("methods", {})
        composed: Any = OmegaConf.merge(OmegaConf.structured(Config), loaded)
        with open_dict(composed):
            composed["method"], composed["methods"] = method, methods
        overrides = _parsed(words)
        for override in overrides:
            if not _of_methods(override):
                OmegaConf.update(composed, override.key_or_group, override.value(), force_add=True)
        _apply_method_words(composed, [one for one in overrides if _of_methods(one)])
        return composed
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({_one_line(error)})") from None
    except (HydraException, OmegaConfBaseException, TypeError) as error:
        raise UsageError(f"--config {path}: {_one_line(error)}") from None


def _from_run(folder: Path, words: list[str]) -> Any:
    """The configuration of a run that exists, with overrides of values on top."""
    if not (folder / "config.yaml").is_file():
        what = "has no config.yaml: not a run's folder" if folder.is_dir() else "no such folder"
        raise NotFoundError(f"--resume {folder}: {what}; give the folder of a run, or latest")
    return _from_file(folder / "config.yaml", words)


def _check_key(override: Override) -> None:
    key = override.key_or_group
    keys = known_keys()
    if key in GROUPS or key in keys or any(key.startswith(f"{free}.") for free in FREE_KEYS):
        return
    if key.startswith("method.") or (key.startswith("methods.") and key.count(".") > 1):
        return  # the method's own, checked by its class
    raise UsageError(f"unknown key {key}{_nearest(key, keys)}")


def _checked(composed: Any) -> Config:
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from None
    assert isinstance(config, Config)
    # On the command line `true` is a boolean, which a key of words turns into "True".
    config.curvature.retain_graph = config.curvature.retain_graph.lower()
    config.analysis.predict_forgetting = config.analysis.predict_forgetting.lower()
    check(config)
    return config


def _nearest(word: str, options: list[str]) -> str:
    close = nearest(word, options)
    if not close and "." in word:  # the right key in the wrong group
        close = next((f"; did you mean {one}?" for one in options if one.endswith("." + word.rsplit(".", 1)[1])), "")
    if not close:
        close = next((f"; did you mean {one}?" for one in options if one.endswith("." + word)), "")
    return close


def _one_line(error: BaseException) -> str:
    """The innermost message of a chain of errors, with the key it is about, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    text = re.sub(r"\s+", " ", lines[0]) if lines else type(error).__name__
    return f"{key}: {text}" if key and key not in text else text
