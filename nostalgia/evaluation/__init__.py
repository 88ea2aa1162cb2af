"""How well a model does: accuracy of one task, and what a sequence of them kept."""
