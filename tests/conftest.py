"""What must be set before anything heavy is imported: threads, no network, no writing into the user's home."""

import os
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, settings

# Two workers share two cores: more threads would wait for each other.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get(name, "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
_home = tempfile.TemporaryDirectory(prefix="dp-peft-tests-")
os.environ["HF_HOME"] = _home.name
os.environ["MPLCONFIGDIR"] = _home.name
os.environ["XDG_STATE_HOME"] = _home.name  # the ledgers of data sets

# A slow machine is no counterexample.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(autouse=True, scope="session")
def stock_tools_in_this_process():
    """A fresh process for each export costs seconds. Tests of it call `in_fresh_process` as they imported it."""
    reloading = sys.modules.get("dp_peft_diffusion.sharing.reloading")
    if reloading is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reloading, "in_fresh_process", reloading.stock_reload.reload)
        yield
