"""The ways to send tokens to their experts: one protocol, one file for each way. The package imports nothing itself."""
