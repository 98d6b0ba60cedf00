"""Simulate the cost of dispatching tokens to experts on clusters of any size.

This package imports neither torch nor Megatron.
"""

from maskmoe.simulation.cluster import Cluster, Layout, Link
from maskmoe.simulation.dispatch import Workload
from maskmoe.simulation.simulate import Cost, MicroBatches, Result, Simulation
from maskmoe.simulation.variants import Masks

__all__ = ["Cluster", "Cost", "Layout", "Link", "Masks", "MicroBatches", "Result", "Simulation", "Workload"]
