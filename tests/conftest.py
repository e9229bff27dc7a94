"""One torch thread unless the environment says otherwise: small tensors run faster so, and sums do not depend on the machine's load."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from gradlab._common import registry

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    """What a test registers, or an example of the documentation, is gone after it."""
    kept = {what: dict(each._added) for what, each in registry._REGISTRIES.items()}
    yield
    for what, each in registry._REGISTRIES.items():
        each._added = kept.get(what, {})
