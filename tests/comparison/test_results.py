"""Statistics of the runs' losses against scipy's own, and the report with its plots."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from support.synthetic import EFFECTS, synthetic_results

from maskmoe.comparison import plots
from maskmoe.comparison.answers import answers, grid_differences, summarize_routers
from maskmoe.comparison.fairness import Parameters, check_active_parameters
from maskmoe.comparison.report import render_report, write_report
from maskmoe.comparison.results import Estimate, Results, differences_to, paired_difference
from maskmoe.errors import UserError


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6, unique=True))
def test_estimate_against_scipy(values):
    estimate = Estimate.of(values)
    assert estimate.mean == pytest.approx(np.mean(values))
    assert estimate.standard_error == pytest.approx(stats.sem(values))
    p_value = stats.ttest_1samp(values, 0).pvalue
    if abs(p_value - 0.05) > 1e-9:
        assert estimate.is_resolved == (p_value < 0.05)


@given(st.lists(st.integers(-999, 999).map(lambda number: number / 64), min_size=2, max_size=6, unique=True))
def test_interval_against_scipy(values):
    estimate = Estimate.of(values)
    spread = {"loc": np.mean(values), "scale": stats.sem(values)}
    assert estimate.interval == pytest.approx(stats.t.interval(0.95, len(values) - 1, **spread))
    assert estimate.standard_deviation == pytest.approx(np.std(values, ddof=1))


def test_estimate_is_printed_with_half_of_its_interval():
    estimate = Estimate.of([1.0, 2.0, 3.0])
    half_width = stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert f"{estimate:+.3f}" == f"+2.000 ± {half_width:.3f}"
    assert f"{Estimate.of([1.0]):.1f}" == "1.0"
    assert f"{Estimate.of([-1.0, -2.0, -3.0]):.3f}" == f"−2.000 ± {half_width:.3f}"


def test_differences_of_a_further_held_out_text():
    results = synthetic_results(noise=0)
    smoe = results.variant("smoe")
    of_stories = {each.variant.name: each.estimates for each in differences_to(results, smoe, "stories")}
    assert of_stories.keys() == EFFECTS.keys() - {"smoe"}
    for name, estimates in of_stories.items():
        expected = [2 * EFFECTS[name], *(EFFECTS[name] * (1 + index) for index in range(3))]
        assert [estimate.mean for estimate in estimates] == pytest.approx(expected)
    assert differences_to(results, smoe, "nothing") == []


def test_one_value_resolves_nothing():
    estimate = Estimate.of([1.0])
    assert math.isnan(estimate.standard_error)
    assert math.isnan(estimate.half_width)
    assert not estimate.is_resolved


def test_paired_difference_is_that_of_a_paired_t_test():
    results = synthetic_results(noise=0.1)
    losses = {name: [run.loss for run in results.runs_of(name)] for name in ("maskmoe", "smoe")}
    difference = paired_difference(results, "maskmoe", "smoe", lambda run: run.loss)
    test = stats.ttest_rel(losses["maskmoe"], losses["smoe"])
    assert difference.mean / difference.standard_error == pytest.approx(test.statistic)
    assert difference.is_resolved == (test.pvalue < 0.05)


def test_only_common_seeds_are_paired():
    results = synthetic_results()
    kept = [run for run in results.runs if run.variant != "maskmoe" or run.seed == 2]
    some = Results(**{**results.__dict__, "runs": kept})
    difference = paired_difference(some, "maskmoe", "smoe", lambda run: run.loss)
    assert difference.num == 1
    assert paired_difference(some, "nothing", "smoe", lambda run: run.loss) is None


def test_report_states_the_effects_of_the_synthetic_results(tmp_path):
    text = write_report(synthetic_results(), tmp_path / "report").read_text()
    _, _, to_smoe = text.partition("## Difference to Smoe")
    for name, effect in EFFECTS.items():
        if name != "smoe":
            row = re.search(rf"\| {name.capitalize()} +\|(.*)", to_smoe)[1]
            mean = float(re.search(r"[+−][\d.]+", row)[0].replace("−", "-"))
            assert mean == pytest.approx(effect, abs=0.01)
            assert "**" in row
    assert "Better: Hash-balanced; Maskmoe." in to_smoe
    assert "Worse: Dense." in to_smoe
    assert "20 iterations, the same to the last bit" in text
    assert "**DIFFERENT** in 1" in text
    images = set(re.findall(r"\]\((\w+\.png)\)", text))
    assert images == {path.name for path in (tmp_path / "report").glob("*.png")}
    assert len(images) >= 5
    for image in images:
        Image.open(tmp_path / "report" / image).verify()


def _answers(results):
    """Return the answers by question."""
    return {answer.question: " ".join(answer.sentences) for answer in answers(results)}


def test_report_answers_the_questions_of_a_reader():
    """The sentences state the effects from which the synthetic losses are made."""
    found = _answers(synthetic_results())
    better = found["Is Maskmoe better than Smoe?"]
    assert re.match(r"On held-out text of the same kind, Maskmoe is better than Smoe \(−0\.0[78]", better)
    assert re.search(r"Maskmoe is better on “stories” \(−0\.1[567]", better)
    assert "better than Hash-balanced (−0.0" in found["Is Maskmoe better than Hash-balanced?"]
    of_size = found["How does the difference change over size of something?"]
    numbers = r"\+0\.0[12]\d+ ± [\d.]+ at 50 and −0\.0[78]\d+ ± [\d.]+ at 100"
    assert re.search(rf"− Smoe is {numbers}; from the first to the last it falls by 0\.(09|10)", of_size)
    of_grid = found["Which P and V_f are best?"]
    assert "The difference to Smoe is lowest at P = 20 % with V_f = 2: −0.0" in of_grid
    assert "P = 20 % with V_f = 2 is better than Smoe and Hash-balanced beyond error." in of_grid
    during = found["How does the difference change during training?"]
    assert during.count("The difference is resolved below 0 from 1.0 to 4.0 million tokens.") == 2
    assert "learning rates" not in during


def test_report_says_during_which_training_a_difference_is_resolved():
    results = synthetic_results()
    for run in results.runs:
        if run.variant == "maskmoe":
            run.validation.losses[0] += 1
            run.validation.losses[2] += run.seed - 2
    during = _answers(results)["How does the difference change during training?"]
    spans = "above 0 at 1.0 million tokens, below 0 at 2.0 million tokens and below 0 at 4.0"
    assert during.count(f"The difference is resolved {spans} million tokens.") == 2


def test_report_says_that_rates_differ():
    results = synthetic_results()
    variants = [
        variant.model_copy(update={"learning_rate": "8e-3"}) if variant.name == "smoe" else variant
        for variant in results.variants
    ]
    during = _answers(results.model_copy(update={"variants": variants}))
    text = during["How does the difference change during training?"]
    assert text.count("The learning rates differ (Maskmoe 4e-3, Smoe 8e-3)") == text.count("learning rates") == 1


def test_points_of_the_grid_are_compared_seed_by_seed():
    """A point that is better than one baseline, or with one seed, is not called better."""
    results = synthetic_results()
    point = results.of_role("grid")[0]
    (run,) = results.runs_of(point.name)
    losses = {each.seed: each.loss for each in results.runs_of("hash-balanced")}
    of_seeds = [run.model_copy(update={"seed": seed, "loss": loss - 0.01}) for seed, loss in losses.items()]
    others = [each for each in results.runs if each.variant != point.name]
    results = results.model_copy(update={"runs": [*others, *of_seeds]})
    found = grid_differences(results, results.variant("hash-balanced"))
    assert found[0.1, 2].mean == pytest.approx(-0.01)
    assert [each.num for each in found.values()] == [3, 3, 1]
    places = "P = 10 % with V_f = 2 and P = 20 % with V_f = 2 are better than Smoe and Hash-balanced beyond error."
    assert places in _answers(results)["Which P and V_f are best?"]
    worse = [each.model_copy(update={"loss": each.loss + 1}) for each in results.runs if each.variant == "maskmoe"]
    runs = [each for each in results.runs if each.variant != "maskmoe"] + worse
    of_one = _answers(results.model_copy(update={"runs": runs}))["Which P and V_f are best?"]
    assert of_one.endswith("P = 10 % with V_f = 2 is better than Smoe and Hash-balanced beyond error.")
    noisy = _answers(synthetic_results(noise=0.5))["Which P and V_f are best?"]
    assert noisy.endswith("No P and V_f is better than Smoe and Hash-balanced beyond error.")


def test_what_is_not_resolved_is_called_so():
    found = {answer.question: answer.sentences[0] for answer in answers(synthetic_results(noise=0.5))}
    assert "is not resolved" in found["Is Maskmoe better than Smoe?"]
    one_seed = answers(synthetic_results(seeds=(1,)))
    assert "One seed resolves nothing on “stories” (−0.1" in one_seed[0].sentences[1]
    assert "one seed has a difference of −0.0" in one_seed[0].sentences[0]


@pytest.mark.parametrize(
    "missing",
    [{"maskmoe"}, {"smoe", "hash-balanced"}, {"maskmoe", "smoe"}, {"dense", "smoe", "hash-balanced", "maskmoe"}],
)
def test_report_of_a_part_of_the_runs_leaves_out_what_cannot_be_compared(missing, tmp_path):
    results = synthetic_results()
    some = {
        "runs": [run for run in results.runs if run.variant not in missing],
        "variants": [variant for variant in results.variants if variant.name not in missing],
    }
    text = write_report(results.model_copy(update=some), tmp_path).read_text()
    assert (
        ("## How does the difference change over size of something?" in text)
        == (tmp_path / "curve_size.png").exists()
        == (missing == set())
    )
    assert ("## P and V_f" in text) == ("maskmoe" not in missing)


def test_curve_that_starts_at_0_is_drawn_whole(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig

    def record(figure, path, **options):
        figures.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    results = synthetic_results()
    (curve,) = results.curves
    first, *others = curve.points
    points = [first.model_copy(update={"value": 0}), *others]
    plots.draw_plots(results.model_copy(update={"curves": [curve.model_copy(update={"points": points})]}), tmp_path)
    (axes,) = figures[-1].axes
    left, right = axes.get_xlim()
    assert left < 0 < others[-1].value < right
    assert axes.get_xticks().tolist() == [0, *(point.value for point in others)]


def test_report_of_one_checkpoint_of_each_run(tmp_path):
    """The change of the routing between checkpoints does not exist."""
    results = synthetic_results()
    runs = []
    for run in results.runs:
        if run.routing:
            rows = {name: getattr(run.routing, name)[:1] for name in ("iterations", "entropy", "first_weight")}
            routing = run.routing.model_copy(update={**rows, "fluctuation": [], "routable_fluctuation": []})
            run = run.model_copy(update={"routing": routing})
        runs.append(run)
    write_report(results.model_copy(update={"runs": runs}), tmp_path)
    assert (tmp_path / "entropy.png").exists()
    assert not (tmp_path / "fluctuation.png").exists()


def test_grid_of_many_values(tmp_path):
    """The grid's variant is the one that the suite names, although other names begin in the same way."""
    results = synthetic_results()
    base, point = results.variant("maskmoe"), results.of_role("grid")[0]
    own = base.model_copy(update={"name": "maskmoe.wide", "title": "Wide"})
    runs = [run.model_copy(update={"variant": own.name}) for run in results.runs_of(base.name)]
    variants = [*results.of_role("main"), own]
    for number in range(3, 12):
        mask = base.mask | {"frequent-mass": ("0.995",), "frequent-visible-experts": (str(number),)}
        variants.append(point.model_copy(update={"name": f"maskmoe.wide.p0.995-v{number}", "mask": mask}))
        runs.append(results.runs_of(point.name)[0].model_copy(update={"variant": variants[-1].name}))
    update = {"variants": variants, "runs": [*results.runs, *runs], "grid_of": "maskmoe.wide", "curves": []}
    results = results.model_copy(update=update)
    assert results.grid_base == own
    report = write_report(results, tmp_path).read_text()
    assert "## P and V_f\n\nWide." in report
    assert "99.5 %" in report


