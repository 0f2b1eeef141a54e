"""What a report page holds."""

import json
import re
from pathlib import Path

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


def embedded(path: Path) -> dict:
    blocks = DATA.findall(path.read_text(encoding="utf-8"))
    assert len(blocks) == 1
    return json.loads(blocks[0])
