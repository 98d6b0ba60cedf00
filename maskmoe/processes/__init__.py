"""Processes of a run: their locks, their signals, and the lives of child processes."""
