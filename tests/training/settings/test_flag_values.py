"""Values of Megatron's flags that would train something else without a word, or that cannot be read."""

import argparse

import pytest
from megatron.training.arguments import add_megatron_arguments
from support.command_lines import parse_training

from maskmoe.errors import UserError
from maskmoe.training.settings.arguments import add_maskmoe_arguments
from maskmoe.training.settings.flag_values import missing_flags, value_errors
from maskmoe.training.settings.pretraining_arguments import add_pretraining_arguments

BAD_VALUES = {
    "--train-iters": "0 -1 1.5 abc nan",
    "--hidden-size": "0 -32 1e3",
    "--num-layers": "0 -1",
    "--seq-length": "0 -5",
    "--log-interval": "0 -1",
    "--eval-interval": "0 -1",
    "--eval-iters": "-1 x",
    "--save-interval": "0 -1",
    "--hang-timeout": "-5 0 nan inf",
    "--keep-last-checkpoints": "0 -1 1.5",
    "--spike-window": "1 0",
    "--spike-deviations": "0 nan",
    "--micro-batch-size": "0 -1",
    "--global-batch-size": "0 -4",
    "--hidden-dropout": "nan",
    "--clip-grad": "nan -1 inf",
    "--adam-eps": "nan",
    "--weight-decay": "-1 nan inf",
    "--lr": "nan -1 inf abc 1e400",
    "--min-lr": "-1 nan",
    "--lr-decay-style": "cosinus",
    "--moe-router-topk": "0 -1",
    "--num-experts": "-1 1.5",
    "--moe-aux-loss-coeff": "-1 nan",
    "--moe-layer-freq": "abc 0.5 [1]**9 [1]*99999999 [1",
    "--moe-router-load-balancing-type": "none_such",
    "--tensor-model-parallel-size": "0 -1 x",
    "--expert-model-parallel-size": "0 -1",
    "--seed": "-1 nan",
    "--split": "abc -1,2,3 0,0,0 1,2,3,4 nan,1,1",
    "--transformer-impl": "none_such",
    "--window-size": "a,b",
    "--num-layer": "2",
}


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    megatron = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return add_pretraining_arguments(add_maskmoe_arguments(megatron))


@pytest.mark.parametrize("flag", BAD_VALUES)
def test_bad_value_is_refused_by_name(parser, flag):
    for word in BAD_VALUES[flag].split():
        with pytest.raises(UserError, match=flag) as error:
            parse_training(parser, [flag, word])
        assert "\n" not in str(error.value)


def test_defaults_are_good_values(parser):
    assert not list(value_errors(parser.parse_args([])))


def test_each_bad_value_is_reported(parser):
    args = parser.parse_args(["--lr", "nan", "--micro-batch-size", "0", "--moe-aux-loss-coeff", "-1"])
    assert len(list(value_errors(args))) == 3


def test_flags_that_megatron_misses_late(parser):
    assert len(list(missing_flags(parser.parse_args([])))) == 3
    assert len(list(missing_flags(parser.parse_args([]), takes_learning_rate=True))) == 2
    evaluation = parser.parse_args(["--skip-train", "--seq-length", "8"])
    assert not list(missing_flags(evaluation))
