"""The command line: one file per command, found by name so that `--help` imports nothing heavy."""
