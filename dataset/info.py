import sys

print("error: this command has moved; use python -m tools.info", file=sys.stderr)
sys.exit(2)
