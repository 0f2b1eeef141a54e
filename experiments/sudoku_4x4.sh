#!/usr/bin/env bash
# Sudoku 4x4 with six clues, from nothing. The last line is the score on 300 puzzles that are in training in no form.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
out=${OUT:-runs}

$PYTHON -m dataset.build_sudoku_dataset --size 4 --clues 6 --train-puzzles 3000 --test-puzzles 300 --output-dir data/sudoku-4x4
$PYTHON pretrain_etrm.py experiment=sudoku_4x4 output_dir="$out"
$PYTHON evaluate.py checkpoint="$out/sudoku-4x4-seed0" output_dir="$out/sudoku-4x4-seed0/evaluation"
$PYTHON -m experiments.check "$out/sudoku-4x4-seed0/evaluation" all.exact_accuracy --min 0.97
