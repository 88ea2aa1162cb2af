"""Vectors over parameters and the linear algebra done with them; knows ranks only through `vector_space`."""
