"""From the command line to a checked configuration."""

from nostalgia.config.compose import Request, parse, save
from nostalgia.config.schema import Config

__all__ = ["Config", "Request", "parse", "save"]
