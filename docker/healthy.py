"""Exit code 0 if a server answers 200: `python healthy.py URL`."""

import sys
from urllib.request import ProxyHandler, build_opener

# a proxy that the environment names must not be asked for this machine
with build_opener(ProxyHandler({})).open(sys.argv[1], timeout=5) as answer:
    sys.exit(answer.status != 200)
