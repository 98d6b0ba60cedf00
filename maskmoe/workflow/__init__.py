"""Reads and shows the progress of a training from its log."""
