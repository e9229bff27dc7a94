"""One torch thread everywhere: small tensors run faster so, and timings and sums do not depend on the machine's load."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
