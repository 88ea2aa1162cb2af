"""Checkpoints as folders of safetensors and JSON: whole or absent, checked before they are used."""
