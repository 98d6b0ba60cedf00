"""What `--check` says of model files: `python check_model_files.py CASES.json ANSWERS.json`, one process for all.

`CASES.json` holds `{name: {"ranks": N, "flags": [...]}}`, the answers have the same names.
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
    """Keeps what is logged as a warning or worse."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def answer(ranks: int) -> dict[str, Any]:
    """What the check finds of the command line of this process, and what Megatron prints and warns of meanwhile."""
    collector = Collector()
    logging.getLogger().addHandler(collector)
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # of Megatron's code, for any settings
        findings = find_problems(ranks, add_pretraining_arguments)
    logging.getLogger().removeHandler(collector)
    said = [*collector.messages, *(str(warning.message) for warning in caught)]
    said += [line for line in printed.getvalue().splitlines() if "warn" in line.lower()]
    args, config, mask = findings.args, findings.config, findings.mask
    if findings.errors or config is None:
        return {"errors": findings.errors, "notes": findings.notes, "warnings": said}
    layout = Layout.from_args(args)
    model = count_parameters(config, layout)
    topk = args.moe_router_topk if args.num_experts else 0
    experts = ExpertUse.from_mask(mask, topk).mean
    activations = ActivationModel.from_args(args, config.transformer, layout, experts)
    memory = stage_memory(args, layout, model, activations, mask_bytes(config, mask) if mask is not None else 0)
    return {
        "errors": [],
        "notes": findings.notes,
        "warnings": said,
        "parameters": model.whole.num_parameters,
        "active": model.whole.active_parameters(args.num_experts or 1, topk),
        "memory": [stage.total for stage in memory],
        "layout": [layout.tensor, layout.pipeline, layout.expert, layout.data],
    }


if __name__ == "__main__":
    os.environ["RANK"] = "0"  # of a run, not of a login node; Megatron warns without
    cases, answers = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name, case in json.loads(cases.read_text()).items():
        sys.argv[1:] = case["flags"]
        found[name] = answer(case["ranks"])
    answers.write_text(json.dumps(found))
