"""Checks the values of Megatron's flags that its parser accepts although they cannot be meant.

Megatron refuses most bad numbers itself. This module refuses those with which it would train something else without a
word, such as a learning rate of NaN, or with which a division by zero would come first.
"""

import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from math import isfinite, prod
from types import MethodType
from typing import Any

from maskmoe.command_line.parser import OneLineParser, split

# Settings that must be above zero if they are given: sizes by which others are divided, lengths and intervals.
_ABOVE_ZERO = (
    *("num_layers", "hidden_size", "num_attention_heads", "seq_length", "num_experts", "moe_router_topk"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_distributed_optimizer_instances"),
    *("micro_batch_size", "global_batch_size", "eval_micro_batch_size", "eval_global_batch_size"),
    *("train_iters", "train_samples", "log_interval", "eval_interval", "save_interval", "save_retain_interval"),
)
# Settings that must not be negative if they are given.
_NOT_NEGATIVE = (
    *("lr", "min_lr", "lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "decoupled_lr"),
    *("weight_decay", "start_weight_decay", "clip_grad", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
    *("moe_router_bias_update_rate", "eval_iters", "seed", "num_workers"),
)
_LONGEST_WORD, _LONGEST_PATTERN = 100_000, 1 << 17
_FACTOR = re.compile(r"(?<=\*)\s*\d+|\d+\s*(?=\*)")


def value_errors(args: Namespace) -> Iterator[str]:
    """Yield an error for each number that is not finite, or zero or negative where it cannot be.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    for name, setting in vars(args).items():
        for value in setting if isinstance(setting, list | tuple) else (setting,):
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            flag = f"--{name.replace('_', '-')}"
            if not isfinite(value):
                yield f"{flag} must be a finite number, not {value}"
            elif name in _ABOVE_ZERO and value <= 0:
                yield f"{flag} must be above 0, not {value:g}"
            elif name in _NOT_NEGATIVE and value < 0:
                yield f"{flag} must not be negative, but is {value:g}"
    if args.split is not None:
        try:
            split(args.split)
        except ArgumentTypeError as problem:
            yield f"--split {problem}"


def missing_flags(args: Namespace, takes_learning_rate: bool = False) -> Iterator[str]:
    """Yield an error for each missing flag that Megatron reports late, or by another name.

    Args:
        args: parsed arguments; Megatron need not have validated them.
        takes_learning_rate: whether the learning rate of a checkpoint replaces the arguments'.
    """
    if args.seq_length is None and args.encoder_seq_length is None:
        yield "no sequence length: pass --seq-length"
    if args.skip_train:
        return
    if args.train_iters is None and args.train_samples is None:
        yield "no length of training: pass --train-iters or --train-samples"
    if args.lr is None and not takes_learning_rate:
        yield "no learning rate: pass --lr"


def report_errors_in_one_line(parser: ArgumentParser) -> None:
    """Let Megatron's parser report a wrong value in one line, where argparse would print a usage of 700 lines first.

    Args:
        parser: has Megatron's arguments; is changed in place.
    """
    vars(parser)["error"] = MethodType(OneLineParser.error, parser)
    for action in parser._actions:
        if callable(action.type) and not isinstance(action.type, type):
            action.type = _refusing(action, action.type)


def _refusing(action: Action, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter of a flag's words whose failures are errors of argparse.

    Args:
        action: the argument.
        convert: Megatron's converter, which may raise any exception for a word that it does not understand.
    """
    choices = [getattr(choice, "name", str(choice)) for choice in action.choices or ()]
    expected = f"must be one of {', '.join(choices)}" if choices else "has a value that Megatron cannot read"

    def convert_or_refuse(word: str) -> Any:
        try:
            return convert(check_pattern(word))
        except ArgumentTypeError:
            raise
        except Exception as error:
            raise ArgumentTypeError(f"{expected}, not {word!r}") from error

    return convert_or_refuse


def check_pattern(word: str) -> str:
    """Return a word that Megatron may evaluate, such as the pattern `[0]+[1]*23`, as it is.

    Raises:
        ArgumentTypeError: evaluating the word would take too much memory or time.
    """
    factors = map(int, _FACTOR.findall(word)) if len(word) <= _LONGEST_WORD else ()
    if len(word) > _LONGEST_WORD or "**" in word or prod(factors) > _LONGEST_PATTERN:
        raise ArgumentTypeError(f"is a pattern for too many layers: {word!r}")
    return word