@pytest.fixture
def figures(monkeypatch):
    """Return a list that gets all figures that are drawn."""
    figures = []

    def remember(width, height):
        figures.append(new_figure(width, height))
        return figures[-1]

    new_figure = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", remember)
    return figures


@pytest.mark.filterwarnings("error")
def test_fluctuation_of_layers_without_a_choice(figures, tmp_path):
    """Plot and table have the mean over the layers in which tokens have a choice, as in models with hash layers."""
    results = synthetic_results()
    runs = []
    for run in results.runs:
        if run.variant == "smoe":
            rows = [[None, *row[1:]] for row in run.routing.routable_fluctuation]
            run = run.model_copy(update={"routing": run.routing.model_copy(update={"routable_fluctuation": rows})})
        runs.append(run)
    results = results.model_copy(update={"runs": runs})
    plots.draw_plots(results, tmp_path)
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    (right,) = [figure.axes[1] for figure, of_axes in zip(figures, titles, strict=True) if "all tokens" in of_axes]
    lines = {line.get_label(): line.get_ydata() for line in right.lines}
    rows = np.array([run.routing.routable_fluctuation for run in results.runs_of("smoe")], dtype=float)
    assert lines["Smoe"] == pytest.approx(100 * rows[:, :, 1:].mean(axis=(0, 2)))  # [runs, checkpoints, layers]
    for row in summarize_routers(results):
        assert lines[row.title][[0, -1]] == pytest.approx([100 * row.first_change, 100 * row.last_change])


