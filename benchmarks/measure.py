"""Run a command, and print as JSON what it cost: python measure.py COMMAND ...

A process of its own between the benchmark and the command. On Linux a child's peak memory starts at its
parent's, and the benchmark itself is large.
"""

import json
import os
import subprocess
import sys
import time

if __name__ == "__main__":
    start = time.perf_counter()
    # The command's own output is not the answer.
    process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps({"seconds": time.perf_counter() - start, "memory": usage.ru_maxrss * 1024}))
    # A signal's number behind 128, as shells have it.
    sys.exit(process.returncode if process.returncode >= 0 else 128 - process.returncode)
