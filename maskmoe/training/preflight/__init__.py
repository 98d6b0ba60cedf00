"""What `--check` computes of a run: parameters, memory and operations, and the report with all errors."""
