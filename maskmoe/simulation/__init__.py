"""Simulate the cost of dispatching tokens to experts on clusters of any size.

This package imports neither torch nor Megatron.
"""

from maskmoe.simulation.cluster import Cluster, Link
from maskmoe.simulation.dispatch import Workload
from maskmoe.simulation.layout import Layout
from maskmoe.simulation.micro_batches import MicroBatches
from maskmoe.simulation.results import Cost, Result
from maskmoe.simulation.simulate import Simulation

__all__ = ["Cluster", "Cost", "Layout", "Link", "MicroBatches", "Result", "Simulation", "Workload"]
