"""From text to a trained, evaluated language model on this machine: `python -m maskmoe.quickstart`.

This package says which stages there are and reports on them; `maskmoe.workflow` runs them. It imports neither torch nor
megatron.
"""
