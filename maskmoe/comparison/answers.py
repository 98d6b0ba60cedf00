"""State the findings of a comparison in sentences: one answer for each question that a reader has."""

from collections.abc import Iterable
from itertools import groupby
from operator import methodcaller
from typing import NamedTuple

from maskmoe.comparison.results import CurveResult, Estimate, Results, VariantResult, loss_on, paired_difference
from maskmoe.comparison.run_results import RunResult

_VERDICTS = {
    "Better": "{} is better on",
    "Worse": "{} is worse on",
    "Not resolved": "The difference is not resolved on",
    "": "One seed resolves nothing on",
}
"""How a sentence about further held-out texts begins, by the verdict; `{}` stands for the method's title."""

_SIGNS = {"Better": "below", "Worse": "above"}


class Answer(NamedTuple):
    """The answer to a question.

    Attributes:
        question: the question.
        sentences: the answer.
        plot: file name of the plot that shows the answer, without its suffix; empty if there is none.
    """

    question: str
    sentences: list[str]
    plot: str = ""


def answers(results: Results) -> list[Answer]:
    """Answer the questions for which there are results."""
    method = results.variant(results.method)
    baselines = [variant for variant in results.baseline_variants if variant != method]
    if method is None or not baselines:
        return []
    found = [_answer_better(results, method, baseline) for baseline in baselines]
    found += [_answer_where(results, method, baselines), _answer_when(results, method, baselines)]
    found += [_answer_curve(results, method, baselines, curve) for curve in results.curves]
    found.append(_answer_grid(results, baselines))
    return [answer for answer in found if answer.sentences]


def _answer_better(results: Results, method: VariantResult, baseline: VariantResult) -> Answer:
    sentences = []
    if difference := paired_difference(results, method.name, baseline.name, loss_on(None)):
        sentences.append(f"On held-out text of the same kind, {_compare(method.title, baseline.title, difference)}.")
    others = {
        name: difference
        for name in results.further
        if (difference := paired_difference(results, method.name, baseline.name, loss_on(name)))
    }
    for verdict, beginning in _VERDICTS.items():
        parts = [f"“{name}” ({each:+.4f})" for name, each in others.items() if each.verdict == verdict]
        if parts:
            sentences.append(f"{beginning.format(method.title)} {_enumerate(parts)}.")
    return Answer(f"Is {method.title} better than {baseline.title}?", sentences)


def _answer_where(results: Results, method: VariantResult, baselines: list[VariantResult]) -> Answer:
    sentences = []
    for baseline in baselines:
        by_band = {
            band.name: paired_difference(results, method.name, baseline.name, loss_on(band=band.name))
            for band in results.bands
        }
        parts = [f"{estimate:+.4f} for ids of the {name}" for name, estimate in by_band.items() if estimate]
        if parts:
            sentences.append(f"{method.title} − {baseline.title} is {_enumerate(parts)}.")
    return Answer("In which ids does the difference lie?", sentences, "bands")


def _answer_when(results: Results, method: VariantResult, baselines: list[VariantResult]) -> Answer:
    sentences = []
    for baseline in baselines:
        points = differences_during_training(results, method, baseline)
        if len(points) < 2:
            continue
        tokens = {iteration: f"{iteration * method.tokens_per_iteration / 1e6:.1f}" for iteration, _ in points}
        (first, start), (last, end) = points[0], points[-1]
        sentences.append(
            f"{method.title} − {baseline.title} goes from {start:+.4f} after {tokens[first]} million tokens to "
            f"{end:+.4f} after {tokens[last]} million."
        )
        if end.num > 1:
            spans = [
                f"{_SIGNS[verdict]} 0 {_describe_span([tokens[iteration] for iteration in span])} million tokens"
                for verdict, span in _spans_of_verdicts(points)
                if verdict in _SIGNS
            ]
            sentences.append(
                f"The difference is resolved {_enumerate(spans)}." if spans else "The difference is never resolved."
            )
        if method.learning_rate != baseline.learning_rate:
            sentences.append(
                f"The learning rates differ ({method.title} {method.learning_rate}, {baseline.title} "
                f"{baseline.learning_rate}), so differences before the end are also those of the rates."
            )
    return Answer("How does the difference change during training?", sentences, "overview")


