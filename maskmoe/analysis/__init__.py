"""How checkpoints route a text, and what dispatch costs on clusters.

Two questions, each with a command:

- `maskmoe analyze`: `model_series` finds the checkpoints, `probe_text` reads the text, `trace_recording` runs a model
  and records a `routing_trace`, `routing_statistics` measures the trace, `routing_analysis` does all of this for a
  series, and `routing_tables` and `routing_plots` write the results. These modules need torch and Megatron: call
  `maskmoe.megatron_compat.prepare_process` before you import them.
- `maskmoe simulate`: `cluster` describes the GPUs, `compared_masks` makes the masks, `dispatch_traffic` draws experts
  and counts rows, `dispatch_simulation` turns rows into bytes and seconds, and `dispatch_report` writes the results.
  These modules import neither torch nor Megatron.
"""
