"""Simulate the cost of dispatching tokens to experts on clusters of any size.

This package imports neither torch nor Megatron.
"""

from maskmoe.analysis.dispatch_cost.cluster import Cluster, Layout, Link
from maskmoe.analysis.dispatch_cost.dispatch import Workload
from maskmoe.analysis.dispatch_cost.simulate import Cost, MicroBatches, Result, Simulation
from maskmoe.analysis.dispatch_cost.variants import Masks

__all__ = ["Cluster", "Cost", "Layout", "Link", "Masks", "MicroBatches", "Result", "Simulation", "Workload"]
