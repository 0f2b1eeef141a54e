"""python -m tests.golden DIR [DEVICE]: check every golden case in DIR; exit status 1 when one differs."""

import sys
from pathlib import Path

import torch

from tests.golden.check import check

if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_dir():
    raise SystemExit("usage: python -m tests.golden DIR [DEVICE], a folder of golden cases")
sys.exit(0 if check(Path(sys.argv[1]), torch.device(*sys.argv[2:] or ["cpu"])) else 1)
