import sys

print("error: this command has moved; use python -m experiments.votes_against_one_view", file=sys.stderr)
sys.exit(2)
