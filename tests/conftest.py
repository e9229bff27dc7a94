"""One torch thread unless the environment says otherwise: small tensors run faster so, and sums do not depend on the machine's load."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
