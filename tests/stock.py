"""Python as it is where P2D is not installed: the same libraries, and none of our code."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

BEFORE = """
import sys
sys.path += {paths!r}
try:
    import p2d_core
except ImportError:
    pass
else:
    raise SystemExit("p2d_core can be imported here")
"""


def run_stock(code: str, folder: Path, **values: Any) -> str:
    """What the code prints, run in a folder; ``values`` (plain ones) are names that it sees.

    Neither the environment nor an editable install reaches it (`-I`, `-S`).
    """
    paths = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    given = f"import json\nglobals().update(json.loads({json.dumps(values)!r}))\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", BEFORE.format(paths=paths) + given + code],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
             "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
