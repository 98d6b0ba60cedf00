"""Tables of an analysis can be read back, plots show the right numbers, and a plot with nothing to show is left out."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from maskmoe.analysis.routing_analysis import RoutingAnalysis
from maskmoe.analysis.routing_report import PLOT_NAMES, write_csv, write_plots
from maskmoe.routing_mask.frequency import FrequencyBands


def test_pieces_with_line_ends_are_quoted(tmp_path):
    pieces = ["\r", "\n", "a\r\nb", ",", '"', " "]
    write_csv(tmp_path / "pieces.csv", ["piece"], [[piece] for piece in pieces])
    with open(tmp_path / "pieces.csv", newline="", encoding="utf-8") as stream:
        assert stream.readline() == "piece\r\n"
        assert [piece for (piece,) in csv.reader(stream)] == pieces


@pytest.mark.parametrize(("num_models", "layers", "num_experts"), [(1, (2,), 4), (2, (1, 3), 8), (5, range(30), 64)])
def test_plots(tmp_path, monkeypatch, num_models, layers, num_experts):
    random = np.random.default_rng(0)
    statistics = [
        SimpleNamespace(
            load=random.poisson(5, (len(layers), 3, num_experts)),
            explained=random.uniform(0, 1, (2, 2, len(layers))),
            changed=random.uniform(0, 1, (5, len(layers))) if model else None,
        )
        for model in range(num_models)
    ]
    models = [SimpleNamespace(name="same name")] * num_models
    bands = FrequencyBands(np.ones(9))
    analysis = RoutingAnalysis(models, statistics, tuple(layers), np.ones(9, int), bands, np.arange(9), {})
    (tmp_path / "fluctuation.png").write_text("of an earlier analysis")
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **options: (figures.append(figure), save(figure, *args, **options))
    )
    paths = write_plots(analysis, tmp_path)
    assert [path.name for path in paths] == list(PLOT_NAMES[: 4 if num_models > 1 else 3])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    load = statistics[-1].load
    (of_all,) = figures[0].axes[0].images
    np.testing.assert_allclose(of_all.get_array(), load.sum(axis=1) / load.sum(axis=1).mean(axis=1, keepdims=True))
    shares = [axes.images[0].get_array() for axes in figures[1].axes[:3]]
    np.testing.assert_allclose(np.sum(shares, axis=0), np.ones((len(layers), num_experts)))
    np.testing.assert_allclose(shares[0], load[:, 0] / load.sum(axis=1))
    explained = [line.get_ydata() for line in figures[2].axes[0].lines]
    assert np.array_equal(explained, statistics[-1].explained.reshape(4, -1))
    if num_models > 1:
        lines = figures[3].axes[0].lines
        assert np.array_equal([line.get_ydata() for line in lines], np.stack([s.changed[1] for s in statistics[1:]]).T)


def test_plot_of_the_explained_routing_has_no_line_twice(tmp_path, monkeypatch):
    """With k = 1 the best expert is the only one, and in a hash layer no token has a choice."""
    of_first = np.array([[0.9, 0.5], [np.nan, np.nan]])
    statistics = SimpleNamespace(load=np.ones((2, 3, 4)), explained=np.stack([of_first, of_first]), changed=None)
    models = [SimpleNamespace(name="name")]
    analysis = RoutingAnalysis(
        models, [statistics], (1, 2), np.ones(9, int), FrequencyBands(np.ones(9)), np.arange(9), {}
    )
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    write_plots(analysis, tmp_path)
    (line,) = figures[2].axes[0].lines
    assert line.get_label() == "best expert, all tokens"
