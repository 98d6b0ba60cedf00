"""Each plot of an analysis shows something for the models, layers and experts that there are, or is left out."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from maskmoe.analysis.routing.analysis import Analysis
from maskmoe.analysis.routing.models import ModelShape
from maskmoe.analysis.routing.plots import PLOT_NAMES, write_plots
from maskmoe.analysis.routing.settings import AnalysisSettings
from maskmoe.routing_mask.frequency import FrequencyBands

VOCAB_SIZE = 50


def make_analysis(models: int, layers: list[int], experts: int, min_occurrences: int = 8, **replaced) -> Analysis:
    """Return an analysis with random statistics, some of which can be replaced."""
    random, sizes = np.random.default_rng(0), (models, len(layers))
    occurrences = 400 // np.arange(1, VOCAB_SIZE + 1)
    ids = np.repeat(np.arange(VOCAB_SIZE), occurrences)
    bands = FrequencyBands(occurrences.astype(float))
    counted = int((occurrences >= min_occurrences).sum())
    statistics = {
        "load": random.poisson(50, (*sizes, len(bands.names), experts)).astype(float),
        "entropy": random.uniform(0.5, 1.2, sizes),
        "entropy_bound": np.full(sizes, 1.386),
        "changed": random.uniform(0, 0.3, (models, 2, len(layers))),
        "transitions": random.gamma(0.3, 1, (models, len(layers) - 1, experts, experts)),
        "next_layer_information": random.uniform(0, 1, (models, len(layers) - 1)),
        "distinct": random.uniform(1, 3, (*sizes, counted)),
        "effective": random.uniform(0.8, 1, (*sizes, counted)),
    }
    series = [SimpleNamespace(name=f"iteration {number}00", iteration=100 * number) for number in range(models)]
    shape = ModelShape(VOCAB_SIZE, experts, 2, tuple(layers))
    settings = AnalysisSettings(min_occurrences=min_occurrences)
    return Analysis(series, shape, SimpleNamespace(token_ids=ids), bands, settings, 100, statistics | replaced)


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the plots of an analysis, and return the figures by file name, and the reasons of the plots left out."""

    def draw(analysis: Analysis) -> tuple[dict[str, Figure], dict[str, str]]:
        figures = []
        save = Figure.savefig
        monkeypatch.setattr(
            Figure, "savefig", lambda figure, *args, **o: (figures.append(figure), save(figure, *args, **o))
        )
        paths, reasons = write_plots(analysis, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
        assert [*sorted([*reasons, *(path.name for path in paths)])] == sorted(PLOT_NAMES)
        return dict(zip((path.name for path in paths), figures, strict=True)), reasons

    return draw


def data_of(figure: Figure) -> list:
    """Return the lines with two or more points, the bars and the images of a figure."""
    lines = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) > 1]
    return [*lines, *(part for axes in figure.axes for part in (*axes.patches, *axes.images))]


@pytest.mark.parametrize(("models", "layers", "experts"), [(1, 1, 4), (1, 4, 8), (1, 30, 64), (2, 3, 8), (5, 30, 8)])
def test_drawn_plots_have_data(draw, models, layers, experts):
    figures, reasons = draw(make_analysis(models, list(range(4, 4 + layers)), experts))
    assert all(data_of(figure) for figure in figures.values())
    few_models = {"fluctuation.png": "changes need two models"} if models == 1 else {}
    few_layers = {"coactivation.png": "only one layer has experts"} if layers == 1 else {}
    assert reasons == few_models | few_layers


def test_entropy_of_one_model_has_a_bar_and_a_bound_for_each_layer(draw):
    analysis = make_analysis(1, [2, 4, 6], 8)
    (axes,) = draw(analysis)[0]["entropy.png"].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(analysis.statistics["entropy"][0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "4", "6"]
    (bounds,) = axes.collections
    assert len(bounds.get_segments()) == 3


def test_bars_stand_around_the_ticks_of_their_layers(draw):
    """The ids of the last band occur too rarely, so it has no bars."""
    analysis = make_analysis(1, [1, 2, 3], 8, min_occurrences=20)
    assert len(set(analysis.counted_ids()[2])) < len(analysis.bands.names)
    (axes,) = draw(analysis)[0]["distinct_experts.png"].axes
    centres = np.array([bar.get_x() + bar.get_width() / 2 for bar in axes.patches])
    for tick in axes.get_xticks():
        assert centres[np.abs(centres - tick) < 0.5].mean() == pytest.approx(tick)


def test_coactivation_uses_the_whole_range_of_colours(draw):
    """Shares of 256 experts are below 0.1."""
    figure = draw(make_analysis(1, [1, 2], 256))[0]["coactivation.png"]
    (image,) = figure.axes[0].images
    colours = image.norm(image.get_array())
    assert np.quantile(colours, 0.999) > 0.9
    assert np.median(colours) < 0.5


def test_plot_without_values_is_left_out_and_an_old_file_is_removed(draw, tmp_path):
    (tmp_path / "entropy.png").write_bytes(b"of an earlier analysis")
    nothing = np.full((2, 2), np.nan)
    replaced = {"entropy": nothing, "entropy_bound": nothing, "changed": np.full((2, 2, 2), np.nan)}
    _, reasons = draw(make_analysis(2, [1, 2], 4, min_occurrences=1000, **replaced))
    assert reasons == {
        "entropy.png": "no token of the probe sees more than one expert",
        "fluctuation.png": "no token of the probe sees more than one expert",
        "distinct_experts.png": "no id occurs 1000 times in the probe",
    }
