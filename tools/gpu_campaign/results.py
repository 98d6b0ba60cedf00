"""The results of a campaign: the content of its JSON file and of its page."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, Field

Cell = str | int | float | None


class Status(StrEnum):
    """How a step ended."""

    PASSED = "passed"
    FAILED = "failed"
    TRIED = "tried"
    """A measurement ran in a small size on the CPU, and its numbers were discarded."""


class Table(BaseModel, frozen=True):
    """A table with a title, names of columns, and rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Plot(BaseModel, frozen=True):
    """A picture: its path relative to the output folder, and its caption."""

    file: str
    caption: str


class Findings(BaseModel, frozen=True):
    """The findings of a step.

    Attributes:
        notes: sentences that explain the findings.
        facts: single values by name.
        tables: tables.
        plots: pictures.
        problems: why the step failed though its commands succeeded; empty if the step passed.
    """

    notes: tuple[str, ...] = ()
    facts: dict[str, Cell] = {}
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    problems: tuple[str, ...] = ()


class StepResult(BaseModel, frozen=True):
    """One step.

    Attributes:
        name: a short word.
        title: what the step shows.
        status: how the step ended.
        seconds: how long the step ran.
        limit: the seconds that the step was allowed to run.
        problem: why the step failed; None if it did not.
        commands: the command lines.
        log: the complete output, as a path relative to the output folder.
        output_end: the last lines of the output of a failed step.
        findings: what the step found.
    """

    name: str
    title: str
    status: Status
    seconds: float
    limit: float
    problem: str | None
    commands: tuple[str, ...]
    log: str
    output_end: str
    findings: Findings


class Campaign(BaseModel, frozen=True):
    """A whole campaign.

    Attributes:
        version: the version of this schema.
        ran_on_gpu: whether the steps ran on GPUs; otherwise nothing in the file is about a GPU.
        statement: the same in a sentence.
        commit: the commit of the repository; None outside of a checkout.
        started: when the last call began, in ISO format.
        seconds: how long the last call took so far.
        is_complete: whether all steps of a campaign have ended.
        steps: the steps that have ended, those of earlier calls included.
    """

    version: Literal[1] = 1
    ran_on_gpu: bool
    statement: str
    commit: str | None
    started: str
    seconds: float
    is_complete: bool
    steps: Annotated[tuple[StepResult, ...], Field(default=())]

    @property
    def failed(self) -> list[StepResult]:
        """The steps that failed."""
        return [step for step in self.steps if step.status is Status.FAILED]
