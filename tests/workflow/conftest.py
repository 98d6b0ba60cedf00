"""A plan of three stub stages, run in this process or in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.waiting import wait_until

from maskmoe.workflow.files import StageFiles
from maskmoe.workflow.runner import run_to_end
from maskmoe.workflow.stage import Stage

HERE = Path(__file__).parent


class StubRun:
    """The stages `first`, then `steps`, which is resumable, then `last`, in a folder.

    Attributes:
        flags: further flags of each stage.
    """

    def __init__(self, folder):
        self.folder = folder / "run"
        self.folder.mkdir()
        self.text = folder / "text"
        self.text.write_text("text")
        self.flags = {"first": [], "steps": [], "last": []}
        self._plan_file = folder / "plan.json"

    # The attributes of a plan, see `maskmoe.workflow.stage.Plan`.
    @property
    def files(self):
        return StageFiles(self.folder)

    @property
    def stages(self):
        return tuple(lambda stage=stage: stage for stage in self._stages())

    def _stages(self):
        return (
            self._stage("first", self.text, "--input", self.text),
            self._stage("steps", self.output("first"), "--steps", "10"),
            self._stage("last", self.output("steps"), "--input", self.output("steps")),
        )

    def _stage(self, name, needs, *arguments):
        command = [sys.executable, HERE / "stub_stage.py", name, "--folder", self.folder, *arguments, *self.flags[name]]
        return Stage(name, tuple(map(str, command)), (needs,), (self.output(name),), is_resumable=name == "steps")

    def run(self):
        """Run the plan in this process."""
        run_to_end(self, lambda record: "the report")

    def start(self):
        """Run the plan in a process of its own, which is returned."""
        stages = [
            {
                "name": stage.name,
                "command": stage.command,
                "inputs": [*map(str, stage.inputs)],
                "outputs": [*map(str, stage.outputs)],
                "is_resumable": stage.is_resumable,
            }
            for stage in self._stages()
        ]
        self._plan_file.write_text(json.dumps(stages))
        command = [sys.executable, HERE / "run_plan.py", self.folder, self._plan_file]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def output(self, name):
        return self.folder / f"{name}.out"

    def take_starts(self):
        """Return the names of the stages that were started since the last call."""
        path = self.folder / "starts"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names

    def hold(self):
        """Let `steps` stop counting half-way."""
        (self.folder / "hold").touch()

    def release(self):
        (self.folder / "hold").unlink()

    def start_and_wait_for_half(self):
        """Start the plan in a process of its own, and wait until `steps` is held half-way."""
        self.hold()
        process = self.start()
        wait_until(
            lambda: self.output("steps").exists() and self.output("steps").read_text() == "5", "half of the steps"
        )
        return process


@pytest.fixture
def stub_run(tmp_path):
    """A plan of stub stages."""
    return StubRun(tmp_path)
