"""One Prefect server for all tests, in a temporary home; two threads at most."""

import os
import tempfile
from pathlib import Path

from flows.environment import prepare_environment

os.environ.setdefault("OMP_NUM_THREADS", "2")
for name in [name for name in os.environ if name.startswith(("PREFECT_", "P2D_", "MLFLOW_"))]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="p2d-tests-")
prepare_environment(Path(_home.name))
