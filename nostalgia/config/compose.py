"""Composes the configuration from the files under ``configs/`` and the command line, by Hydra's compose API."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nostalgia.config.checks import check
from nostalgia.config.schema import Config
from nostalgia.errors import UsageError

GROUPS = ("dataset", "model", "method", "nostalgia", "train", "logger", "suite")
FREE_KEYS = ("model.config", "dataset.entries")  # what stands below them is the user's

# What --debug changes; the command line still has the last word.
DEBUG = (
    "train.epochs=1",
    "train.epochs_per_task=null",
    "train.warmup_epochs=0",
    "train.max_steps_per_epoch=4",
    "train.max_eval_batches=2",
    "train.log_every_n_steps=1",
    "nostalgia.top_k=4",
    "nostalgia.k_max=null",
    "nostalgia.max_basis=null",
    "nostalgia.num_samples=64",
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

KEY=VALUE words are Hydra overrides of the files under configs/. Exit codes: 0 done, 2 wrong usage or
configuration, 3 data or weights not found, 4 run failed.
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"command line: {message}; --help shows examples")


def parse(argv: list[str]) -> Request:
    """The checked configuration for a command line; raises UsageError with one line for anything wrong in it."""
    flags, words = _parser().parse_known_args(argv)
    for word in words:
        if word.startswith("-"):
            raise UsageError(f"unknown option {word.split('=')[0]}{_nearest(word.split('=')[0], _flags())}")
        if "=" not in word and not word.startswith("~"):
            raise UsageError(f"cannot read {word!r}: expected KEY=VALUE, such as train.epochs=20")
    if flags.suite is not None:
        words.insert(0, f"suite={flags.suite}")
    words = [_translate(word) for word in words]
    suite = next((w.removeprefix("suite=") for w in reversed(words) if w.startswith("suite=")), None)
    debug = list(DEBUG) if flags.debug else []
    if flags.config is not None:
        composed = _from_file(Path(flags.config), debug + words)
    else:
        groups = [w for w in words if w.split("=")[0].lstrip("+") in GROUPS]
        composed = _compose(groups + debug + [w for w in words if w not in groups])
    return Request(
        config=_checked(composed),
        suite=suite,
        debug=flags.debug,
        dry_run=flags.dry_run,
        quiet=flags.quiet,
        argv=tuple(argv),
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
    temporary.write_text(to_yaml(config))
    os.replace(temporary, path)


def known_keys() -> list[str]:
    """All dotted keys of the configuration."""

    def walk(kind: Any, prefix: str) -> list[str]:
        keys = []
        for item in fields(kind):
            value = item.default_factory() if callable(item.default_factory) else item.default  # type: ignore[misc]
            name = f"{prefix}{item.name}"
            keys.append(name)
            if is_dataclass(value):
                keys += walk(value, f"{name}.")
        return keys

    return walk(Config, "")


def _parser() -> _Parser:
    parser = _Parser(
        prog="nostalgia.train",
        usage="python -m nostalgia.train [--suite NAME] [options] [KEY=VALUE ...]",
        description="Continual fine-tuning of a vision backbone that does not forget.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--suite", metavar="NAME", help=f"one of {', '.join(_options('suite'))}")
    parser.add_argument("--debug", action="store_true", help="a few batches and products a task, deterministic")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, with each data set; train nothing"
    )
    parser.add_argument("--config", metavar="FILE", help="run a saved config.yaml again")
    parser.add_argument("--quiet", action="store_true", help="do not print the configuration")
    return parser


def _flags() -> list[str]:
    return [option for action in _parser()._actions for option in action.option_strings]


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def _translate(word: str) -> str:
    """Check group choices before Hydra does; ``dataset=`` takes any name, not only those with a file."""
    key, _, value = word.partition("=")
    if key.lstrip("+~") not in GROUPS or "=" not in word:
        return word
    if value in _options(key.lstrip("+~")) or (key == "suite" and value == "null"):
        return word
    if key == "dataset":
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        return "dataset.name=" + "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    options = _options(key.lstrip("+~"))
    raise UsageError(f"unknown {key.lstrip('+~')} {value!r}{_nearest(value, options)}; there are {', '.join(options)}")


def _compose(words: list[str]) -> Any:
    ConfigStore.instance().store(name="schema", node=Config)
    GlobalHydra.instance().clear()
    try:
        for override in OverridesParser.create().parse_overrides(words):
            _check_key(override)
        with initialize_config_dir(version_base=None, config_dir=str(config_folder())):
            return compose("config", overrides=words)
    except HydraException as error:
        raise UsageError(_one_line(error)) from None
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from None


def _from_file(path: Path, words: list[str]) -> Any:
    """A saved configuration, complete, with overrides of values on top."""
    if any(word.split("=")[0].lstrip("+") in GROUPS for word in words):
        raise UsageError("--config FILE is a complete configuration: override values (train.lr=1e-3), not groups")
    try:
        loaded = OmegaConf.load(path)
        missing = [key for key in Config.__dataclass_fields__ if key not in loaded]
        if missing:
            raise UsageError(f"{path}: no section {missing[0]!r}; give a config.yaml that a run has written")
        for override in OverridesParser.create().parse_overrides(words):
            _check_key(override)
        return OmegaConf.merge(OmegaConf.structured(Config), loaded, OmegaConf.from_dotlist(words))
    except FileNotFoundError:
        raise UsageError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read as YAML ({_one_line(error)})") from None
    except (HydraException, OmegaConfBaseException, TypeError) as error:
        raise UsageError(f"--config {path}: {_one_line(error)}") from None


def _check_key(override: Override) -> None:
    key = override.key_or_group
    keys = known_keys()
    if key in GROUPS or key in keys or any(key.startswith(f"{free}.") for free in FREE_KEYS):
        return
    raise UsageError(f"unknown key {key}{_nearest(key, keys)}")


def _checked(composed: Any) -> Config:
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UsageError(_one_line(error)) from None
    assert isinstance(config, Config)
    options = config.nostalgia
    # On the command line `true` is a boolean, which a key of words turns into "True".
    options.retain_graph, options.predict_forgetting = options.retain_graph.lower(), options.predict_forgetting.lower()
    check(config)
    return config


def _nearest(word: str, options: list[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    if not close and "." in word:  # the right key in the wrong group
        close = [option for option in options if option.endswith("." + word.rsplit(".", 1)[1])][:1]
    if not close:
        close = [option for option in options if option.endswith("." + word)][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _one_line(error: BaseException) -> str:
    """The innermost message of a chain of errors, with the key it is about, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    text = re.sub(r"\s+", " ", lines[0]) if lines else type(error).__name__
    return f"{key}: {text}" if key and key not in text else text
