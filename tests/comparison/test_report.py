"""The page of a comparison: its tables and its figure."""

import pytest
from PIL import Image
from support.suites import result

from maskmoe.comparison.report import write_report
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
    with Image.open(tmp_path / "report" / "losses.png") as image:
        assert image.width >= 1000


def test_a_page_of_the_user_stays(suite, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("precious")
    with pytest.raises(UserError, match=r"README\.md was not written by maskmoe compare"):
        write_report(suite, "small", [result("smoe", 1, 3.5)], tmp_path)
    assert page.read_text() == "precious"
    page.unlink()
    for loss in (3.5, 3.6):
        write_report(suite, "small", [result("smoe", 1, loss)], tmp_path)
    assert "3.6000" in page.read_text()
    with pytest.raises(UserError, match="no run of the suite small is finished"):
        write_report(suite, "small", [], tmp_path)


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
