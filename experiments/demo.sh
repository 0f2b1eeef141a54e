#!/usr/bin/env bash
# The main job on real ARC tasks, sized for 2 CPU cores: train an ETRM on ARC-AGI-1 training tasks with grids up to 10x10,
# then ask it evaluation tasks that it has never seen, with controls.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

$PYTHON -m dataset.build_arc_dataset --max-grid-size 10 --output-dir data/arc1-small
$PYTHON pretrain_etrm.py experiment=demo
echo "--- tasks it was trained on (every pair in turn as query): what it can fit"
$PYTHON evaluate.py checkpoint=runs/demo split=train max_eval_groups=40 num_views=1 controls=[query_only] output_dir=runs/demo/evaluations/seen-tasks
echo "--- held-out tasks: what it can generalise to"
$PYTHON evaluate.py checkpoint=runs/demo output_dir=runs/demo/evaluations/held-out
