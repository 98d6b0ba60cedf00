"""The settings of a run: its command line, its checks, and what Megatron makes of both."""
