"""Processes: their locks, their signals, the lives of child processes, and how a command ends."""
