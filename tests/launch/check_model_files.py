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
from maskmoe.check.activations import ActivationModel
from maskmoe.check.expert_use import ExpertUse
from maskmoe.check.findings import find_problems
from maskmoe.check.layout import Layout
from maskmoe.check.memory import stage_memory
from maskmoe.check.parameters import count_parameters, mask_bytes
from maskmoe.training.pretraining import add_pretraining_arguments


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
        findings = find_problems(ranks, add_pretraining_arguments)
    logging.getLogger().removeHandler(collector)
    messages = [*collector.messages, *(str(warning.message) for warning in caught)]
    messages += [line for line in printed.getvalue().splitlines() if "warn" in line.lower()]
    args, config, mask = findings.args, findings.config, findings.mask
    if findings.errors or config is None:
        return {"errors": findings.errors, "notes": findings.notes, "warnings": messages}
    layout = Layout.from_args(args)
    model = count_parameters(config, layout)
    topk = args.moe_router_topk if args.num_experts else 0
    experts = ExpertUse.from_mask(mask, topk).mean
    activations = ActivationModel.from_args(args, config.transformer, layout, experts)
    memory = stage_memory(args, layout, model, activations, mask_bytes(config, mask) if mask is not None else 0)
    return {
        "errors": [],
        "notes": findings.notes,
        "warnings": messages,
        "parameters": model.whole.num_parameters,
        "active": model.whole.active_parameters(args.num_experts or 1, topk),
        "memory": [stage.total for stage in memory],
        "layout": [layout.tensor, layout.pipeline, layout.expert, layout.data],
    }


if __name__ == "__main__":
    os.environ["RANK"] = "0"  # Megatron warns without a rank
    cases, answers = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        sys.argv[1:] = case["flags"]
        found[name] = answer(case["ranks"])
    answers.write_text(json.dumps(found))
