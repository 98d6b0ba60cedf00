"""Move models between Megatron's checkpoints and transformers' format, or make them of others."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.cli import atomic_output
from maskmoe.conversion.convert import (
    DTYPES,
    Settings,
    huggingface_to_megatron,
    megatron_to_huggingface,
    upcycle_model,
)
from maskmoe.conversion.inspection import inspect_checkpoint
from maskmoe.conversion.safetensors_files import parse_size
from maskmoe.conversion.upcycle import add_upcycle_arguments, changes_of_function, settings_from
from maskmoe.routing_mask.mask import RoutingMask


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser(
        "megatron-to-hf",
        help="a torch_dist checkpoint, of whatever layout of ranks, as a model of transformers",
    )
    to_hf.set_defaults(run=_megatron_to_hf)
    to_megatron = commands.add_parser(
        "hf-to-megatron",
        help="a model of transformers as a checkpoint that training starts from",
    )
    to_megatron.set_defaults(run=_hf_to_megatron)
    upcycle = commands.add_parser("upcycle", help="a MaskMoE model of a dense one, whose MLPs become experts")
    upcycle.set_defaults(run=_upcycle)
    for command in (to_hf, to_megatron, upcycle):
        _add_conversion_arguments(command)
    for command in (to_hf, to_megatron):
        command.add_argument("--routing-mask", type=Path, metavar="F", help="routing mask of a model that holds none")
    upcycle.add_argument(
        "--save-format", choices=("megatron", "hf"), default="megatron", help="of the result (default: %(default)s)"
    )
    add_upcycle_arguments(upcycle.add_argument_group("experts"))
    inspect = commands.add_parser("inspect", help="what is in a checkpoint or model, and whether it is whole")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("checkpoint", type=Path, metavar="DIR", help="of either format, or the folder of a run")
    inspect.add_argument("--json", type=Path, metavar="F", help="also write it as JSON")
    _add_verification_argument(inspect)
    return parser.parse_args()


def _add_conversion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="what to convert")
    parser.add_argument(
        "--save",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder; or that of a conversion that was interrupted, to go on",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are stored)")
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        default=Settings.max_shard_size,
        metavar="SIZE",
        help="of a file, such as 5GB (default)",
    )
    parser.add_argument("--tokenizer-type", metavar="T", help="instead of the checkpoint's; NullTokenizer: none")
    parser.add_argument("--tokenizer-model", metavar="F", help="instead of the checkpoint's")
    parser.add_argument("--allow-nan", action="store_true", help="convert weights that are NaN or infinite, too")
    _add_verification_argument(parser)


def _add_verification_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-verify-checkpoint",
        action="store_false",
        dest="verify_checkpoint",
        help="do not compare files with the digests that were saved with them",
    )


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _settings(arguments: argparse.Namespace) -> Settings:
    return Settings(
        load=arguments.load,
        save=arguments.save,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        allow_nan=arguments.allow_nan,
        verify=arguments.verify_checkpoint,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
    )


def _mask(arguments: argparse.Namespace) -> RoutingMask | None:
    return read_routing_mask(arguments.routing_mask) if arguments.routing_mask else None


def _megatron_to_hf(arguments: argparse.Namespace) -> None:
    megatron_to_huggingface(_settings(arguments), _mask(arguments))
    print(f"written {arguments.save}")


def _hf_to_megatron(arguments: argparse.Namespace) -> None:
    _tell_flags(arguments, huggingface_to_megatron(_settings(arguments), _mask(arguments)))


def _upcycle(arguments: argparse.Namespace) -> None:
    recipe, mask, to_megatron = settings_from(arguments), _mask(arguments), arguments.save_format == "megatron"
    flags = upcycle_model(_settings(arguments), recipe, mask, to_megatron)
    changes = changes_of_function(recipe, mask)
    print(
        f"it computes {'not ' if changes else ''}what the dense model did{': ' if changes else ''}{'; '.join(changes)}"
    )
    if to_megatron:
        _tell_flags(arguments, flags)
    else:
        print(f"written {arguments.save}")


def _tell_flags(arguments: argparse.Namespace, flags: list[str]) -> None:
    print(f"written {arguments.save}; load it with")
    print(" ".join(["  --load", str(arguments.save), "--use-checkpoint-args", *flags]))


def _inspect(arguments: argparse.Namespace) -> None:
    inspection = inspect_checkpoint(arguments.checkpoint, arguments.verify_checkpoint)
    print(inspection.table())
    if arguments.json:
        with atomic_output(arguments.json) as path:
            path.write_text(json.dumps(asdict(inspection), indent=2) + "\n")


def main() -> None:
    arguments = parse_arguments()
    arguments.run(arguments)
