"""The page of a comparison: its tables and its figure."""

import pytest
from PIL import Image
from support.suites import result

from maskmoe.comparison.report import is_report, write_report
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError


@pytest.fixture
def suite(suite_file):
    return Suite.read(suite_file(replace={"seeds: [1, 2]": "seeds: [1, 2, 3]"}), {})


def test_page_has_the_tables(suite, tmp_path):
    results = [
        *(result("smoe", seed, loss) for seed, loss in ((1, 3.5), (2, 3.6), (3, 3.7))),
        *(result("maskmoe", seed, loss) for seed, loss in ((1, 3.4), (2, 3.5), (3, 3.6))),
    ]
    path = write_report(suite, "small", results, tmp_path / "report")
    page = path.read_text()
    for line in (
        "# A small suite",
        "6 of 13 runs of the suite `small` are finished (commits 0123456789ab).",
        "### Text: held-out, 1,000 tokens",
        # 4.3027 · 0.1 / √3 = 0.2484
        "| smoe    |    3 | 3.6000 ± 0.2484 | 2.6000 ± 0.2484 |",
        "| seed |   smoe | maskmoe |",
        "|    2 | 3.6000 |  3.5000 |",
    ):
        assert line.replace("|    2 |", "| 2    |") in page
    (difference,) = [line for line in page.splitlines() if line.startswith("| maskmoe − smoe")]
    assert "| −0.1000 ± 0.0000 |" in difference
    assert difference.endswith("| 0.250 |")  # 2 of 8 sign flips


def test_titles_cannot_break_a_page(suite_file, tmp_path):
    title = {"{mask: {preset: smoe}}": '{title: "k | <b>\\n", mask: {preset: smoe}}', "A small suite": "<script>"}
    page = write_report(
        Suite.read(suite_file(replace=title), {}), "small", [result("smoe", 1, 3.5)], tmp_path
    ).read_text()
    assert "| k \\| &lt;b&gt; |" in page
    assert page.startswith("# &lt;script&gt;\n")
    assert is_report(tmp_path)


def test_nothing_is_reported_of_no_runs(suite, tmp_path):
    with pytest.raises(UserError, match="no run of the suite small is finished"):
        write_report(suite, "small", [], tmp_path / "report")
    assert not (tmp_path / "report").exists()
    assert not is_report(tmp_path)


@pytest.mark.parametrize("commits", [("",), ("", "0123456789abcdef")])
def test_unfinished_suites_have_a_page_too(suite, tmp_path, commits):
    results = [result("smoe", 1, 3.5).model_copy(update={"origin": {"commit": commit}}) for commit in commits]
    page = write_report(suite, "small", results, tmp_path).read_text()
    of_checkout = " (commits 0123456789ab)" if any(commits) else ""
    assert f"{len(commits)} of 13 runs of the suite `small` are finished{of_checkout}. " in page
    with Image.open(tmp_path / "losses.png") as image:
        assert image.width >= 1000


def test_settings_of_vary_are_compared_apart(suite_file, tmp_path):
    suite = Suite.read(suite_file(replace={"data:": "vary: {lr: [1e-2, 2e-2]}\ndata:"}), {})
    results = [
        result(f"{name}.lr-{rate}", 1, loss)
        for name, rate, loss in (("smoe", "1e-2", 3.5), ("smoe", "2e-2", 3.4), ("maskmoe", "2e-2", 3.3))
    ]
    page = write_report(suite, "small", results, tmp_path).read_text()
    first, second = page.partition("## lr-1e-2")[2].split("## lr-2e-2")
    assert "maskmoe" not in first
    assert "| maskmoe − smoe |" in second
