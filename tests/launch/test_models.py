"""Model files: how they are read, and what `--check` finds in the files of `launch/models/`."""

import contextlib
import io
import logging
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.launchers import run_as_ranks
from support.paths import ROOT

from maskmoe.arguments.flags import flag_words, override, split_flags
from maskmoe.command_line.build_routing_mask import parse_arguments
from maskmoe.errors import UserError
from maskmoe.launch import launcher
from maskmoe.launch.model_file import ModelFile
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.training.preflight.inspection import check_run, report_on

MODELS = sorted((ROOT / "launch" / "models").glob("*.yaml"))
QUICK = ("laptop", "12l-768d-dense")
MODEL_CASES = [
    pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in MODELS
]
HEADER = re.compile(r"^# parameters: ([0-9,]+) in all, ([0-9,]+) active \(vocabulary of ([0-9,]+)\)$", re.MULTILINE)
# Published numbers of parameters: of the dense model, then all and active ones of the models with experts.
SIZES = {"12l-768d": (162e6, 842e6, 247e6), "24l-1024d": (468e6, 2.88e9, 770e6)}
RANKS = [8 << power for power in range(8)]
MOST_RANKS = {"fine-grained-1.5b-one-node": 64}
"""The largest layout of a model whose batch cannot be divided among all `RANKS`."""
GPU_BYTES = 80 << 30
# The check does not count the CUDA context, buffers of NCCL and cuBLAS, and fragmentation; this is their share.
SPARE_BYTES = 8 << 30


def read(path: Path) -> ModelFile:
    return ModelFile.read(path, {})


def header(path: Path) -> tuple[int, int, int]:
    """Return the parameters, the active parameters and the vocabulary size that a file's header names."""
    return tuple(int(number.replace(",", "")) for number in HEADER.search(path.read_text()).groups())


class Collector(logging.Handler):
    """Collects the messages that are logged as warnings or errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def answer(ranks: int) -> dict[str, Any]:
    """Check the command line of this process, and collect the findings and all warnings, Megatron's included."""
    collector = Collector()
    logging.getLogger().addHandler(collector)
    with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # Megatron's code causes them for any settings
        errors = []
        checks = check_run(ranks, errors)
        report = report_on(checks, errors)
    logging.getLogger().removeHandler(collector)
    messages = [*collector.messages, *(str(warning.message) for warning in caught)]
    messages += [line for line in printed.getvalue().splitlines() if "warn" in line.lower()]
    findings = {"errors": report.errors, "notes": report.notes, "warnings": messages}
    if report.layout is None or report.model is None or report.memory is None:
        return findings
    return findings | {
        "parameters": report.model.whole.num_parameters,
        "active": report.model.active(report.model.topk),
        "memory": [stage.total for stage in report.memory.stages],
    }


def answer_cases(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the answer for each case: a number of ranks, and the flags that are checked for them."""
    answers = {}
    for name, case in cases.items():
        sys.argv[1:] = case["flags"]
        answers[name] = answer(case["ranks"])
    return answers


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Check named cases in one process, each a file and a number of ranks, and return the answers."""
    folder = tmp_path_factory.mktemp("models")

    def flags_of(path: Path, ranks: int) -> list[str]:
        flags, vocabulary = read(path).flags_for(ranks), header(path)[2]
        words = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocabulary), "--mock-data"]
        if "num-experts" in flags:
            (num_experts,) = flags["num-experts"]
            mask = folder / f"mask_{num_experts}_{vocabulary}.safetensors"
            if not mask.exists():
                recipe = MaskRecipe.from_preset("smoe", int(num_experts), 1, shared_table=True)
                build_routing_mask(recipe, vocab_size=vocabulary).save(mask)
            words += ["--routing-mask", str(mask)]
        return [*flag_words(flags), "--split", "99,1,0", *words]

    def check(cases: dict[str, tuple[Path, int]]) -> dict:
        described = {name: {"ranks": case[1], "flags": flags_of(*case)} for name, case in cases.items()}
        (answers,) = run_as_ranks(answer_cases, folder, described, world_size=1, timeout=300, joins=False)
        return answers

    return check


@pytest.fixture(scope="module")
def answers(check):
    """Return a function that returns the answer for a model; quick models are checked apart from all others."""

    @cache
    def check_models(are_quick: bool) -> dict:
        paths = [path for path in MODELS if (path.stem in QUICK) == are_quick]
        return check({path.stem: (path, min(read(path).layouts, default=1)) for path in paths})

    return lambda name: check_models(name in QUICK)[name]


@pytest.fixture(scope="module")
def answers_for_layouts(check):
    cases = {f"{path.stem} on {ranks}": (path, ranks) for path in MODELS for ranks in layouts_to_check(path)}
    return check(cases)


def problems(answer: dict) -> list[str]:
    """Return the errors, notes and warnings about a model, except that nobody has tried its flags on GPUs."""
    notes = [note for note in answer["notes"] if not note.startswith("not tried with a routing mask on GPUs: ")]
    return [*answer["errors"], *notes, *answer["warnings"]]


def layouts_to_check(path: Path) -> list[int]:
    smallest = min(read(path).layouts, default=1)
    largest = MOST_RANKS.get(path.stem, RANKS[-1])
    return [ranks for ranks in RANKS if smallest <= ranks <= largest] if smallest >= 8 else []


