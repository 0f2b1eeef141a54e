"""A cluster's stand-in: the four commands of Slurm that submitit calls, as scripts of this machine."""

from pathlib import Path

COMMANDS = {
    # A job waits while there is a file `hold`. A file ID.limit, or `limit` for all, has its seconds.
    "sbatch": """
id=$(($(cat "$QUEUE/last" 2>/dev/null || echo 1000) + 1))
echo "$id" > "$QUEUE/last"; cp "$1" "$QUEUE/$id.sh"; echo PENDING > "$QUEUE/$id"
export SLURM_JOB_ID=$id SLURM_JOB_NUM_NODES=1 SLURM_NTASKS=1
setsid bash -c '
while [ -e "$QUEUE/hold" ]; do sleep 0.05; done
grep -q PENDING "$QUEUE/$0" || exit
echo RUNNING > "$QUEUE/$0"; bash "$1"; end=COMPLETED
[ -e "$QUEUE/$0.lost" ] && end=NODE_FAIL
echo "$end" > "$QUEUE/$0"
' "$id" "$QUEUE/$id.sh" > /dev/null 2>&1 < /dev/null &
echo "Submitted batch job $id"
""",
    "srun": """
while [[ $1 == --* ]]; do
  case $1 in --output) out=$2; shift 2 ;; --error) err=$2; shift 2 ;; *) shift ;; esac
done
fill() { echo "${1//%j/$SLURM_JOB_ID}" | sed s/%t/0/; }
limit=$(cat "$QUEUE/$SLURM_JOB_ID.limit" 2>/dev/null || cat "$QUEUE/limit" 2>/dev/null || echo 1000)
exec timeout --signal USR2 "$limit" "$@" >> "$(fill "$out")" 2>> "$(fill "$err")"
""",
    "sacct": """
echo "JobID|State|NodeList"
for job in "$QUEUE"/[0-9]*[0-9]; do [ -e "$job" ] && echo "$(basename "$job")|$(cat "$job")|here"; done
""",
    "scancel": """echo "CANCELLED by 1000" > "$QUEUE/$1" """,
}


def install(folder: Path, monkeypatch) -> Path:
    """Put the commands first in the PATH. Returns the folder with a file for the state of each job."""
    programs, queue = folder / "slurm", folder / "queue"
    programs.mkdir()
    queue.mkdir()
    for name, script in COMMANDS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{script.strip()}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("QUEUE", str(queue))
    return queue
