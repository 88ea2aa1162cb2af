"""Benchmarks and studies, each a command with --help: `docs/benchmarks.md`, `docs/results.md`."""
