#!/usr/bin/env bash
# The main job, sized for 2 CPU cores: a trained model answers a task; then an ETRM trains on generated rules and on ARC-AGI-1
# training tasks with grids up to 10x10 together, and is asked rules and evaluation tasks that it has never seen, with controls.
# Called again, it continues where the time has ended.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

echo "--- a model that is trained already answers a task that it has never seen"
$PYTHON predict.py checkpoint=pretrained/rules task=pretrained/example.json
echo "--- now a new one: its dataset"
$PYTHON -m dataset.build_rules_dataset --families colour_permutation --stages 1 --test-splits test_rules --rows 4 6 --columns 4 6 \
  --train-tasks 20000 --test-tasks 100 --workers 2 --output-dir data/demo-rules
$PYTHON -m dataset.build_arc_dataset --recipe arc1-small --dataset rules=data/demo-rules --output-dir data/demo
echo "--- its training, which says after some steps how long it will take"
$PYTHON pretrain_etrm.py experiment=demo
echo "--- ARC tasks it was trained on (every pair in turn as query): what it can fit"
$PYTHON evaluate.py checkpoint=runs/demo split=train subsets=[training] max_eval_groups=40 num_views=1 controls=[query_only] output_dir=runs/demo/evaluations/seen-tasks
echo "--- held-out ARC tasks (evaluation) and held-out rules (rules-test_rules): what it can generalise to"
$PYTHON evaluate.py checkpoint=runs/demo output_dir=runs/demo/evaluations/held-out
echo "--- what became of it"
$PYTHON -m experiments.demo runs/demo
