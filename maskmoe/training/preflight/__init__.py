"""`--check`: works out on one machine what a run would be, what it would need, and why it would be refused.

The check needs neither a process group nor a GPU. `layout` does the arithmetic of ranks, `parameters` counts what every
pipeline stage holds, `memory` and `activations` compute bytes. `inspection` collects every error and puts the results
together in a `report`, which `command` prints as JSON or as text.
"""
