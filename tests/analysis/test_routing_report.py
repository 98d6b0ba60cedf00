"""A plot with nothing to show is left out."""

from types import SimpleNamespace

import numpy as np
import pytest

from maskmoe.analysis.routing_analysis import RoutingAnalysis
from maskmoe.analysis.routing_report import PLOT_NAMES, write_plots
from maskmoe.routing_mask.frequency import FrequencyBands


@pytest.mark.parametrize("num_models", [1, 5])
def test_plots(tmp_path, num_models):
    random = np.random.default_rng(0)
    statistics = [
        SimpleNamespace(
            load=random.poisson(5, (30, 3, 64)),
            explained=random.uniform(0, 1, (2, 2, 30)),
            changed=random.uniform(0, 1, (5, 30)) if model else None,
        )
        for model in range(num_models)
    ]
    models = [SimpleNamespace(name="same name")] * num_models
    bands = FrequencyBands(np.ones(9))
    analysis = RoutingAnalysis(models, statistics, tuple(range(30)), np.ones(9, int), bands, np.arange(9), {})
    (tmp_path / "fluctuation.png").write_text("of an earlier analysis")
    paths = write_plots(analysis, tmp_path)
    assert [path.name for path in paths] == list(PLOT_NAMES[: 3 if num_models > 1 else 2])
    assert {*tmp_path.iterdir()} == {*paths}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
