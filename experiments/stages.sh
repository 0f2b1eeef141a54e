# Stages with a limit of time each, for a machine that is rented by the minute. To be sourced by a script of this folder.
#
# It reads OUT, WHEELS, PYTHON and LIMIT (seconds in all), REHEARSE (toy size, ten times the time), and `reserve`: the seconds
# that the next stages leave to those after them. All that is found is in OUT, as it is found: a log for each stage, and stages.tsv.
# A stage that fails or takes too long is written down, and the next one begins.

export OUT WHEELS PYTHON deadline
reserve=0 slack=${REHEARSE:+10} slack=${slack:-1} LIMIT=${LIMIT:-$((470 * slack))}
in_shell=(bash -euo pipefail -c) # of a function that is exported: a stage that ends at its first failure
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
deadline=$(($(date +%s) + LIMIT))
printf 'stage\tstatus\tseconds\tfound\n' > "$OUT/stages.tsv"

# note STAGE STATUS SECONDS FOUND: a line of the table.
note() { printf '%s\t%s\t%s\t%s\n' "$@" | tee -a "$OUT/stages.tsv"; }

# time_left: seconds until all has to end.
time_left() { echo $((deadline - $(date +%s))); }

# stage NAME SECONDS PATTERN COMMAND...: run it for at most so long. What it found are its last lines with the pattern.
stage() {
  local name=$1 most=$((slack * $2)) pattern=$3 status=ok begun=$SECONDS left=$(($(time_left) - reserve)) found
  shift 3
  if [ "$left" -lt "$most" ]; then most=$left; fi
  if [ "$most" -lt 5 ]; then note "$name" "left out" 0 "no time is left"; return; fi
  timeout --kill-after=5 "$most" "$@" > "$OUT/$name.log" 2>&1 || status="failed ($?)"
  found=$({ grep -E "$pattern" "$OUT/$name.log" || tail -n 1 "$OUT/$name.log"; } | tail -n 5 | tr -s " " | cut -c 1-200 | paste -sd '|')
  note "$name" "$status" $((SECONDS - begun)) "$found"
}

install() {
  "$PYTHON" -m venv --system-site-packages "$OUT/venv"
  "$OUT/venv/bin/python" -m pip --disable-pip-version-check install --no-index --find-links "$WHEELS" -r "$WHEELS/requirements.txt"
}

# install_wheels: from here on PYTHON has what WHEELS holds, if it holds anything.
install_wheels() {
  if [ ! -f "$WHEELS/requirements.txt" ]; then
    note install "left out" 0 "there is no $WHEELS/requirements.txt, so that $PYTHON needs the packages"
    return
  fi
  stage install 90 'Successfully installed' "${in_shell[@]}" install
  if [ -x "$OUT/venv/bin/python" ]; then PYTHON=$OUT/venv/bin/python; fi
}

# make_rules TASKS WORKERS: generated rules in OUT/rules, as in the ladder. They are only trained on, so that none is held out.
make_rules() {
  "$PYTHON" -m dataset.build_rules_dataset --train-tasks "$1" --test-tasks 5 --workers "$2" --weights geometry=7 shift=4 \
    --output-dir "$OUT/rules"
}

# overrides_of RECIPE: those of an entry of ladder.yaml, one a line.
overrides_of() {
  "$PYTHON" -c 'import sys
from experiments.ladder import read_ladder
print(*read_ladder().recipe(sys.argv[1]).overrides, sep="\n")' "$1"
}

# steps_within SECONDS RUN: training steps that fit, by the last log line of a run that has made a few.
steps_within() {
  "$PYTHON" -c 'import json, sys
last = json.loads(open(sys.argv[2] + "/metrics.jsonl").read().splitlines()[-1])
print(max(2, int(800 * float(sys.argv[1]) / last["timing/train_ms_per_step"])))' "$@"
}
export -f time_left install make_rules overrides_of steps_within

# finish: the table. The exit status of the script is 1 if a stage has failed.
finish() {
  local failed
  echo
  column -t -s "$(printf '\t')" "$OUT/stages.tsv" 2> /dev/null || cat "$OUT/stages.tsv"
  if failed=$(cut -f 1,2 "$OUT/stages.tsv" | grep 'failed'); then
    echo "these failed, $OUT has their words: $(cut -f 1 <<< "$failed" | paste -sd ' ')"
    exit 1
  fi
  echo "all that was tried worked; $OUT"
}
