import sys

print("error: this command has moved; use python -m tools.find_batch_size", file=sys.stderr)
sys.exit(2)
