import sys

print("error: this command has moved; use python -m tools.publish", file=sys.stderr)
sys.exit(2)
