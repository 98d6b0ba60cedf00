"""A comparison: a suite in its folder, with the state of its runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from maskmoe.comparison.data import Data, MissingData
from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.parts import (
    FoundPart,
    Identity,
    MergedParts,
    Part,
    Parts,
    check_same_text,
    check_settings,
    has_settings,
    identity_of,
    settings_of,
)
from maskmoe.comparison.plan import RunPlan
from maskmoe.comparison.recording import make_part, num_exact_losses, text_digests
from maskmoe.comparison.runs import Run, check_runs, choose_learning_rates, next_tuning_runs, tuning_runs
from maskmoe.comparison.selection import Selection
from maskmoe.comparison.suite import Suite, Variant
from maskmoe.errors import UserError
from maskmoe.files.paths import short_path
from maskmoe.launch.devices import Devices
from maskmoe.workflow.process import read_log


@dataclass(frozen=True)
class Comparison:
    """A suite whose runs are trained in a folder, or were trained elsewhere.

    A run is finished if its part exists: a merged part, or the part that this machine has written after the run's last
    stage, with the settings that the suite has now and of the text of this machine. The part of an equal run, which has
    the same settings and text, counts as well. The files of a finished run are not needed any more, and its folder may
    be moved.

    Attributes:
        suite: the suite.
        folder: folder of all files.
        data: dataset of all runs, except for the variants with a vocabulary of their own.
        devices: devices of this machine.
        merged: parts of runs that were finished elsewhere; see `check_merged_parts`.
        recorded: parts of runs that are repeated here, by the runs' names; see `rerun`.
        selection: the runs that are trained.
        vocabularies: datasets of the variants with a vocabulary of their own, by its size.
    """

    suite: Suite
    folder: Path
    data: Data
    devices: Devices
    merged: MergedParts = field(default_factory=MergedParts)
    recorded: Parts = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    vocabularies: Mapping[str, Data] = field(default_factory=dict)

    def rerun(self) -> "Comparison":
        """Return a comparison that repeats the selected finished whole runs in a folder of its own.

        Raises:
            UserError: no selected whole run is finished.
        """
        recorded = {name: found for name, found in self.finished_parts().items() if found.part.kind == "whole"}
        if recorded.keys().isdisjoint(run.name for run in self.selection.whole_runs(self.suite)):
            raise UserError("--rerun: no selected run is finished; name the folders of recorded parts by --merge")
        return replace(self, folder=self.folder / "rerun", merged=MergedParts(), recorded=recorded)

    def plan(self, run: Run) -> RunPlan:
        """Return the stages of a run."""
        return RunPlan(self.suite, run, self.data_of(run.variant.name), self.folder / run.name, self.devices)

    def data_of(self, variant: str) -> Data:
        """Return the dataset of a variant."""
        return self.vocabularies.get(self.suite.variants[variant].vocab_size, self.data)

    def datasets_of_this_machine(self) -> list[Data]:
        """Return the datasets of all runs that are trained here, each once."""
        datasets = {id(data): data for data in map(self.data_of, sorted(self._variants_of_this_machine()))}
        return list(datasets.values())

    def part_file(self, run: Run) -> Path:
        """Return the path of the part that this machine writes when the run is finished."""
        return self.folder / "parts" / f"{run.name}.json"

    def find_part(self, run: Run) -> FoundPart | None:
        """Return the part of a run; None if the run is unfinished.

        Raises:
            UserError: there is a merged part and a different part of this machine.
        """
        merged, own = self.merged.own.get(run.name), self._own_part(run)
        if merged and own and merged.part.text_of_file != own.part.text_of_file:
            raise UserError(
                f"{short_path(merged.file)} and {short_path(own.file)} are different parts of the run {run.name}; "
                "remove one of the files (--rerun compares a repeated run with its part)"
            )
        return merged or own or self._part_of_equal_run(run)

    def is_merged(self, run: Run) -> bool:
        """Return whether a run, or an equal run, was finished elsewhere."""
        found = self.find_part(run)
        return found is not None and not found.file.is_relative_to(self.folder / "parts")

    def write_part(self, run: Run) -> None:
        """Write the part of a run whose stages are all finished."""
        parameters = self._checked_parameters().get(run.variant.name)
        text = text_digests(self.data_of(run.variant.name))
        make_part(self.suite, self.plan(run), text, parameters).write(self.part_file(run))

    def unfinished(self, runs: Iterable[Run]) -> tuple[Run, ...]:
        """Return the runs among the given ones that are unfinished, in order; of equal runs, only the first."""
        unfinished = {self._identity(run): run for run in reversed([*runs]) if self._is_unfinished(run)}
        return tuple(reversed(unfinished.values()))

    def runs_of_next_phase(self) -> tuple[Run, ...]:
        """Return the unfinished runs of the first phase that has any: checks, learning rates, whole runs."""
        for runs in (self.check_runs(), self.tuning_runs()):
            if unfinished := self.unfinished(runs):
                return unfinished
        return self.unfinished(self.whole_runs())

    def runs_to_start(self) -> tuple[Run, ...]:
        """Return the unfinished runs that wait for no other run, in the order in which they should be started.

        All other runs wait for the checks. A whole run waits for the tuning runs that choose its learning rate.
        """
        return self.unfinished(self.check_runs()) or self.unfinished((*self.tuning_runs(), *self.whole_runs()))

    def known_runs(self) -> tuple[Run, ...]:
        """Return all selected runs that are known by now. A whole run is known once its learning rate is chosen."""
        return (*self.check_runs(), *self.tuning_runs(), *self.whole_runs())

    @property
    def is_all_merged(self) -> bool:
        """Whether all selected runs were finished elsewhere, so that nothing is to be done here."""
        return not self._variants_of_this_machine()

    def check_runs(self) -> tuple[Run, ...]:
        """Return the checks of all variants that have a selected run without a merged part."""
        here = self._variants_of_this_machine()
        return tuple(run for run in check_runs(self.suite) if run.variant.name in here)

    def tuning_runs(self) -> tuple[Run, ...]:
        """Return the tuning runs that are selected, or on which selected runs depend; none if runs are repeated.

        Tuning runs that the search of learning rates has not reached are left out, unless their own names are selected.
        """
        if self.recorded:
            return ()
        losses = self._tuning_losses()
        reached = losses.keys() | {run.name for run in next_tuning_runs(self.suite, losses)}
        runs = self.selection.tuning_runs(self.suite)
        return tuple(run for run in runs if run.name in reached or self.selection.names(run))

    def whole_runs(self) -> tuple[Run, ...]:
        """Return all selected runs that are compared, without those whose learning rate is not chosen yet.

        Repeated runs have the learning rates of the recorded runs.
        """
        runs = self.selection.whole_runs(self.suite)
        if self.recorded:
            rates = {name: found.part.learning_rate for name, found in self.recorded.items()}
        else:
            of_variants = self.learning_rates()
            rates = {run.name: of_variants[run.variant.name] for run in runs if run.variant.name in of_variants}
        return tuple(replace(run, learning_rate=rates[run.name]) for run in runs if run.name in rates)

    def find_run(self, name: str) -> Run:
        """Return the run with the name.

        Raises:
            UserError: no run has the name.
        """
        tuning = () if self.recorded else tuning_runs(self.suite)
        for run in (*self.check_runs(), *tuning, *self.whole_runs()):
            if run.name == name:
                return run
        raise UserError(f"the suite has no run {name}; --list shows all runs")

    def learning_rates(self) -> dict[str, str]:
        """Return the learning rate of every variant for which no more tuning run is needed."""
        losses = self._tuning_losses()
        waiting = {run.variant.name for run in next_tuning_runs(self.suite, losses)}
        rates = choose_learning_rates(self.suite, losses)
        return {name: rate for name, rate in rates.items() if self.suite.variants[name].tuned_as not in waiting}

    def finished_parts(self) -> dict[str, FoundPart]:
        """Return the parts of all finished runs of the suite, whether or not the runs are selected."""
        runs = (*tuning_runs(self.suite), *replace(self, selection=Selection()).whole_runs())
        found = {run.name: part for run in runs if (part := self.find_part(run))}
        # Also report merged runs whose learning rate cannot be chosen here, because tuning runs are missing.
        return {**self.merged.own, **found}

    def parameters(self) -> dict[str, Parameters]:
        """Return the numbers of parameters of all main variants that are checked here or were checked elsewhere."""
        main = {variant.name for variant in self.suite.of_role("main")}
        recorded = {found.part.variant: found.part.parameters for found in self.finished_parts().values()}
        found = {name: parameters for name, parameters in recorded.items() if parameters} | self._checked_parameters()
        return {name: parameters for name, parameters in found.items() if name in main}

    def check_merged_parts(self) -> None:
        """Check that the merged parts of this suite have its settings, one text, and the chosen learning rates.

        Raises:
            UserError: a part is refused. The message names its file and the reason.
        """
        runs = {run.name: run for run in (*tuning_runs(self.suite), *Selection().whole_runs(self.suite))}
        for found in self.merged.own.values():
            run, part = runs.get(found.part.run), found.part
            if run is None:
                raise UserError(
                    f"{short_path(found.file)} is a part of the run {part.run}, which the suite {self.suite.name} does "
                    "not have"
                )
            possible = map(run.variant.learning_rate, self.suite.learning_rates.values)
            if run.kind == "whole" and part.learning_rate in possible:
                run = replace(run, learning_rate=part.learning_rate)
            check_settings(found, self.suite, run)
        self.check_text()
        rates = self.learning_rates()
        for found in self.merged.own.values():
            part = found.part
            if part.kind == "whole" and rates.get(part.variant, part.learning_rate) != part.learning_rate:
                raise UserError(
                    f"{short_path(found.file)} was made with other settings than the suite {self.suite.name} has now: "
                    f"lr is {part.learning_rate}, not {rates[part.variant]}, which the tuning runs choose"
                )

    def check_text(self) -> None:
        """Check that this suite's merged parts of a vocabulary belong to one text: to this machine's if it exists.

        Raises:
            UserError: a part belongs to another text.
        """
        for vocab_size in {variant.vocab_size for variant in self.suite.variants.values()}:
            # Without parts, spare the digests: reading a large dataset takes minutes.
            if parts := self._parts_of_vocabulary(vocab_size):
                data = self._existing_data(vocab_size)
                our_name = f"the data in {short_path(data.files.folder)}" if data else ""
                check_same_text(parts, text_digests(data) if data else None, our_name)

    def _part_of_equal_run(self, run: Run) -> FoundPart | None:
        """Return the part of a run with equal settings and text, of this suite or another one, as the run's part.

        A part without exact losses is of no use for a run whose losses a limit must reproduce.
        """
        if run.kind == "check":
            return None
        settings = settings_of(self.suite, run)
        for found in self._parts_of_equal_runs(run, settings):
            if found.part.exact_losses.iterations or not num_exact_losses(self.suite, run):
                own = {
                    "suite": self.suite.name,
                    "run": run.name,
                    "variant": run.variant.name,
                    "learning_rate": run.learning_rate,
                    "settings": settings,
                }
                return FoundPart(found.file, found.part.model_copy(update=own))
        return None

    def _parts_of_equal_runs(self, run: Run, settings: Mapping[str, str]) -> Iterator[FoundPart]:
        """Yield the parts of other runs with equal settings and text, of this suite and then of other suites."""
        for variant in self._equal_variants[run.variant.name]:
            other = replace(run, variant=variant)
            found = self.merged.own.get(other.name) or self._own_part(other)
            if found and has_settings(found.part, settings):
                yield found
        if not self.merged.others or (text := self._text_of(run.variant.vocab_size)) is None:
            return
        if found := self.merged.others.get(identity_of(run.kind, run.is_analyzed, settings, text)):
            yield found

    @cached_property
    def _equal_variants(self) -> dict[str, list[Variant]]:
        """For each variant, the other variants whose runs are equal if their seeds and learning rates are equal."""
        groups: dict[Identity, list[Variant]] = {}
        for variant in self.suite.variants.values():
            identity = self._identity(Run(variant, 0, "1", "whole"))
            groups.setdefault(identity, []).append(variant)
        return {
            variant.name: [other for other in group if other is not variant]
            for group in groups.values()
            for variant in group
        }

    def _identity(self, run: Run) -> Identity:
        """Return what decides the result of a run of this suite; a check is a run of its own."""
        own = {"vocab-size": run.variant.vocab_size, "check": run.name if run.kind == "check" else ""}
        return identity_of(run.kind, run.is_analyzed, settings_of(self.suite, run), own)

    def _text_of(self, vocab_size: str) -> Mapping[str, str] | None:
        """Return the digests of the text of a vocabulary; None if neither its data nor a merged part exists."""
        if data := self._existing_data(vocab_size):
            return text_digests(data)
        return next((found.part.text for found in self._parts_of_vocabulary(vocab_size)), None)

    def _existing_data(self, vocab_size: str) -> Data | None:
        """Return the dataset of a vocabulary; None if its files do not exist."""
        data = self.vocabularies.get(vocab_size, None if vocab_size else self.data)
        return data if data is not None and _exists(data) else None

    def _parts_of_vocabulary(self, vocab_size: str) -> list[FoundPart]:
        """Return this suite's merged and recorded parts of the variants with a vocabulary."""
        parts = (*self.merged.own.values(), *self.recorded.values())
        return [found for found in parts if self.suite.variants[found.part.variant].vocab_size == vocab_size]

    def _tuning_losses(self) -> dict[str, float | None]:
        """Return the held-out losses of all finished tuning runs by name; None if training diverged."""
        found = {run.name: self.find_part(run) for run in tuning_runs(self.suite)}
        return {name: part.part.validation.last_loss for name, part in found.items() if part}

    def _is_unfinished(self, run: Run) -> bool:
        return bool(self.plan(run).unfinished) if run.kind == "check" else self.find_part(run) is None

    def _own_part(self, run: Run) -> FoundPart | None:
        """Return the part that this machine has written, unless a setting of the run or the text has changed since."""
        file, data = self.part_file(run), self.data_of(run.variant.name)
        if not file.exists():
            return None
        # A damaged part is written again.
        with suppress(UserError):
            part = Part.read(file)
            is_same = has_settings(part, settings_of(self.suite, run))
            if is_same and (not _exists(data) or part.text == text_digests(data)):
                return FoundPart(file, part)
        return None

    def _variants_of_this_machine(self) -> set[str]:
        """Return the names of the variants that have selected runs without a merged part."""
        merged = {run.name for run in (*self.tuning_runs(), *self.whole_runs()) if self.is_merged(run)}
        merged |= self.merged.own.keys()  # learning rates need not be chosen here yet
        runs = (*self.tuning_runs(), *self.selection.whole_runs(self.suite))
        here = {run.name: run.variant.name for run in runs if run.name not in merged}
        return {name for run, name in here.items() if not self.recorded or run in self.recorded}

    def _checked_parameters(self) -> dict[str, Parameters]:
        """Return the numbers of parameters of all variants that were checked here."""
        logs = {run.variant.name: self.plan(run).files.log("check") for run in check_runs(self.suite)}
        found = {name: Parameters.from_check(read_log(log)) for name, log in logs.items() if log.exists()}
        return {name: parameters for name, parameters in found.items() if parameters}


def _exists(data: Data) -> bool:
    return not isinstance(data, MissingData) and all(path.exists() for path in data.inputs)
