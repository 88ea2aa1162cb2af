"""Continual fine-tuning of vision backbones that projects out what earlier tasks need."""

__version__ = "0.1.0"
