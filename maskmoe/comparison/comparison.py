"""Runs a comparison: makes the data, finishes the runs side by side, and keeps the table of their results."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from maskmoe.comparison.data import Dataset
from maskmoe.comparison.run import Run, runs_of
from maskmoe.comparison.steps import run_steps
from maskmoe.comparison.suite import Suite
from maskmoe.comparison.table import RunResult, read_table, write_table
from maskmoe.errors import RunFailure, UserError
from maskmoe.files.json_files import read_json
from maskmoe.launch.machine import Devices

_RESULT = "result.jsonl"
_MAX_PARAMETER_SHARE = 0.02  # largest relative difference between the active parameters of two variants


@dataclass(frozen=True)
class Comparison:
    """A suite whose runs are trained in a folder.

    A run is finished if the table has its result: a line with the settings and the programs that the suite has now, of
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

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All runs of the suite, in the order in which they are trained."""
        return runs_of(self.suite, self.folder, self.data, self.devices)

    def selected(self, patterns: Sequence[str]) -> tuple[Run, ...]:
        """Return the runs whose variant or name matches one of the shell patterns; without patterns, all runs.

        Raises:
            UserError: No run matches.
        """
        patterns = patterns or ("*",)
        found = [run for run in self.runs if any(fnmatchcase(n, p) for p in patterns for n in (run.name, run.title))]
        if not found:
            raise UserError("no run of the suite has such a name; --list shows all runs")
        return tuple(found)

    def results(self) -> dict[str, RunResult]:
        """Return the results of the suite's runs by the titles of the runs.

        Raises:
            UserError: The table is damaged, or has results on several texts and there is no dataset to choose by.
        """
        known: dict[tuple[object, ...], list[RunResult]] = defaultdict(list)
        for result in read_table(self.table):
            known[result.equality_key].append(result)
        text = self.data.digests()
        found = {}
        for run in self.runs:
            results = [each for each in known[run.equality_key] if text is None or each.text == text]
            if len(results) > 1:
                raise UserError(
                    f"{self.table} has results of {run.title} on several texts, and {self.data.folder} has no dataset "
                    "to choose by: pass another --table, or let the command make the dataset"
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
                waiting.setdefault(run.equality_key, run)
        return [*waiting.values()]

    def collect(self) -> None:
        """Add the results in the folders of runs to the table, each once.

        A run writes only the file in its own folder, so that no process loses a line of another process.
        """
        results = read_table(self.table, *(run.folder / _RESULT for run in self.runs))
        if len(results) > len(read_table(self.table)):
            self.table.parent.mkdir(parents=True, exist_ok=True)
            write_table(self.table, results)

    async def finish(self, runs: Sequence[Run], jobs: int, only_prepare: bool = False) -> None:
        """Make the data, check the variants, and finish the runs.

        Args:
            runs: The runs.
            jobs: Number of runs that work at a time.
            only_prepare: Whether to stop before the training, with the masks of all runs made.

        Raises:
            UserError: The data or the settings are refused. RunFailure: A run failed; all others are finished.
        """
        await run_steps(self.data.folder, self.data.settings, self.data.steps())
        runs = self.unfinished(runs)
        await self._check_variants(runs)
        slots, start, failed, ended = asyncio.Semaphore(jobs), time.monotonic(), [], 0

        async def finish(run: Run) -> None:
            nonlocal ended
            async with slots:
                try:
                    await run_steps(
                        run.folder, run.identity, run.mask_steps() if only_prepare else run.steps(), run.files()
                    )
                    if not only_prepare:
                        write_table(run.folder / _RESULT, [RunResult.of(self.name, run)])
                    verdict = "is prepared" if only_prepare else "is finished"
                except (UserError, RunFailure) as error:
                    failed.append(f"{run.title}: {error}")
                    verdict = "FAILED"
            ended += 1
            print(f"[{ended}/{len(runs)}] {run.title} {verdict}, {(time.monotonic() - start) / 60:.1f} min", flush=True)

        await asyncio.gather(*map(finish, runs))
        if failed:
            raise RunFailure(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")

    async def _check_variants(self, runs: Sequence[Run]) -> None:
        """Check one run of each variant before any of `runs` trains.

        With `vary`, only values that `runs` have are checked. Variants without a run among `runs` are checked as well:
        their runs may be finished, or another machine may train them.

        Raises:
            UserError: Settings are refused, or variants have different numbers of active parameters.
        """
        settings = {run.variant.setting for run in runs}
        compared = (run for run in self.runs if run.variant.setting in settings)
        active: dict[str, dict[str, int]] = defaultdict(dict)
        for run in {run.name: run for run in (*compared, *runs)}.values():
            await run_steps(run.folder, run.identity, (*run.mask_steps(), run.check_step()), run.files())
            size = active[run.variant.setting][run.name] = read_json(run.check_report)["parameters"]["active"]
            print(f"{run.name}: {size:,} active parameters", flush=True)
        for sizes in active.values():
            least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
            if sizes[most] > sizes[least] * (1 + _MAX_PARAMETER_SHARE):
                raise UserError(
                    f"{least} has {sizes[least]:,} active parameters and {most} has {sizes[most]:,}: give all variants "
                    "of a suite about equal sizes"
                )