@pytest.mark.parametrize("path", MODEL_CASES)
def test_model_loads_without_a_warning_and_matches_its_header(path, answers):
    answer = answers(path.stem)
    assert not problems(answer)
    assert (answer["parameters"], round(answer["active"])) == header(path)[:2]


@pytest.mark.parametrize(
    "path", [path for path in MODELS if "num-experts" in read(path).flags], ids=lambda path: path.stem
)
def test_command_in_the_header_builds_a_mask_for_the_model(path, monkeypatch):
    """The command is one of the installed program."""
    header = path.read_text().replace(" \\\n#", "")
    (words,) = (shlex.split(line[1:]) for line in header.splitlines() if line.startswith("#") and "--output" in line)
    assert words[:2] == ["maskmoe", "mask"]
    monkeypatch.setattr(sys, "argv", words[1:])
    arguments = parse_arguments()
    assert str(arguments.num_experts) == read(path).flags["num-experts"][0]


@pytest.mark.parametrize("size", SIZES)
def test_comparison_set_has_the_published_sizes(size):
    """All sizes match the published digits; another test compares the headers with the models."""
    dense, *sparse = SIZES[size]
    sizes = {"dense": [dense, dense], "smoe": sparse, "hash": sparse, "maskmoe": sparse}
    for kind, expected in sizes.items():
        assert header(ROOT / "launch" / "models" / f"{size}-{kind}.yaml")[:2] == pytest.approx(expected, rel=0.003)


@pytest.mark.slow
@pytest.mark.parametrize("case", [f"{path.stem} on {ranks}" for path in MODELS for ranks in layouts_to_check(path)])
def test_layout_divides_and_fits_into_memory(case, answers_for_layouts):
    answer = answers_for_layouts[case]
    assert not problems(answer)
    assert max(answer["memory"]) + SPARE_BYTES <= GPU_BYTES


# ---- How a model file is read ----------------------------------------------------------------------------------------


def read_text(folder: Path, text: str, **variables: str) -> ModelFile:
    (folder / "model.yaml").write_text(text)
    return ModelFile.read(folder / "model.yaml", variables)


def test_values_become_words_of_a_command_line(tmp_path):
    model = read_text(
        tmp_path,
        """
        num-layers: 012
        lr: 1e-4
        split: 90,10,0
        swiglu: true
        bf16: false
        seed: null
        save:
        recompute-modules: [moe, mlp]
        data-path: ${DATA}/corpus
        init: -0.5
        answer: yes
        """,
        DATA="/data",
    )
    assert flag_words(model.flags) == (
        *("--num-layers", "012", "--lr", "1e-4", "--split", "90,10,0", "--swiglu"),
        *("--recompute-modules", "moe", "mlp", "--data-path", "/data/corpus", "--init=-0.5", "--answer", "yes"),
    )


def test_flags_of_the_user_override_the_model_file(tmp_path):
    model = read_text(tmp_path, "lr: 1e-4\nbf16: true\nsplit: 90,10,0\nrecompute-modules: [moe, mlp]")
    flags = override(model.flags, split_flags(("--lr", "1", "--lr=2", "--bf16", "false", "--recompute-modules", "moe")))
    assert flag_words(flags) == ("--lr", "2", "--split", "90,10,0", "--recompute-modules", "moe")


written_flags = st.dictionaries(
    st.sampled_from("abc"), st.sampled_from(["true", "false", "null", "~", "", "1", ["2", "3"]]), min_size=1
)


@given(written_flags, written_flags)
def test_layout_acts_as_if_its_values_replaced_those_of_the_file(flags, layout):
    with tempfile.TemporaryDirectory() as folder:
        model = read_text(Path(folder), yaml.safe_dump({**flags, "layouts": {2: layout}}))
        merged = read_text(Path(folder), yaml.safe_dump({**flags, **layout}))
    assert model.flags_for(4) == merged.flags


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: *E*E", "write quotes around a value that begins with *"),
        ("- a\n- b", "must contain flags and their values"),
        ("", "must contain flags and their values"),
        ("a: 1\na: 2", "the key a is repeated"),
        ("a: [[1]]", "a must have a value or a list"),
        ("a: ${NOWHERE}", "a needs the environment variable NOWHERE"),
        ("layouts: 8", "`layouts` must map numbers of ranks to flags"),
        # YAML needs the question mark before a key of more than 1,024 characters.
        *((f"layouts: {{? {ranks} : {{}}}}", "is not a number of ranks") for ranks in ("9" * 5000, "0")),
        ("layouts: {8: 1}", "a layout must contain flags"),
    ],
)
def test_bad_model_file_is_refused(tmp_path, text, reason):
    with pytest.raises(UserError) as refusal:
        read_text(tmp_path, text)
    assert str(tmp_path / "model.yaml") in str(refusal.value)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_check_of_a_file_whose_layouts_do_not_fit_reports_the_smallest(tmp_path, monkeypatch, capsys):
    checked = []
    (tmp_path / "model.yaml").write_text("a: 1\nlayouts:\n  16: {}\n  32: {}")

    def check(words, **_):
        checked.append(words[words.index("--check") + 1])
        return Mock(returncode=2)

    monkeypatch.setattr(subprocess, "run", check)
    for options, error in (((), SystemExit), (("--nproc-per-node", "2"), UserError)):
        with pytest.raises(error):
            launcher.launch("maskmoe pretrain", ["--check", *options, str(tmp_path / "model.yaml")])
    assert checked == ["16"]
    assert capsys.readouterr().err.startswith("note: the report is for 16 ranks, the smallest layout of ")