def _answer_curve(
    results: Results, method: VariantResult, baselines: list[VariantResult], curve: CurveResult
) -> Answer:
    sentences = []
    differences = curve_differences(results, curve)
    for baseline in baselines:
        if baseline.name not in differences:
            continue
        values = _enumerate([f"{difference:+.4f} at {value:g}" for value, difference in differences[baseline.name]])
        sentence = f"{method.title} − {baseline.title} is {values}"
        change = _change(results, method.name, baseline.name, curve)
        if change and change.num > 1:
            sentence += f"; from the first to the last it {_describe_change(change)}"
        sentences.append(f"{sentence}.")
    return Answer(f"How does the difference change over {curve.title}?", sentences, f"curve_{curve.name}")


def _answer_grid(results: Results, baselines: list[VariantResult]) -> Answer:
    sentences = []
    better: dict[str, set[tuple[float, float]]] = {}  # by the baseline's title, the points that are better beyond error
    for baseline in baselines:
        differences = grid_differences(results, baseline)
        if not differences:
            continue
        place, best = min(differences.items(), key=lambda item: item[1].mean)
        sentences.append(f"The difference to {baseline.title} is lowest at {_describe_place(place)}: {best:+.4f}.")
        better[baseline.title] = {place for place, each in differences.items() if each.verdict == "Better"}
    if better:
        places = [_describe_place(place) for place in sorted(set.intersection(*better.values()))]
        subject = f"{_enumerate(places)} {'is' if len(places) == 1 else 'are'}" if places else "No P and V_f is"
        sentences.append(f"{subject} better than {_enumerate([*better])} beyond error.")
    return Answer("Which P and V_f are best?", sentences, "grid")


class RouterSummary(NamedTuple):
    """How the routers of a variant behave: means over its runs and layers, of tokens with a choice.

    Attributes:
        title: title of the variant.
        num_runs: number of runs.
        first_weight: weight of a token's best expert at the first checkpoint.
        last_weight: weight of a token's best expert at the last checkpoint.
        first_change: share of these tokens whose expert changes between the first two checkpoints; nan if unknown.
        last_change: share of these tokens whose expert changes between the last two checkpoints; nan if unknown.
        experts: experts that an id's occurrences are sent to at the last checkpoint, by band.
        id_information: mutual information of id and expert at the last checkpoint, over all tokens, in nats.
    """

    title: str
    num_runs: int
    first_weight: float
    last_weight: float
    first_change: float
    last_change: float
    experts: dict[str, float]
    id_information: float


def summarize_routers(results: Results) -> list[RouterSummary]:
    """Summarize the routers of all main variants whose tokens have a choice."""
    summaries = []
    for variant in results.of_role("main"):
        histories = [run.routing for run in results.runs_of(variant.name) if run.routing and run.routing.has_choice]
        if not histories:
            continue
        weights = [history.first_weight for history in histories]
        changes = [history.routable_fluctuation for history in histories if history.routable_fluctuation]
        experts = {
            band.name: mean_of_known(value for history in histories for value in history.distinct_experts[band.name])
            for band in results.bands
        }
        summary = RouterSummary(
            variant.title,
            len(histories),
            first_weight=mean_of_known(value for rows in weights for value in rows[0]),
            last_weight=mean_of_known(value for rows in weights for value in rows[-1]),
            first_change=mean_of_known(value for rows in changes for value in rows[0]),
            last_change=mean_of_known(value for rows in changes for value in rows[-1]),
            experts=experts,
            id_information=mean_of_known(value for history in histories for value in history.id_information),
        )
        summaries.append(summary)
    return summaries


