"""Saves checkpoints with a record of their files, finds the newest sound checkpoint, and reads checkpoints safely."""
