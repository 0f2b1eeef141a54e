import sys

print("error: this command has moved; use python -m tools.compare", file=sys.stderr)
sys.exit(2)