def differences_during_training(
    results: Results, variant: VariantResult, baseline: VariantResult
) -> list[tuple[int, Estimate]]:
    """Return how a variant differs from a baseline on a part of the held-out text, by iteration."""
    found = (
        (each, paired_difference(results, variant.name, baseline.name, methodcaller("held_out_loss", each)))
        for each in common_iterations([*results.runs_of(variant.name), *results.runs_of(baseline.name)])
    )
    return [(iteration, difference) for iteration, difference in found if difference]


def common_iterations(runs: Iterable[RunResult]) -> list[int]:
    """Return the iterations with a held-out loss in all runs."""
    return sorted(set.intersection(*(set(run.validation.iterations) for run in runs)))


def grid_differences(results: Results, baseline: VariantResult) -> dict[tuple[float, float], Estimate]:
    """Return how the variants of the grid differ from a baseline, by P and V_f, ascending."""
    return {
        place: difference
        for place, variant in results.grid_variants.items()
        if (difference := paired_difference(results, variant.name, baseline.name, loss_on(None)))
    }


def curve_differences(results: Results, curve: CurveResult) -> dict[str, list[tuple[float, Estimate]]]:
    """Return how the method differs from each baseline along a curve, by value; only for at least two values."""
    if results.variant(results.method) is None:
        return {}
    found = {
        baseline.name: [
            (point.value, difference)
            for point in curve.points
            if (difference := _difference_at(results, results.method, baseline.name, point.variants))
        ]
        for baseline in results.baseline_variants
    }
    return {name: points for name, points in found.items() if len(points) > 1}


def _difference_at(results: Results, method: str, baseline: str, variants: dict[str, str]) -> Estimate | None:
    """Return how the method differs from a baseline in the setting of a curve's point."""
    if not {method, baseline} <= variants.keys():
        return None
    return paired_difference(results, variants[method], variants[baseline], loss_on(None))


def _change(results: Results, method: str, baseline: str, curve: CurveResult) -> Estimate | None:
    """Return how the difference at the last point differs from that at the first, over their common seeds."""
    differences = []
    for point in (curve.points[0], curve.points[-1]):
        if not {method, baseline} <= point.variants.keys():
            return None
        own, theirs = (
            {run.seed: run.loss for run in results.runs_of(point.variants[name])} for name in (method, baseline)
        )
        differences.append({seed: own[seed] - theirs[seed] for seed in own.keys() & theirs})
    first, last = differences
    changes = [last[seed] - first[seed] for seed in sorted(first.keys() & last)]
    return Estimate.of(changes) if changes else None


def _compare(name: str, other: str, difference: Estimate) -> str:
    """Say whether a loss is smaller than another one, given their difference."""
    if difference.num < 2:
        return f"one seed has a difference of {difference:+.4f}, which resolves nothing"
    numbers = f"{difference:+.4f} nats, {difference.num} seeds"
    if not difference.is_resolved:
        return f"the difference of {name} and {other} is not resolved ({numbers})"
    return f"{name} is {'better' if difference.mean < 0 else 'worse'} than {other} ({numbers})"


def _spans_of_verdicts(points: list[tuple[int, Estimate]]) -> list[tuple[str, list[int]]]:
    """Return the verdicts of differences, each with the consecutive iterations that have it."""
    spans = groupby(points, key=lambda point: point[1].verdict)
    return [(verdict, [iteration for iteration, _ in span]) for verdict, span in spans]


def _describe_span(tokens: list[str]) -> str:
    return f"from {tokens[0]} to {tokens[-1]}" if len(tokens) > 1 else f"at {tokens[0]}"


def _describe_place(place: tuple[float, float]) -> str:
    mass, number = place
    return f"P = {100 * mass:g} % with V_f = {number:.0f}"


def _describe_change(change: Estimate) -> str:
    if not change.is_resolved:
        return f"changes by {change:+.4f}, which is not resolved"
    verb = "falls" if change.mean < 0 else "rises"
    return f"{verb} by {abs(change.mean):.4f} ± {change.half_width:.4f}, which is resolved"


def _enumerate(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def mean_of_known(values: Iterable[float | None]) -> float:
    """Return the mean of the values that exist; nan if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")
