"""python measure.py COMMAND...: run a command and print, as JSON, what it cost.

A process of its own between the benchmark and the command: on Linux a child's peak memory starts at its parent's.
"""

import json
import os
import subprocess
import sys
import time

if __name__ == "__main__":
    start = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps({"seconds": time.perf_counter() - start, "memory": usage.ru_maxrss * 1024}))
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)
