"""Trains variants of a model alike and reports how they differ: `launch/compare.sh SUITE.yaml`.

Every variant is a routing mask and some flags. This package imports neither torch nor megatron.
"""
