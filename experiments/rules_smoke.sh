#!/usr/bin/env bash
# Does the demonstrations' information reach the recursion? A random permutation of the nine colours per task, 4x4 to 6x6
# grids, 3 demonstrations; evaluated on permutations that never occur in training.
# Expected on 2 CPU cores: memory at least 0.95 within 3 minutes, its controls and the pooled standard encoder near 0.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${OUT:-runs}

$PYTHON -m dataset.build_rules_dataset --output-dir data/rules-smoke --families colour_permutation --stages 1 \
  --test-splits test_rules --rows 4 6 --columns 4 6 --workers 2
for encoder in memory standard; do
  start=$(date +%s)
  $PYTHON pretrain_etrm.py experiment=rules_smoke encoder=$encoder run_name=rules-smoke-$encoder output_dir="$out"
  echo "encoder=$encoder: trained in $(($(date +%s) - start)) s"
  $PYTHON evaluate.py checkpoint="$out/rules-smoke-$encoder" num_views=1 output_dir="$out/rules-smoke-$encoder/evaluation"
done
check() { $PYTHON -m experiments.check "$out/rules-smoke-$1/evaluation" ARC/pass@1 "${@:2}"; }
check memory --min 0.95
check memory --control query_only --max 0.05
check memory --control shuffled_demonstrations --max 0.05
check standard --max 0.1
