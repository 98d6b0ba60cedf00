"""Write docs/comparison-laptop.md: the figures come from the recorded parts and from the measurements of attention.

python docs/generators/laptop.py [--check]

The text around the figures is in comparison-laptop.md.j2. A figure that is written out there summarizes others, or
belongs to an option that was removed and has no parts.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pages

from maskmoe.command_line.compare import open_comparison, parse_arguments
from maskmoe.comparison.answers import RouterSummary, summarize_routers
from maskmoe.comparison.execution import results_of
from maskmoe.comparison.results import Estimate, loss_on, paired_difference

ROOT = pages.DOCS.parent
REPORTS = pages.DOCS / "comparison-laptop"


class SuiteFigures:
    """The figures of a suite as text, by the names of its variants."""

    def __init__(self, name: str) -> None:
        """Read the recorded parts of a suite in launch/suites."""
        with TemporaryDirectory() as folder:
            words = [str(ROOT / "launch" / "suites" / f"{name}.yaml"), "--run-dir", folder, "--packages", folder]
            comparison = open_comparison(parse_arguments([*words, "--merge", str(REPORTS / "parts")]))
            self.results = results_of(comparison, command="")

    def loss(self, variant: str, **choice: Any) -> str:
        """Return the mean loss of a variant's runs with its interval; the choice is that of `difference`."""
        return f"{self.estimate(variant, **choice):.4f}"

    def mean(self, variant: str, **choice: Any) -> str:
        """Return the mean loss of a variant's runs without its interval."""
        return f"{self.estimate(variant, **choice).mean:.3f}"

    def estimate(self, variant: str, seeds: Collection[int] = (), **choice: Any) -> Estimate:
        """Return the mean loss of a variant's runs; the choice is that of `difference`."""
        losses = [loss_on(**choice)(run) for run in self.results.runs_of(variant) if not seeds or run.seed in seeds]
        return Estimate.of([loss for loss in losses if loss is not None])

    def difference(self, variant: str, baseline: str, seeds: Collection[int] = (), **choice: Any) -> str:
        """Return the mean difference of the losses of two variants over their common seeds, bold if it is resolved.

        Args:
            variant: name of the variant.
            baseline: name of the variant whose loss is subtracted.
            seeds: seeds to which the difference is restricted; all seeds if empty.
            choice: the losses, see `loss_on`.
        """
        value = loss_on(**choice)
        estimate = paired_difference(
            self.results, variant, baseline, lambda run: value(run) if not seeds or run.seed in seeds else None
        )
        assert estimate is not None, f"{variant} and {baseline} have no common seeds"
        return format_difference(estimate)

    def losses_along(self, curve: str, method: str, **choice: Any) -> str:
        """Return a table's cells with the mean losses of a method at all points of a curve."""
        return " | ".join(self.mean(variants[method], **choice) for variants in self.points_of(curve))

    def differences_along(self, curve: str, baseline: str, **choice: Any) -> str:
        """Return a table's cells with the differences of MaskMoE to a baseline at all points of a curve."""
        points = self.points_of(curve)
        return " | ".join(self.difference(names["maskmoe"], names[baseline], **choice) for names in points)

    def points_of(self, curve: str) -> list[dict[str, str]]:
        """Return the names of the variants with runs at the points of a curve, by the names of the main variants."""
        return [point.variants for found in self.results.curves if found.name == curve for point in found.points]

    def bands(self, variant: str, baseline: str) -> str:
        """Return a table's cells with the differences in all frequency bands."""
        return " | ".join(self.difference(variant, baseline, band=band.name) for band in self.results.bands)

    def texts(self, variant: str, baseline: str) -> str:
        """Return a table's cells with the differences on all held-out texts."""
        return " | ".join(
            self.difference(variant, baseline, held_out=text) for text in (None, "prose", "code", "other")
        )

    def router(self, variant: str) -> RouterSummary:
        """Return how the routers of a main variant behave."""
        found = self.results.variant(variant)
        assert found is not None, variant
        return next(summary for summary in summarize_routers(self.results) if summary.title == found.title)

    def trials(self, variant: str, rates: Collection[str]) -> str:
        """Return a table's cells with the losses of a variant's trials, the lowest in bold."""
        found = self.results.variant(variant)
        assert found is not None, variant
        losses = {rate: loss for rate, loss in found.tuning.items() if loss is not None}
        lowest = min(losses.values())
        texts = {rate: f"**{loss:.3f}**" if loss == lowest else f"{loss:.3f}" for rate, loss in losses.items()}
        return " | ".join(texts.get(rate, "") for rate in rates)


class AttentionFigures:
    """The measurements of some models' attention to the preceding token, see tools/studies/preceding_token.py."""

    def __init__(self, file: Path) -> None:
        """Read the measurements of all models from a JSON file."""
        self.models: dict[str, dict[str, float]] = {
            entry["model"]: entry for entry in json.loads(file.read_text(encoding="utf-8"))
        }

    def values(self, group: str, key: str, seeds: Collection[int] = ()) -> dict[int, float]:
        """Return a quantity of a group's models by seed, of all seeds or of some."""
        names = [name for name in self.models if name.startswith(f"{group}.seed-")]
        by_seed = {int(name.partition(".seed-")[2]): self.models[name][key] for name in names}
        return {seed: value for seed, value in by_seed.items() if not seeds or seed in seeds}

    def mean(self, group: str, key: str = "attention", digits: int = 2, seeds: Collection[int] = ()) -> str:
        """Return the mean of a quantity over the models of a group, of all seeds or of some."""
        return f"{Estimate.of([*self.values(group, key, seeds).values()]).mean:.{digits}f}"

    def range(self, group: str, seeds: Collection[int] = ()) -> str:
        """Return the least and the greatest attention of a group's models, of all seeds or of some."""
        found = self.values(group, "attention", seeds).values()
        return f"{min(found):.2f} to {max(found):.2f}"

    def difference(self, group: str, baseline: str, key: str) -> str:
        """Return the mean difference of a loss between two groups over their common seeds, bold if it is resolved."""
        own, theirs = self.values(group, key), self.values(baseline, key)
        return format_difference(Estimate.of([own[seed] - theirs[seed] for seed in sorted(own.keys() & theirs)]))


def format_difference(estimate: Estimate) -> str:
    """Format a difference with three digits, bold if it is resolved; a difference that rounds to 0 has no sign."""
    text = re.sub(r"^[+−](?=0\.000)", "", f"{estimate:+.3f}")
    return f"**{text}**" if estimate.is_resolved else text


def render() -> str:
    """Return the page."""
    folder = REPORTS / "attention"
    page = pages.fill(
        "comparison-laptop.md.j2",
        long=SuiteFigures("laptop"),
        short=SuiteFigures("laptop-options"),
        attention={path.stem: AttentionFigures(path) for path in folder.glob("*.json")},
    )
    return pages.wrap(page)  # the figures have changed the lengths of the lines


if __name__ == "__main__":
    pages.run("comparison-laptop.md", render, "Write docs/comparison-laptop.md from the recorded parts.")
