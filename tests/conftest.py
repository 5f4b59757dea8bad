"""What every test shares: no network, one thread a worker, the same random numbers each time.

The environment is set here, at import, because libraries read it once, when they are imported.
"""

from __future__ import annotations

import os
import random
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers share the cores: torch and BLAS take one each
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np
import pytest
from hypothesis import settings

_SEED = 20_240_501

# --doctest-modules would import every conftest.py by the same name
collect_ignore_glob = ["*conftest.py"]

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same seeds, whatever ran before it in this process."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(_SEED)
