import sys

print("error: this command has moved; use python -m tools.summary", file=sys.stderr)
sys.exit(2)
