"""Makes docker/.env: a random password for everything in compose.yaml that has one.

    python3 docker/make_env.py DATA [--torch-index URL] [--file FILE]

Only its owner can read the file; one that is there is never overwritten. Needs no package.
"""

import argparse
import os
import secrets
import sys
from pathlib import Path

ENV = Path(__file__).with_name(".env")
PASSWORDS = (
    "POSTGRES_PASSWORD",
    "PREFECT_DB_PASSWORD",
    "MLFLOW_DB_PASSWORD",
    "PREFECT_PASSWORD",
    "MLFLOW_PASSWORD",
    "MLFLOW_SECRET_KEY",
)
SHARE_OF_MEMORY = 0.75
"""Of this machine's, for the worker."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with models, data files and settings")
    parser.add_argument("--torch-index", default="", help="take torch for CPUs from this index")
    parser.add_argument("--file", type=Path, default=ENV, help=f"where to write; {ENV} if left out")
    given = parser.parse_args()
    data = given.data.resolve()
    if not data.is_dir():
        sys.exit(f"error: {data} is no folder. Make it, or name another.")
    if any(c in str(data) for c in "'\n"):
        sys.exit(f"error: {str(data)!r} has a quote or a line break in it. Name another folder.")
    values = {name: secrets.token_hex(24) for name in PASSWORDS}
    values |= {
        "P2D_DATA": f"'{data}'",
        "TORCH": "cpu" if given.torch_index else "cuda",
        "TORCH_INDEX": given.torch_index,
        "WORKER_CPUS": str(os.cpu_count()),
        "WORKER_MEMORY": f"{int(memory_bytes() * SHARE_OF_MEMORY / 2**20)}m",
    }
    try:
        # fails if it is there, even when two try at once
        file = os.open(given.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        sys.exit(
            f"error: {given.file} is there already, and running servers know its passwords. It was "
            "not changed. docs/operations.md says how to rotate them."
        )
    with os.fdopen(file, "w", encoding="utf-8") as stream:
        stream.writelines(f"{name}={value}\n" for name, value in values.items())
    print(f"{given.file} is made. The user is `admin`; keep a copy where you keep passwords.")


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    main()
