"""Modules in plain torch for models without Transformer Engine."""
