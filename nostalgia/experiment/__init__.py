"""A run: the only place where data, models, training, curvature and reporting meet.

program        from the request to the last file
rounds         one task after the other, stage by stage
setup, heads   what a run works on
curvature_phase, prediction     what is done with a finished task
state, snapshot, checkpointing, resume      stopping, and going on to the bit
dry_run, full_run, remeasure, exporting     beside and after training
"""
