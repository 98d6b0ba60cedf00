"""Runs a comparison: makes the data, finishes the runs side by side, and keeps the table of their results."""

import json
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from maskmoe.comparison.data import Dataset
from maskmoe.comparison.report import write_report
from maskmoe.comparison.run import Run, runs_of
from maskmoe.comparison.stage import POLL_SECONDS, StageFolder, StatusLine
from maskmoe.comparison.suite import Suite
from maskmoe.comparison.table import RunResult, merge, read_table, training_seconds, write_table
from maskmoe.errors import RunFailure, UserError
from maskmoe.launch.machine import Devices

_RESULT = "result.jsonl"
_MAX_PARAMETER_SHARE = 0.02  # largest relative difference between the active parameters of two variants


@dataclass(frozen=True)
class Comparison:
    """A suite whose runs are trained in a folder.

    A run is finished if the table has its result: a line with the settings and the program that the suite has now, of
    the text of this machine. The folder of a finished run is not needed any more.

    Attributes:
        suite: The suite.
        name: Name of the suite.
        folder: Folder of all files.
        table: File with the results; it may lie elsewhere and have results of other suites and machines.
        data: The dataset of all runs.
        devices: Devices of this machine.
    """

    suite: Suite
    name: str
    folder: Path
    table: Path
    data: Dataset
    devices: Devices

    @property
    def report_folder(self) -> Path:
        """The default folder of the report."""
        return self.folder / "report"

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All runs of the suite, in the order in which they are trained."""
        return runs_of(self.suite, self.folder, self.data, self.devices)

    def selected(self, patterns: Sequence[str], seeds: Sequence[int]) -> tuple[Run, ...]:
        """Return the runs whose variant or name matches one of the shell patterns, with one of the seeds.

        Args:
            patterns: Shell patterns; none selects all.
            seeds: Seeds; none selects all.

        Raises:
            UserError: No run is selected.
        """
        found = [
            run
            for run in self.runs
            if (not seeds or run.seed in seeds)
            and (not patterns or any(fnmatchcase(name, each) for each in patterns for name in (run.name, run.title)))
        ]
        if not found:
            raise UserError("no run of the suite has such a name and seed; --list shows all runs")
        return tuple(found)

    def results(self) -> dict[str, RunResult]:
        """Return the results of the suite's runs by the titles of the runs.

        Raises:
            UserError: The table is damaged, or has results on several texts while there is no dataset that tells which.
        """
        known = defaultdict(list)
        for result in read_table(self.table):
            known[result.seed, frozenset(result.settings.items())].append(result)
        text, names = self.data.digests(), self.data.names_of_digests
        found = {}
        for run in self.runs:
            equal = known[run.seed, frozenset(run.settings.items())]
            of_text = [each for each in equal if (each.text.keys() == names if text is None else each.text == text)]
            results = [each for each in of_text if each.program_sha256 == run.variant.program_sha256]
            results = results or [each for each in of_text if not each.program_sha256]  # lines of earlier versions
            if len(results) > 1:
                raise UserError(
                    f"{self.table} has results of {run.title} on several texts, and {self.data.folder} has no dataset "
                    "that tells which to take: pass another --table, or let the command make the dataset"
                )
            if results:
                # An equal run of another suite may have another name.
                found[run.title] = results[0].model_copy(update={"suite": self.name, "variant": run.name})
        return found

    def unfinished(self, runs: Iterable[Run]) -> list[Run]:
        """Return the runs without a result, one for each settings, program and seed: equal runs share their result."""
        finished = self.results()
        waiting: dict[tuple, Run] = {}
        for run in runs:
            if run.title not in finished:
                waiting.setdefault((run.seed, run.variant.program_sha256, *run.settings.items()), run)
        return [*waiting.values()]

    def make_data(self, line: StatusLine) -> None:
        """Make the dataset and its token counts, unless they exist."""
        StageFolder(self.data.folder).run(tuple(self.data.stages()), line)

    def check(self, runs: Sequence[Run], line: StatusLine) -> None:
        """Check one run of each variant before any of `runs` trains.

        With `vary`, only values that `runs` have are checked. Variants without a run among `runs` are checked, too:
        their runs may be finished, or another machine may train them.

        Raises:
            UserError: Settings are refused, or variants have different numbers of active parameters.
        """
        active: dict[str, dict[str, int]] = {}
        settings = {run.variant.setting for run in runs}
        compared = (run for run in self.runs if run.variant.setting in settings)
        for run in {run.name: run for run in (*compared, *runs)}.values():
            run.prepare()
            stage, folder = run.check_stage(), StageFolder(run.folder)
            folder.run((*run.stages_before_training(), stage), line)
            parameters = json.loads(run.check_report.read_text(encoding="utf-8"))["parameters"]
            active.setdefault(run.variant.setting, {})[run.name] = parameters["active"]
            line.print(f"{run.name}: {parameters['active']:,} active parameters of {parameters['total']:,}")
        for of_setting in active.values():
            least, most = min(of_setting, key=of_setting.__getitem__), max(of_setting, key=of_setting.__getitem__)
            if of_setting[most] > of_setting[least] * (1 + _MAX_PARAMETER_SHARE):
                raise UserError(
                    f"{least} has {of_setting[least]:,} active parameters and {most} has {of_setting[most]:,}: give "
                    "all variants of a suite about equal sizes"
                )

    def finish(self, run: Run) -> Generator[str]:
        """Train and evaluate a run, and write its result into its folder; yield the state again and again."""
        run.prepare()
        folder, training = StageFolder(run.folder), run.training_stage()
        # A job of Slurm may have completed the training. Its checkpoint may have been removed since.
        finished = [*(run.folder / "slurm").glob("*.finished")]
        if not run.last_checkpoint.exists():
            for path in finished:
                path.unlink()
        elif finished and folder.has_begun(training):
            folder.end(training, training_seconds(run.tensorboard))
        for state in folder.finish(run.stages()):
            yield f"{run.title}: {state}"
        write_table(run.folder / _RESULT, [RunResult.of(self.name, run)])

    def _finish_and_add(self, run: Run) -> Generator[str]:
        yield from self.finish(run)
        self.add(read_table(run.folder / _RESULT))

    def collect(self) -> None:
        """Add the results in the folders of runs to the table."""
        self.add(result for run in self.runs for result in read_table(run.folder / _RESULT))

    def add(self, results: Iterable[RunResult]) -> None:
        """Add results to the table. A result that the table has already is not added again."""
        known = read_table(self.table)
        merged = merge([*known, *results])
        if len(merged) > len(known):
            self.table.parent.mkdir(parents=True, exist_ok=True)
            write_table(self.table, merged)

    def finish_all(self, runs: Sequence[Run], jobs: int, line: StatusLine) -> None:
        """Finish runs, at most `jobs` at a time. A failed run does not stop the others.

        Raises:
            RunFailure: A run failed; the message names all of them.
        """
        waiting, active, failed, start = list(runs), dict[str, Generator[str]](), [], time.monotonic()
        states: dict[str, str] = {}
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    run = waiting.pop(0)
                    active[run.title] = self._finish_and_add(run)
                for title, work in [*active.items()]:
                    try:
                        states[title] = next(work)
                        continue
                    except StopIteration:
                        verdict = "done"
                    except (UserError, RunFailure) as error:
                        verdict = "FAILED"
                        failed.append(f"{title}: {error}")
                    del active[title], states[title]
                    ended = len(runs) - len(waiting) - len(active)
                    hours = (time.monotonic() - start) / 3600
                    rest = hours / ended * (len(runs) - ended)
                    line.print(f"[{ended}/{len(runs)}] {title} {verdict} after {hours:.2f} h; {rest:.1f} h remain")
                line.update(" · ".join(states.values()))
                time.sleep(POLL_SECONDS)
        finally:
            for work in active.values():
                work.close()
        if failed:
            raise RunFailure(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")

    def report(self, folder: Path | None = None) -> Path:
        """Write the page of all finished runs, by default into `report_folder`; return its path."""
        return write_report(self.suite, self.name, [*self.results().values()], folder or self.report_folder)
