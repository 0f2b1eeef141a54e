"""Commands that produce the numbers, tables and figures of the documents; `--help` shows an example."""
