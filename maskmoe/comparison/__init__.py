"""Train variants of a model alike and report how they differ: `launch/compare.sh SUITE.yaml`.

Every variant is a routing mask and some flags. The quickstart is a suite of one variant. This package imports neither
torch nor Megatron.
"""
