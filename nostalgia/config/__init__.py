"""From the command line to a checked configuration."""

from nostalgia.config.checks import free_keys
from nostalgia.config.command_line import Request, parse
from nostalgia.config.compose import save
from nostalgia.config.schema import Config

__all__ = ["Config", "Request", "free_keys", "parse", "save"]
