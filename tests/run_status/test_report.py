"""The page of a run has what the run has logged, and loads nothing from elsewhere."""

import base64
import math

from matplotlib.axes import Axes
from support.report_pages import Page
from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

from maskmoe.run_status.report import draw_plot, write_page
from maskmoe.run_status.status import read_status


def test_page_has_all_parts(run, tmp_path):
    path = tmp_path / "status.html"
    write_page(read_status(run), path)
    page = Page(path)
    page.assert_self_contained()
    assert page.titles == [
        "Loss in nats per token",
        "Load of the busiest expert by layer, from dark to bright",
    ]
    words = " ".join(page.text.split())
    for part in ("20 of 40", "0.2500", "0.3000 at iteration 20", "2,048 tokens/s", "node b was lost", "is a spike"):
        assert part in words, part
    checkpoints, settings, arguments = page.tables
    assert [row[0] for row in checkpoints] == ["checkpoint", "iter_0000020", "iter_0000010"]
    assert settings == [["command", 'pretrain --lr "1e-3" <b>']]
    assert dict(arguments)["seq_length"] == "32"
    assert "b" not in page.tags
    assert not {"http://", "https://"} & set(path.read_text().split('"'))


def svg_of(image):
    return base64.b64decode(image.partition("base64,")[2]).decode()


def test_plot_has_its_scalars_by_name():
    curves = {f"tag {number}": [ScalarEvent(0.0, 1, 1.0), ScalarEvent(0.0, 2, 2.0)] for number in range(3)}
    svg = svg_of(draw_plot(curves))
    assert all(f">{tag}<" in svg for tag in (*curves, "iteration"))
    many = {str(number): curves["tag 0"] for number in range(1000, 1064)}  # the layers of a deep model
    assert ">1000<" not in svg_of(draw_plot(many))


def test_the_newest_of_many_values_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axes, steps, heights, **options: drawn.append(steps))
    for number in (1000, 1001, 2500):
        draw_plot({"lm loss": [ScalarEvent(0.0, step, 1.0) for step in range(number)]})
        assert (len(drawn[-1]), drawn[-1][-1]) == (1000, number - 1)


def test_any_values_are_drawn():
    for values in ([1.0], [math.nan], [1.0, math.inf, -3e38, 3e38], []):
        draw_plot({"lm loss": [ScalarEvent(0.0, step, value) for step, value in enumerate(values)]})
