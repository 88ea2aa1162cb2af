"""Benchmarks: `python -m bench.products`, `bench.solvers`, `bench.projection`, `bench.pipeline`, each with --help."""
