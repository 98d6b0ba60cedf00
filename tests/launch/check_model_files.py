"""Runs `--check` on several model files in one process: `python check_model_files.py CASES.json ANSWERS.json`.

`CASES.json` contains `{name: {"ranks": N, "flags": [...]}}`. `ANSWERS.json` maps each name to its findings.
"""

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.training.preflight.inspection import Inspection


class Collector(logging.Handler):
    """Collects the messages that are logged as warnings or errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def answer(ranks: int) -> dict[str, Any]:
    """Check the command line of this process, and collect the findings and all warnings, Megatron's included."""
    collector = Collector()
    logging.getLogger().addHandler(collector)
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # Megatron's code causes them for any settings
        inspection = Inspection(ranks)
        report = inspection.report()
    logging.getLogger().removeHandler(collector)
    # Megatron logs the deprecation for every model that is built.
    logged = [message for message in collector.messages if not message.startswith("GPTModel IS DEPRECATED")]
    messages = [*logged, *(str(warning.message) for warning in caught)]
    messages += [line for line in printed.getvalue().splitlines() if "warn" in line.lower()]
    findings = {"errors": report.errors, "notes": report.notes, "warnings": messages}
    if report.layout is None or report.model is None or report.memory is None:
        return findings
    layout = report.layout
    return findings | {
        "parameters": report.model.whole.num_parameters,
        "active": report.model.active(report.model.expert_use.most),
        "memory": [stage.total for stage in report.memory.stages],
        "layout": [layout.tensor, layout.pipeline, layout.expert, layout.data],
        "layers_of_mask": len(FeedForwardLayers.of_args(inspection.args).has_experts),
    }


if __name__ == "__main__":
    os.environ["RANK"] = "0"  # Megatron warns without a rank
    cases, answers = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        sys.argv[1:] = case["flags"]
        found[name] = answer(case["ranks"])
    answers.write_text(json.dumps(found))
