"""The launcher's options, and the command line that it builds from them."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments
from support.paths import ROOT

from maskmoe.arguments.flags import split_flags
from maskmoe.errors import UserError
from maskmoe.launch.command import (
    RUN_ENVIRONMENT,
    Command,
    entry_point,
    run_flags,
    split_program,
    standalone_command,
    torchrun_command,
)
from maskmoe.launch.machine import Route
from maskmoe.launch.model_file import ModelFile
from maskmoe.launch.options import NodeRange, Options, _parser, parse_options
from maskmoe.training.help_page import help_page


def parse(arguments: str, environment: dict[str, str] | None = None) -> Options:
    return parse_options("maskmoe pretrain", shlex.split(arguments), environment or {})


def build_command(arguments: str, environment: dict[str, str] | None = None, route: Route | None = None) -> Command:
    """Return the command for 8 ranks on each node, and for a model file without flags."""
    options = parse(arguments, environment)
    return torchrun_command(options, options.meeting, run_flags(options, {}, split_flags(options.flags)), 8, route, {})


@pytest.mark.parametrize("inherited", [{}, {"MASTER_ADDR": "head", "MASTER_PORT": "0", "NODE_RANK": "3"}])
def test_one_node_needs_no_rendezvous(inherited):
    line = str(build_command("--run-dir /run model.yaml", inherited))
    assert "--nnodes 1 --nproc-per-node 8 --standalone --local-addr 127.0.0.1 --max-restarts 3" in line
    assert line.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 ")
    assert "SOCKET_IFNAME" not in line
    given = [("--rendezvous head:1 m.yaml", inherited), ("m.yaml", inherited | {"RDZV_ENDPOINT": "head:1"})]
    assert [parse(*each).rendezvous for each in given] == [("head", 1)] * 2


def test_flags_and_environment_give_the_same_command_for_many_nodes():
    by_flags = (
        "--nodes 4 --node-rank 2 --rendezvous head:1234 --rendezvous-id job --max-restarts 1 --run-dir /run m.yaml"
    )
    by_environment = {
        "NNODES": "4",
        "NODE_RANK": "2",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "1234",
        "RDZV_ID": "job",
        "MAX_RESTARTS": "1",
        "RUN_DIR": "/run",
    }
    route = Route("10.0.0.3", "eth1")
    line = str(build_command(by_flags, route=route))
    assert line == str(build_command("m.yaml", by_environment, route))
    assert line == str(build_command(by_flags, by_environment | {"NNODES": "9", "RDZV_ENDPOINT": "other:1"}, route))
    assert "GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME==eth1 " in line
    assert (
        "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint head:1234 --rdzv-id job "
        "--rdzv-conf is_host=false,join_timeout=600 --local-addr 10.0.0.3 --max-restarts 1 "
    ) in line
    assert "--log-dir /run/logs/node2 " in line
    assert "is_host=true" in str(build_command(by_flags.replace("--node-rank 2", "--node-rank 0")))


def test_elastic_run_ignores_the_rendezvous_of_the_environment():
    options = parse("--nodes 1:4 m.yaml", {"MASTER_ADDR": "head", "NODE_RANK": "7", "NODE_ADDRESS": "me"})
    assert (options.nodes.least, options.nodes.most, options.nodes.is_elastic) == (1, 4, True)
    assert (options.rendezvous, options.node_rank, options.address) == (None, None, "me")
    assert parse("m.yaml").nodes == NodeRange(1, 1)


@pytest.mark.parametrize("options", ["--nodes 8", "--nodes 8 --node-rank 9", "--nodes 1:8"])
def test_check_of_a_run_on_several_nodes_needs_no_rendezvous(options):
    assert parse(f"--check {options} m.yaml").nodes.most == 8


def test_users_variables_are_kept():
    options = parse("m.yaml")
    variables = {**RUN_ENVIRONMENT, "OMP_NUM_THREADS": "7"}
    command = torchrun_command(options, options.meeting, {}, 1, None, variables)
    assert set(command.environment) == {"MASKMOE_RUN_DIR"}


def test_default_folders_lie_in_the_run_folder():
    assert "--save /run/checkpoints --load /run/checkpoints --tensorboard-dir /run/tensorboard" in str(
        build_command("--run-dir /run m.yaml")
    )
    moved = str(build_command("--run-dir /run m.yaml --save /elsewhere --tensorboard-dir false"))
    assert moved.endswith(" --save /elsewhere --load /elsewhere")
    unsaved = str(build_command("--run-dir /run m.yaml --save false"))
    assert "--save" not in unsaved
    assert "--load" not in unsaved
    assert " --load /other" in str(build_command("--run-dir /run m.yaml --save false --load /other"))
    assert parse("launch/models/laptop.yaml").run_dir == Path.cwd() / "runs" / "laptop"


@pytest.mark.parametrize("pattern", ["*E*E", "*E*E|*-*E/*E/*E", "-*E|+-GE", "--*E"])
@pytest.mark.parametrize("given_by", ["file", "flag"])
def test_layer_pattern_of_a_hybrid_model_reaches_the_ranks(tmp_path, pattern, given_by):
    """Argparse takes a value that begins with `-` for a flag, unless an equals sign joins flag and value."""
    flag, path = "--hybrid-layer-pattern", tmp_path / "model.yaml"
    path.write_text(f'hybrid-layer-pattern: "{pattern if given_by == "file" else "MMM"}"')
    words = [f"{flag}={pattern}"] if given_by == "flag" else []
    options = parse_options("maskmoe pretrain", [str(path), *words], {})
    flags = run_flags(options, ModelFile.read(path, {}).flags, split_flags(options.flags))
    line = str(torchrun_command(options, options.meeting, flags, 1, None, {}))
    expected = [f"{flag}={pattern}"] if pattern.startswith("-") else [flag, pattern]
    assert f" {shlex.join(expected)}" in line
    assert line.count(flag) == 1


def test_script_passes_its_words_on():
    """A shell would replace an unquoted `*` by the names of files."""
    command = [ROOT / "launch" / "pretrain.sh", "--dry-run", "launch/models/laptop.yaml", "--hybrid-layer-pattern", "*"]
    line = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert " --hybrid-layer-pattern '*'" in line


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        ("--nodes 0 m.yaml", {}, "--nodes must be at least 1, not 0 .*"),
        ("m.yaml", {"NNODES": "two"}, "--nodes must be a whole number, not 'two'"),
        ("--nodes 2 m.yaml", {}, "2 nodes need a rendezvous"),
        ("--nodes 2 --rendezvous a m.yaml", {}, "each of 2 nodes needs a rank"),
        ("--nodes 2 --rendezvous a --node-rank 2 m.yaml", {}, "--node-rank 2: the last of 2 nodes has rank 1"),
        ("--nodes 3:2 m.yaml", {}, "--nodes must be N, or MIN:MAX with MIN up to MAX, not '3:2'"),
        ("--nodes 0:2 m.yaml", {}, "--nodes must be at least 1, not 0"),
        ("--nodes 1: m.yaml", {}, "--nodes must be a whole number, not ''"),
        ("--nodes 1:2 --node-timeout 3 m.yaml", {}, "--node-timeout must be at least 10, not 3"),
        ("--rendezvous a:b m.yaml", {}, "'a:b' is not HOST:PORT"),
        ("--rendezvous a..b:1 m.yaml", {}, r"--rendezvous: 'a\.\.b' is not the name of a host"),
        ("--nodes 1:2 m.yaml", {"NODE_ADDRESS": "a" * 64}, "--address: 'a*' is not the name of a host"),
        ("--nodes 1:2 --dry-run m.yaml", {}, "--dry-run prints one command line, but --nodes MIN:MAX"),
        ("--nonsense m.yaml", {}, r"--nonsense.*\(see maskmoe pretrain --help\)"),
    ],
)
def test_bad_options_are_refused(arguments, environment, reason):
    with pytest.raises(UserError, match=reason):
        parse(arguments, environment)


@pytest.mark.parametrize("word", ["--run-dir", "--nodes=2", "--check"])
def test_option_after_the_model_file_is_named(word):
    flag = word.partition("=")[0]
    with pytest.raises(UserError, match=f"^{flag} is an option of maskmoe pretrain: write it before model.yaml$"):
        parse(f"model.yaml --lr 1e-3 {word} 2")


def test_no_option_of_the_launcher_is_a_flag_of_training():
    flags = set(re.findall(r"--[\w-]+", help_page("pretrain")))
    flags |= add_megatron_arguments(argparse.ArgumentParser())._option_string_actions.keys()
    for name in _parser("launch/pretrain.sh", {}).option_names() & flags - {"--check"}:
        parse(f"model.yaml {name}")


def test_program_without_a_name_is_refused():
    with pytest.raises(UserError, match="`program` must name one Python file, not none"):
        split_program({"program": ()})


def test_command_for_one_machine_ends_with_the_module_and_its_arguments():
    options = "--standalone --nproc-per-node 2 --shutdown-timeout 9"
    for program, entry in (("", "-m maskmoe.training.evaluate"), ("other.py", "other.py evaluate")):
        words = standalone_command(2, entry_point("evaluate", program), ("--load", "run"), ("--shutdown-timeout", "9"))
        assert " ".join(words[1:]) == f"-m maskmoe.launch.ranks {options} {entry} --load run"