def test_legends_fit_into_their_figures(figures, tmp_path):
    """Many variants with long titles make a figure higher, and their names stay whole."""
    results = synthetic_results()
    variants, runs = list(results.variants), list(results.runs)
    for number in range(16):
        title = f"MaskMoE, visible sets widen after {number} iterations"
        variants.append(results.variant("maskmoe").model_copy(update={"name": f"more{number}", "title": title}))
        runs += [run.model_copy(update={"variant": f"more{number}"}) for run in results.runs_of("maskmoe")]
    plots.draw_plots(results.model_copy(update={"variants": variants, "runs": runs}), tmp_path)
    legends = [(figure, legend) for figure in figures for legend in figure.legends]
    assert len(legends) >= 6
    for figure, legend in legends:
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert box.height < 0.6 * figure.bbox.height


def test_report_without_runs_is_written(tmp_path):
    results = synthetic_results().model_copy(update={"runs": [], "variants": [], "learning_rates": ["1e-3", "1e-2"]})
    text = write_report(results, tmp_path).read_text()
    assert "## Learning rates" not in text
    assert not list(tmp_path.glob("*.png"))


def test_report_names_the_rates_that_no_trial_had():
    results = synthetic_results()
    scaled = {"learning_rate": "0.016", "rate_factor": 4}
    variants = [
        variant.model_copy(update=scaled) if variant.name == "smoe.size-50" else variant for variant in results.variants
    ]
    text = render_report(results.model_copy(update={"variants": variants}), {})
    assert "Variants whose rate is a multiple of their method's rate:\n\n- smoe.size-50: 0.016\n" in text


