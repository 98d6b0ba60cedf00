"""The ways in which tokens reach their experts: one file for each, behind one protocol. Imports nothing by itself."""
