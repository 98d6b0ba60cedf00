"""How checkpoints route a text: `maskmoe analyze`.

`model_series` finds the checkpoints, `probe_text` reads the text, `routing_analysis` runs the models and records their
routing, `routing_statistics` measures what was recorded, and `routing_report` writes the results. All but
`routing_statistics` need torch and Megatron: call `maskmoe.megatron_compat.prepare_process` before you import them.
"""
