"""Command lines of all commands, launchers and runs: flags as words, the parser, and the ranges of numbers."""
