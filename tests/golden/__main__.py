"""python -m tests.golden DIR: check every golden case in DIR; exit status 1 when one differs."""

import sys
from pathlib import Path

from tests.golden.check import check

if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
    raise SystemExit("usage: python -m tests.golden DIR, a folder of golden cases")
sys.exit(0 if check(Path(sys.argv[1])) else 1)
