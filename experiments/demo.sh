#!/usr/bin/env bash
# The main job, sized for 2 CPU cores: train an ETRM on generated rules and on ARC-AGI-1 training tasks with grids up to 10x10 together,
# then ask it rules and evaluation tasks that it has never seen, with controls.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

$PYTHON -m dataset.build_rules_dataset --families colour_permutation --stages 1 --test-splits test_rules --rows 4 6 --columns 4 6 \
  --train-tasks 20000 --test-tasks 100 --workers 2 --output-dir data/demo-rules
$PYTHON -m dataset.build_arc_dataset --recipe arc1-small --dataset rules=data/demo-rules --output-dir data/demo
$PYTHON pretrain_etrm.py experiment=demo
echo "--- ARC tasks it was trained on (every pair in turn as query): what it can fit"
$PYTHON evaluate.py checkpoint=runs/demo split=train subsets=[training] max_eval_groups=40 num_views=1 controls=[query_only] output_dir=runs/demo/evaluations/seen-tasks
echo "--- held-out ARC tasks (evaluation) and held-out rules (rules-test_rules): what it can generalise to"
$PYTHON evaluate.py checkpoint=runs/demo output_dir=runs/demo/evaluations/held-out
