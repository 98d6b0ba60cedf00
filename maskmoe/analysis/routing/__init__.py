"""Analysis of how checkpoints route a fixed probe text.

`models` finds the checkpoints, `probe` reads the text, `recording` runs a model and records a `trace` of its routing,
`statistics` measures traces, `analysis` does all of this for a series, and `report` writes the results.

`settings` needs neither torch nor Megatron. Call `maskmoe.megatron_compat.prepare_process` before you import any other
module.
"""
