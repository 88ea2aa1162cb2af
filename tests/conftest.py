"""Each of the processes that share the machine computes on one thread, as the ranks that tests start do."""

import torch

torch.set_num_threads(1)
