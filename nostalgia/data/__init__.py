"""Data sets, the tasks made of them, and the stream of batches that training and evaluation read."""
