#!/usr/bin/env bash
# Can the models learn at all? 8 ARC-AGI-1 training tasks with grids up to 10x10, no augmentation, every pair in turn as query.
# Expected on 2 CPU cores: train exact accuracy 100 % within 5 minutes, for TRM and for ETRM.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${OUT:-runs}

for layout in puzzle fewshot; do
  $PYTHON -m dataset.build_arc_dataset --max-grid-size 10 --max-tasks 8 --layout $layout --output-dir data/overfit-$layout
done
for arch in trm etrm; do
  start=$(date +%s)
  $PYTHON pretrain_etrm.py experiment=overfit_$arch run_name=overfit-$arch output_dir="$out"
  echo "arch=$arch: trained in $(($(date +%s) - start)) s"
  $PYTHON evaluate.py checkpoint="$out/overfit-$arch" split=train num_views=1 controls=[] output_dir="$out/overfit-$arch/evaluation"
done
status=0
for arch in trm etrm; do
  $PYTHON -m experiments.check "$out/overfit-$arch/evaluation" ARC/pass@1 --min 1.0 || status=1
done
exit $status
