"""The commands of a user's day, one module each; `--help` shows an example."""
