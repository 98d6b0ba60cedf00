"""Move models between Megatron's checkpoints and transformers' format, or make MoE models of dense ones."""

import argparse
import dataclasses
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import Parser, say_loading
from maskmoe.arguments.parser import add_option
from maskmoe.conversion.settings import DTYPE_NAMES, Settings, UpcycleSettings, parse_size
from maskmoe.errors import UserError
from maskmoe.files.paths import check_folder
from maskmoe.routing_mask.feed_forward_layers import LAYER_FREQUENCY_ERROR


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; `command` in the result is the name of the subcommand."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in {
        "megatron-to-hf": "convert a torch_dist checkpoint, of any layout of ranks, into a transformers model",
        "hf-to-megatron": "convert a transformers model into a checkpoint that training starts from",
        "upcycle": "make a MaskMoE model of a dense model, whose MLPs become experts",
    }.items():
        _add_arguments(commands.add_parser(name, help=help), name)
    return parser.parse_args()


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the arguments of the subcommand `name`."""
    _add_conversion_arguments(parser)
    parser.set_defaults(ckpt_step=None)
    if name in ("megatron-to-hf", "upcycle"):
        step = "iteration to convert of a run's checkpoints, as Megatron's flag (default: the newest, if undamaged)"
        add_option(parser, "--ckpt-step I", step, ranges.NUMBER)
    if name == "upcycle":
        add_option(parser, "--save-format", "format of the result", choices=("megatron", "hf"), default="megatron")
        add_upcycle_arguments(parser)
    else:
        add_option(parser, "--routing-mask F", "routing mask for a model that holds none", Path)
    verification = "do not compare files with the digests that were saved with them"
    parser.add_argument("--no-verify-checkpoint", action="store_false", dest="verify", help=verification)


def _add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    kind = "type of the tokenizer (default: the training's), as Megatron's flag; NullTokenizer for none"
    file = "file of the tokenizer, if the training's is not found; export refuses another one than the training's"
    folder = "folder to convert: a model, a checkpoint, or a run's checkpoints"
    add_option(parser, "--load DIR", folder, Path, required=True)
    add_option(parser, "--save DIR", "new folder for the result", Path, required=True)
    add_option(parser, "--dtype", "type of the weights (default: as they are stored)", choices=DTYPE_NAMES)
    size = "upper bound of the weights in a file, such as 1GB (default)"
    parser.set_defaults(max_shard_size=Settings.max_shard_size)
    add_option(parser, "--max-shard-size SIZE", size, parse_size)
    add_option(parser, "--tokenizer-type T", kind)
    add_option(parser, "--tokenizer-model F", file)


def add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `upcycle_settings` reads, and `--routing-mask`."""
    group = parser.add_argument_group("experts")
    mask = "routing mask made by maskmoe mask for the model's vocabulary (vocab_size in config.json)"
    add_option(group, "--routing-mask F", mask, Path, required=True)
    add_option(group, "--num-experts N", "experts in each MoE layer", ranges.EXPERTS, required=True)
    layers = "which layers get experts, as Megatron's flag: one in FREQ layers, or a list such as [0]+[1]*23"
    parser.set_defaults(moe_layer_freq=UpcycleSettings.moe_layer_freq)
    add_option(group, "--moe-layer-freq FREQ", f"{layers} (default: all layers)")
    add_option(group, "--topk K", "experts of a token", ranges.EXPERTS, default=UpcycleSettings.topk)
    parts = "make experts of 1/G of the MLP's size; N and K must be multiples of G; 1: whole copies"
    add_option(group, "--granularity G", parts, ranges.COUNT, default=UpcycleSettings.granularity)
    group.add_argument("--shared-expert", action="store_true", help="give each MoE layer a shared expert as well")
    add_option(group, "--seed S", "seed of the routers", ranges.SEED, default=UpcycleSettings.seed)


def upcycle_settings(arguments: argparse.Namespace) -> UpcycleSettings:
    """Return the settings that the flags of `add_upcycle_arguments` describe; needs a prepared process.

    Raises:
        UserError: The settings contradict each other.
    """
    frequency = arguments.moe_layer_freq
    if isinstance(frequency, str):
        frequency = _parse_layer_frequency(frequency)
    return UpcycleSettings(**_field_values(UpcycleSettings, arguments) | {"moe_layer_freq": frequency})


def _field_values(settings: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags that have the names of a dataclass's fields."""
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(settings)}


def _parse_layer_frequency(text: str) -> int | list[int]:
    """Parse `--moe-layer-freq` as Megatron does.

    Raises:
        UserError: The text is not a layer pattern.
    """
    from megatron.training.arguments import moe_freq_type

    with suppress(argparse.ArgumentTypeError, SyntaxError, TypeError, ValueError, MemoryError):
        return moe_freq_type(text)
    raise UserError(LAYER_FREQUENCY_ERROR)


def _convert(arguments: argparse.Namespace) -> None:
    """Run a conversion, and print where the result is and how training loads it."""
    from maskmoe.checkpoint.read_routing_mask import read_routing_mask
    from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface, upcycle_model
    from maskmoe.conversion.upcycle import changes_of_function

    settings, flags = Settings(**_field_values(Settings, arguments)), None
    mask = read_routing_mask(arguments.routing_mask) if arguments.routing_mask else None
    if arguments.command == "megatron-to-hf":
        megatron_to_huggingface(settings, mask)
    elif arguments.command == "hf-to-megatron":
        flags = huggingface_to_megatron(settings, mask)
    else:
        assert mask is not None  # upcycle requires --routing-mask
        recipe, to_megatron = upcycle_settings(arguments), arguments.save_format == "megatron"
        load_flags = upcycle_model(settings, recipe, mask, to_megatron)
        flags = load_flags if to_megatron else None
        if changes := changes_of_function(recipe, mask):
            print(f"the model does not compute what the dense model computes: {'; '.join(changes)}")
        else:
            print("the model computes what the dense model computes")
    if flags is None:
        print(f"written {arguments.save}")
    else:
        print(f"written {arguments.save}; load it with")
        print(" ".join(["  --load", shlex.quote(str(arguments.save)), "--use-checkpoint-args", *flags]))


def main() -> None:
    """Run the subcommand that the command line names."""
    arguments = parse_arguments()
    check_folder(arguments.load, "--load")
    say_loading("importing PyTorch and Megatron-Core")
    # Only now, since torch and Megatron take seconds to import and `--help` needs neither.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    _convert(arguments)
