"""Puzzles and tasks made by the program itself: Sudokus, mazes and few-shot tasks with known rules."""
