"""What must be set before anything heavy is imported: threads, no network, no writing into the user's home."""

import os
import tempfile

from hypothesis import HealthCheck, settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
_home = tempfile.TemporaryDirectory(prefix="dp-peft-tests-")
os.environ["HF_HOME"] = _home.name
os.environ["MPLCONFIGDIR"] = _home.name
os.environ["XDG_STATE_HOME"] = _home.name  # the ledgers of data sets

# A slow machine is no counterexample.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")
