"""Runs the plan of stub stages that a JSON file describes: `python run_plan.py FOLDER STAGES.json`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from maskmoe.command_line.run_tool import run_tool
from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.runner import run_to_end
from maskmoe.workflow.stage import Stage


@dataclass(frozen=True)
class StubPlan:
    files: StageFiles
    stages: tuple


def read_plan(folder, path):
    def maker(values):
        paths = {name: tuple(map(Path, values.pop(name))) for name in ("inputs", "outputs")}
        return lambda: Stage(**{**values, **paths, "command": tuple(values["command"])})

    return StubPlan(StageFiles(folder), tuple(map(maker, json.loads(path.read_text()))))


def run(folder, path):
    run_to_end(read_plan(folder, path), lambda record: "the report")


if __name__ == "__main__":
    run_tool(lambda: run(Path(sys.argv[1]), Path(sys.argv[2])))
