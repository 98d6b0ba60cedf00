"""`--check`: what a run would be, need and refuse, worked out on one machine before anything is queued.

No process group and no GPU is needed. `layout` does the arithmetic of ranks, `parameters` counts what every pipeline
stage holds, `memory` and `activations` turn that into bytes, `findings` collects every error, `report` prints it all.
"""
