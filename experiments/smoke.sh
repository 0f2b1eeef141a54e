#!/usr/bin/env bash
# The real commands at toy size, alone and under torchrun: build, train, resume, evaluate, golden parity.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tiny="arch.hidden_size=32 arch.num_heads=2 arch.H_cycles=1 arch.L_cycles=1 arch.halt_max_steps=2 arch.forward_dtype=float32 global_batch_size=8 log_interval=2 logging.progress=false output_dir=$work/runs"

$PYTHON -m tests.golden tests/golden
$PYTHON -m dataset.build_arc_dataset --max-grid-size 6 --max-tasks 6 --output-dir "$work/small"
$PYTHON pretrain_etrm.py $tiny data.path="$work/small" run_name=smoke train_steps=4
$PYTHON -m torch.distributed.run --standalone --nproc-per-node 2 pretrain_etrm.py $tiny data.path="$work/small" run_name=smoke train_steps=8
$PYTHON evaluate.py checkpoint="$work/runs/smoke" num_views=2
$PYTHON pretrain_etrm.py --cfg job > /dev/null
echo "smoke: all commands ran"
