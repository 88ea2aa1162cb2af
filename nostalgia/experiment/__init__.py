"""A run: the only place where data, models, methods, training, logging and analysis meet.

run            from the request to the last file
experiment     one task after the other, stage by stage; phases: one phase of training
components, heads, context      what a run works on, and what its method is handed
analysis       what is measured beside the run at the end of each task
state, run_checkpoint, checkpointing, resume      stopping, and going on to the bit
outcome, info, dry_run, full_run, remeasure, exporting     what is said and left
"""
