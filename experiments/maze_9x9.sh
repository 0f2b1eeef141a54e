#!/usr/bin/env bash
# Mazes of 9x9 from nothing. The last line is the share of 300 mazes, which are in training in no form, that are
# answered with a shortest path.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${OUT:-runs}

$PYTHON -m dataset.build_maze_dataset --side 9 --train-puzzles 4000 --test-puzzles 300 --min-path-length 6 --output-dir data/maze-9x9
$PYTHON pretrain_etrm.py experiment=maze_9x9 output_dir="$out"
$PYTHON evaluate.py checkpoint="$out/maze-9x9-seed0" output_dir="$out/maze-9x9-seed0/evaluation"
$PYTHON -m experiments.check "$out/maze-9x9-seed0/evaluation" all.shortest --min 0.90
