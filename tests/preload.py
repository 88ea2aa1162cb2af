"""What the server of `tests.ranks` imports before it forks: everything a run needs, on one thread."""

import gc
import os
import tempfile

# Read when the hub's library is imported: offline, and with nothing in its cache.
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=os.path.join(tempfile.gettempdir(), "nostalgia_tests_no_hub"))

import matplotlib
import torch

torch.set_num_threads(1)  # before anything computes: threads do not survive a fork
matplotlib.use("Agg")

import matplotlib.pyplot  # noqa: E402
import peft  # noqa: E402, F401
import sklearn.datasets  # noqa: E402, F401
import transformers  # noqa: E402

import nostalgia.experiment.run  # noqa: E402, F401

_ = transformers.ViTModel, transformers.get_scheduler  # imported when they are first named
gc.freeze()  # a collection in a forked process need not look at all that
