"""Evaluates a checkpoint: losses by frequency band."""
