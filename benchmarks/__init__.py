"""What steps, data and evaluation cost, here and in the ancestors; RESULTS.md holds what was measured."""
