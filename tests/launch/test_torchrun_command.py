"""The launcher's options, the command line that it builds from them, and the flags of a rank."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments
from support.paths import ROOT

from maskmoe.arguments.flags import flag_words, split_flags
from maskmoe.errors import UserError
from maskmoe.launch import rank
from maskmoe.launch.machine import Route
from maskmoe.launch.options import Options, options_parser, parse_options
from maskmoe.launch.torchrun_command import RUN_ENVIRONMENT, Command, run_flags, split_program, torchrun_command
from maskmoe.training.help_page import help_page


def parse(arguments: str, environment: dict[str, str] | None = None) -> Options:
    return parse_options("maskmoe pretrain", shlex.split(arguments), environment or {})


def build_command(arguments: str, environment: dict[str, str] | None = None, route: Route | None = None) -> Command:
    """Return the command for 8 ranks on each node."""
    return torchrun_command(parse(arguments, environment), 8, route, {})


@pytest.mark.parametrize("inherited", [{}, {"NODE_RANK": "3", "RDZV_ENDPOINT": "head:1"}])
def test_one_node_needs_no_rendezvous(inherited):
    line = str(build_command("--run-dir /run model.yaml", inherited))
    assert "--nnodes 1 --nproc-per-node 8 --standalone --local-addr 127.0.0.1 --max-restarts 3" in line
    assert "--log-dir /run/logs/node0 " in line
    assert "SOCKET_IFNAME" not in line
    assert line.endswith(" -m maskmoe.launch.rank model.yaml")


def test_flags_and_environment_give_the_same_command_for_many_nodes():
    by_flags = (
        "--nodes 2:4 --node-rank 2 --rendezvous head:1234 --rendezvous-id job --max-restarts 1 --run-dir /run m.yaml"
    )
    by_environment = {
        "NNODES": "2:4",
        "NODE_RANK": "2",
        "RDZV_ENDPOINT": "head:1234",
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
        "--nnodes 2:4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint head:1234 --rdzv-id job "
        "--rdzv-conf is_host=false,join_timeout=600,read_timeout=600 --local-addr 10.0.0.3 --max-restarts 1 "
    ) in line
    assert "--log-dir /run/logs/node2 " in line
    assert "is_host=true" in str(build_command(by_flags.replace("--node-rank 2", "--node-rank 0")))


def test_check_of_a_run_on_several_nodes_needs_no_rendezvous():
    assert parse("--check --nodes 8 m.yaml").nodes.most == 8


def test_users_variables_are_kept():
    command = torchrun_command(parse("m.yaml"), 1, None, {**RUN_ENVIRONMENT, "OMP_NUM_THREADS": "7"})
    assert not command.environment.keys() & RUN_ENVIRONMENT.keys()


def test_default_folders_lie_in_the_run_folder():
    def flags(user: str) -> str:
        return " ".join(flag_words(run_flags(Path("/run"), {"lr": ("1",)}, split_flags(user.split()))))

    assert flags("") == "--save /run/checkpoints --load /run/checkpoints --tensorboard-dir /run/tensorboard --lr 1"
    assert flags("--save /elsewhere --tensorboard-dir false") == "--save /elsewhere --load /elsewhere --lr 1"
    assert flags("--save false --tensorboard-dir false") == "--lr 1"
    assert flags("--save false --load /other --lr 2") == "--load /other --tensorboard-dir /run/tensorboard --lr 2"
    assert parse("launch/models/laptop.yaml").run_dir == Path.cwd() / "runs" / "laptop"


MODEL = """
num-layers: 2
hybrid-layer-pattern: -*E
layouts:
  1: {}
  4: {tensor-model-parallel-size: 2}
  2: {expert-model-parallel-size: 2}
"""


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, ""),
        (2, "--expert-model-parallel-size 2"),
        (6, "--expert-model-parallel-size 2"),
        (4, "--tensor-model-parallel-size 2"),
    ],
)
def test_rank_takes_the_layout_of_the_number_of_ranks(tmp_path, monkeypatch, ranks, layout):
    """Torchrun starts the ranks again on the nodes that are there. A value with a dash stays joined to its flag."""
    started = []
    (tmp_path / "model.yaml").write_text(MODEL)
    monkeypatch.setattr(sys, "argv", ["rank.py", str(tmp_path / "model.yaml"), "--num-layers", "3", "--save", "false"])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("MASKMOE_RUN_DIR", "/run")
    monkeypatch.setattr(rank, "end_with_parent", lambda *_: None)
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    rank.main()
    flags = "--tensorboard-dir /run/tensorboard --num-layers 3 --hybrid-layer-pattern=-*E"
    assert " ".join(started[0][1:]) == f"-u -m maskmoe.training.pretrain {flags} {layout}".strip()


def test_number_of_nodes_without_a_layout_is_refused_before_the_start(tmp_path):
    (tmp_path / "model.yaml").write_text("layouts: {2: {}, 4: {}}")
    options = ["--dry-run", "--nodes", "1:2", "--node-rank", "0", "--rendezvous", "head", "--nproc-per-node", "1"]
    command = [sys.executable, "-m", "maskmoe", "pretrain", *options, tmp_path / "model.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "layouts for 2, 4 ranks and their multiples, not for 1" in result.stderr


def test_script_passes_its_words_on():
    """A shell would replace an unquoted `*` by the names of files."""
    command = [ROOT / "launch" / "pretrain.sh", "--dry-run", "launch/models/laptop.yaml", "--hybrid-layer-pattern", "*"]
    line = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert " --hybrid-layer-pattern '*'" in line


@pytest.mark.parametrize(
    ("arguments", "environment", "reason"),
    [
        ("--nodes 0 m.yaml", {}, "--nodes"),
        ("m.yaml", {"NNODES": "two"}, "--nodes"),
        ("--nodes 3:2 m.yaml", {}, "--nodes"),
        ("--nodes 1: m.yaml", {}, "--nodes"),
        ("--nodes 2 m.yaml", {}, "--rendezvous"),
        ("--nodes 2 --rendezvous a m.yaml", {}, "--node-rank"),
        ("--nodes 1:2 --rendezvous a --node-rank 2 m.yaml", {}, "--node-rank"),
        ("--rendezvous a:b m.yaml", {}, "--rendezvous"),
        ("--rendezvous a..b:1 m.yaml", {}, "--rendezvous"),
        ("--nonsense m.yaml", {}, "--nonsense"),
        ("m.yaml --lr 1e-3 --nodes=2", {}, "--nodes"),
    ],
)
def test_bad_options_are_refused(arguments, environment, reason):
    with pytest.raises(UserError, match=reason):
        parse(arguments, environment)


def test_no_option_of_the_launcher_is_a_flag_of_training():
    flags = set(re.findall(r"--[\w-]+", help_page("pretrain")))
    flags |= add_megatron_arguments(argparse.ArgumentParser())._option_string_actions.keys()
    shared = options_parser("maskmoe pretrain", {}).option_names() & flags
    assert shared <= {"--check", "--nproc-per-node", "--help", "-h"}


def test_program_without_a_name_is_refused():
    with pytest.raises(UserError, match="program"):
        split_program({"program": ()})