def test_behaviour_of_the_routers_is_summarized():
    rows = {row.title: row for row in summarize_routers(synthetic_results())}
    assert set(rows) == {"Smoe", "Maskmoe"}
    runs = synthetic_results().runs_of("smoe")
    assert rows["Smoe"].first_weight == pytest.approx(np.mean([run.routing.first_weight[0] for run in runs]))
    assert rows["Smoe"].last_change == pytest.approx(np.mean([run.routing.routable_fluctuation[-1] for run in runs]))
    assert rows["Smoe"].experts["top 40 %"] == 1.75
    assert rows["Smoe"].id_information == 1.0


def test_effects_below_the_noise_are_not_resolved():
    text = render_report(synthetic_results(noise=0.3), {})
    assert "Not resolved" in text


def test_one_seed_is_no_verdict():
    results = synthetic_results()
    of_first_seed = [run for run in results.runs if run.seed == results.runs[0].seed]
    of_one_seed = results.model_copy(update={"runs": of_first_seed})
    text = render_report(of_one_seed, {})
    assert not re.search("^(Better|Worse|Not resolved): ", text, re.MULTILINE)
    assert "±" not in text.partition("## Difference")[2]


def test_unfinished_runs_are_named():
    results = synthetic_results()
    some = Results(**{**results.__dict__, "unfinished": {"smoe": [9], "dense": [2, 3]}})
    text = render_report(some, {})
    assert "3 runs are missing" in text
    assert text.endswith("## Unfinished runs\n\n- smoe: seed 9\n- dense: seeds 2, 3\n")
    one = Results(**{**results.__dict__, "unfinished": {"smoe": [9]}})
    assert "\n\n**Unfinished**: 1 run is missing" in render_report(one, {})


CHECK = """\
launch: a line of another program
{
  "can_start": true,
  "errors": [],
  "missing": [
    {
      "what": "mask"
    }
  ],
  "layers": {"stages": [[2]]},
  "parameters": {
    "total": 1640000,
    "active": 476064
  }
}
"""


def test_parameters_are_read_from_a_check():
    assert Parameters.from_check(CHECK.splitlines()) == Parameters(total=1_640_000, active=476_064)
    repeated = CHECK.replace("476064", "1") + CHECK
    assert Parameters.from_check(repeated.splitlines()) == Parameters(total=1_640_000, active=476_064)
    refused = ["{", '  "errors": ["no"],', '  "parameters": null', "}", "error: no"]
    assert Parameters.from_check(refused) is None
    assert Parameters.from_check(["error: no"]) is None


def test_unequal_models_are_refused():
    check_active_parameters({})
    check_active_parameters({"dense": Parameters(total=100, active=100), "smoe": Parameters(total=800, active=102)})
    with pytest.raises(UserError, match="variant big has 120 active parameters and dense 100"):
        check_active_parameters({"dense": Parameters(total=100, active=100), "big": Parameters(total=120, active=120)})
