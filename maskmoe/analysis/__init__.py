"""How checkpoints route a text, and what dispatch costs on clusters.

Two questions, each with a command:

- `maskmoe analyze`: `model_series` finds the checkpoints, `probe_text` reads the text, `routing_analysis` runs the
  models and records their routing, `routing_statistics` measures what was recorded, and `routing_report` writes the
  results. All but `routing_statistics` need torch and Megatron: call `maskmoe.megatron_compat.prepare_process` before
  you import them.
- `maskmoe simulate`: `dispatch_traffic` describes the GPUs, draws experts and counts rows, `dispatch_simulation` makes
  the masks and turns rows into bytes and seconds, and `dispatch_report` writes the results. These modules import
  neither torch nor Megatron.
"""
