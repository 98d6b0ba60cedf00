"""How checkpoints route a fixed probe text. Importing it needs neither torch nor Megatron; `analyze` does."""

from maskmoe.routing_analysis.analysis import Analysis, AnalysisSettings, analyze
from maskmoe.routing_analysis.models import Conversion, ModelSource, find_models
from maskmoe.routing_analysis.probe import DatasetText, FileText, Probe
from maskmoe.routing_analysis.report import write_results
from maskmoe.routing_analysis.summary import summarise
from maskmoe.routing_analysis.trace import RoutingTrace

__all__ = [
    "Analysis",
    "AnalysisSettings",
    "Conversion",
    "DatasetText",
    "FileText",
    "ModelSource",
    "Probe",
    "RoutingTrace",
    "analyze",
    "find_models",
    "summarise",
    "write_results",
]
