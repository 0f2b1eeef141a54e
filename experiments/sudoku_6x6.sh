#!/usr/bin/env bash
# Sudoku 6x6 from nothing. The last line is the score on 500 puzzles that are in training in no form.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${OUT:-runs}

$PYTHON -m dataset.build_sudoku_dataset --size 6 --train-puzzles 3000 --test-puzzles 500 --output-dir data/sudoku-6x6
$PYTHON pretrain_etrm.py experiment=sudoku_6x6 output_dir="$out"
$PYTHON evaluate.py checkpoint="$out/sudoku-6x6-seed0" output_dir="$out/sudoku-6x6-seed0/evaluation"
$PYTHON -m experiments.check "$out/sudoku-6x6-seed0/evaluation" all.exact_accuracy --min 0.90
