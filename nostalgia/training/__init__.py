"""The training of one task: its model, its optimizer step, its loop."""
