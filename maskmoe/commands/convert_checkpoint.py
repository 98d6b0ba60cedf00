"""Move models between Megatron's checkpoints and transformers' format, or make MoE models of dense ones."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskmoe.cli import atomic_output
from maskmoe.conversion.settings import DTYPE_NAMES, Settings, UpcycleSettings, parse_size
from maskmoe.errors import UserError

if TYPE_CHECKING:
    from maskmoe.routing_mask.mask import RoutingMask


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; `run` in the result is the function of the subcommand."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add_command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        return command

    to_hf = add_command(
        "megatron-to-hf",
        _megatron_to_hf,
        "convert a torch_dist checkpoint, of any layout of ranks, into a transformers model",
    )
    to_megatron = add_command(
        "hf-to-megatron", _hf_to_megatron, "convert a transformers model into a checkpoint that training starts from"
    )
    upcycle = add_command("upcycle", _upcycle, "make a MaskMoE model of a dense model, whose MLPs become experts")
    inspect = add_command("inspect", _inspect, "report what a checkpoint or model holds and whether it is intact")
    for command in (to_hf, to_megatron, upcycle):
        _add_conversion_arguments(command)
    for command in (to_hf, to_megatron):
        command.add_argument("--routing-mask", type=Path, metavar="F", help="routing mask for a model that holds none")
    formats = {"choices": ("megatron", "hf"), "default": "megatron"}
    upcycle.add_argument("--save-format", **formats, help="format of the result (default: %(default)s)")
    add_upcycle_arguments(upcycle)
    inspect.add_argument(
        "checkpoint", type=Path, metavar="DIR", help="folder of a model, of a checkpoint, or of a run's checkpoints"
    )
    inspect.add_argument("--json", type=Path, metavar="F", help="also write the report as JSON to this file")
    for command in (to_hf, to_megatron, upcycle, inspect):
        command.add_argument(
            "--no-verify-checkpoint",
            action="store_false",
            dest="verify",
            help="do not compare files with the digests that were saved with them",
        )
    return parser.parse_args()


def _add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    folder: dict[str, Any] = {"type": Path, "required": True, "metavar": "DIR"}
    parser.add_argument("--load", **folder, help="folder to convert: a model, a checkpoint, or a run's checkpoints")
    parser.add_argument(
        "--save", **folder, help="new folder for the result, or the folder of an interrupted conversion to resume"
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="type of the weights (default: as they are stored)")
    size: dict[str, Any] = {"type": _size, "default": Settings.max_shard_size, "metavar": "SIZE"}
    parser.add_argument("--max-shard-size", **size, help="upper bound of a file's size, such as 5GB (default)")
    parser.add_argument(
        "--tokenizer-type",
        metavar="T",
        help="tokenizer to use instead of the checkpoint's, as Megatron's flag; NullTokenizer for none",
    )
    parser.add_argument("--tokenizer-model", metavar="F", help="file of the tokenizer, as Megatron's flag")
    parser.add_argument("--allow-nan", action="store_true", help="convert weights that are NaN or infinite, too")


def add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `upcycle_settings` reads, and `--routing-mask`."""
    group = parser.add_argument_group("experts")
    group.add_argument(
        "--routing-mask",
        type=Path,
        required=True,
        metavar="F",
        help="routing mask made by build_routing_mask.py for the model's vocabulary (vocab_size in config.json)",
    )
    group.add_argument("--num-experts", type=int, required=True, metavar="N", help="experts in each MoE layer")
    group.add_argument(
        "--moe-layer-freq",
        default=UpcycleSettings.moe_layer_freq,
        metavar="FREQ",
        help="which layers get experts, as Megatron's flag: one in FREQ layers, or a list such as [0]+[1]*23 "
        "(default: all layers)",
    )
    group.add_argument("--shared-expert", action="store_true", help="give each MoE layer a shared expert, too")
    flags = {
        "topk": ("K", "experts of a token"),
        "granularity": ("G", "make experts of 1/G of the MLP's size; N and K must be multiples of G; 1: whole copies"),
        "noise": ("S", "standard deviation of relative noise on the experts' weights"),
        "reinit_share": ("R", "share of each expert's features to draw anew, as in Drop-Upcycling, which uses 0.5"),
        "seed": ("S", "seed of routers, noise and new features"),
    }
    for name, (metavar, help) in flags.items():
        default, text = getattr(UpcycleSettings, name), f"{help} (default: %(default)s)"
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=type(default), default=default, metavar=metavar, help=text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def upcycle_settings(arguments: argparse.Namespace) -> UpcycleSettings:
    """Return the settings that the flags of `add_upcycle_arguments` describe; needs a prepared process.

    Raises:
        UserError: the settings contradict each other.
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
        UserError: the text is not a layer pattern.
    """
    from megatron.training.arguments import moe_freq_type

    try:
        frequency = moe_freq_type(text)
    except (SyntaxError, TypeError, ValueError) as error:
        raise UserError(f"--moe-layer-freq {text!r} is not a layer pattern such as 2 or [0]+[1]*23") from error
    if isinstance(frequency, int) and frequency < 1:
        raise UserError(f"--moe-layer-freq must be 1 or more, it is {frequency}")
    if isinstance(frequency, list) and not all(is_sparse in (0, 1) for is_sparse in frequency):
        raise UserError(f"--moe-layer-freq {text!r} must be a list of 1 for layers with experts and 0 for others")
    return frequency


