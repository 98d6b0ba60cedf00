"""Reads and writes files: outputs, JSON, paths, templates, and files that a stranger may have written."""