def _mask(arguments: argparse.Namespace) -> "RoutingMask | None":
    """Read the routing mask that the user passed, if any; needs a prepared process."""
    from maskmoe.checkpoint.routing_mask import read_routing_mask

    return read_routing_mask(arguments.routing_mask) if arguments.routing_mask else None


def _megatron_to_hf(arguments: argparse.Namespace) -> None:
    from maskmoe.conversion.convert import megatron_to_huggingface

    megatron_to_huggingface(Settings(**_field_values(Settings, arguments)), _mask(arguments))
    _report_written(arguments)


def _hf_to_megatron(arguments: argparse.Namespace) -> None:
    from maskmoe.conversion.convert import huggingface_to_megatron

    _report_written(
        arguments, huggingface_to_megatron(Settings(**_field_values(Settings, arguments)), _mask(arguments))
    )


def _upcycle(arguments: argparse.Namespace) -> None:
    from maskmoe.checkpoint.routing_mask import read_routing_mask
    from maskmoe.conversion.convert import upcycle_model
    from maskmoe.conversion.upcycle import changes_of_function

    recipe, mask = upcycle_settings(arguments), read_routing_mask(arguments.routing_mask)
    to_megatron = arguments.save_format == "megatron"
    flags = upcycle_model(Settings(**_field_values(Settings, arguments)), recipe, mask, to_megatron)
    if changes := changes_of_function(recipe, mask):
        print(f"the model does not compute what the dense model computes: {'; '.join(changes)}")
    else:
        print("the model computes what the dense model computes")
    _report_written(arguments, flags if to_megatron else None)


def _report_written(arguments: argparse.Namespace, flags: list[str] | None = None) -> None:
    """Print where the result is, and how to load a checkpoint in training if `flags` are given."""
    if flags is None:
        print(f"written {arguments.save}")
    else:
        print(f"written {arguments.save}; load it with")
        print(" ".join(["  --load", str(arguments.save), "--use-checkpoint-args", *flags]))


def _inspect(arguments: argparse.Namespace) -> None:
    from maskmoe.conversion.inspection import inspect_checkpoint

    inspection = inspect_checkpoint(arguments.checkpoint, arguments.verify)
    print(inspection.table())
    if arguments.json:
        with atomic_output(arguments.json) as path:
            path.write_text(json.dumps(dataclasses.asdict(inspection), indent=2) + "\n")


def main() -> None:
    """Run the subcommand that the command line names."""
    arguments = parse_arguments()
    # Only now, since torch and Megatron take seconds to import and `--help` needs neither.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    arguments.run(arguments)
