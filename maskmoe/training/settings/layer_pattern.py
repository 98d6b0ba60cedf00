"""Finds errors in a `--hybrid-layer-pattern`, and flags that the pattern overrides."""

from argparse import Namespace
from collections.abc import Iterator

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers, expand_layer_frequency

KINDS = {
    Symbols.ATTENTION: "attention",
    Symbols.MLA: "multi-latent attention",
    Symbols.GDN: "gated delta net",
    Symbols.MAMBA: "Mamba",
    Symbols.MLP: "MLP",
    Symbols.MOE: "MoE",
}
"""The kind of layer that each symbol of a pattern stands for; without D, which `unsupported_settings` refuses."""

_FLAG = "--hybrid-layer-pattern"


def pattern_errors(args: Namespace) -> Iterator[str]:
    """Yield an error for everything that is wrong with the pattern; nothing for a model without a pattern.

    `layer_errors` judges how the pattern is divided into pipeline stages, and `unsupported_settings` judges which
    settings a kind of layer needs.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    if args.hybrid_layer_pattern is None:
        return
    yield from _errors_of_symbols(args.hybrid_layer_pattern)


def _errors_of_symbols(pattern: str) -> Iterator[str]:
    """Yield an error for each reason why the pattern cannot be read, or why no model has these layers."""
    decoder, *predictions = pattern.split(Symbols.MTP_SEPARATOR)
    known = ", ".join(f"{symbol} ({kind})" for symbol, kind in KINDS.items())
    for part, separators, where in ((decoder, Symbols.PIPE, ""), ("".join(predictions), "", " after /")):
        wrong = [symbol for symbol in part if symbol not in Symbols.VALID_LAYERS | {*separators}]
        if wrong:
            between = f", and {Symbols.PIPE} between pipeline stages" if separators else ""
            yield f"{_FLAG} {pattern} has {wrong[0]!r}{where}: the symbols are {known}{between}"
    if not decoder.replace(Symbols.PIPE, ""):
        yield f"{_FLAG} {pattern!r} has no layers: write a symbol for each layer, such as '*E*E'"
    if len(set(predictions)) > 1:
        yield (
            f"{_FLAG} {pattern} predicts further tokens by different layers ({', '.join(predictions)}): write the same "
            "symbols after each /"
        )
    if {Symbols.ATTENTION, Symbols.MLA} <= set(pattern):
        yield f"{_FLAG} {pattern} has attention (*) and multi-latent attention (+): a model has one of the two"


def ignored_flags(args: Namespace) -> Iterator[str]:
    """Yield a note for each flag that says something else than the pattern, which Megatron then follows.

    Args:
        args: parsed arguments with a pattern that has no errors, or without a pattern; before Megatron completes them.
    """
    if args.hybrid_layer_pattern is None:
        return
    decoder, *predictions = args.hybrid_layer_pattern.split(Symbols.MTP_SEPARATOR)
    depths = sum(map(bool, predictions))
    if depths and args.mtp_num_layers not in (None, depths):
        yield f"--mtp-num-layers {args.mtp_num_layers} is ignored: {_FLAG} has {depths} parts after /"
    if args.use_checkpoint_args:
        return  # The remaining flags can describe the layers of a GPT model, which the hybrid run continues.
    num_layers = len(decoder.replace(Symbols.PIPE, ""))
    if args.num_layers not in (None, num_layers):
        yield f"--num-layers {args.num_layers} is ignored: {_FLAG} has {num_layers} layers"
    has_experts = FeedForwardLayers.of_pattern(args.hybrid_layer_pattern).decoder
    frequency = args.moe_layer_freq
    if frequency != 1 and tuple(expand_layer_frequency(frequency, len(has_experts))) != has_experts:
        yield f"--moe-layer-freq is ignored: the symbols E of {_FLAG} are the MoE layers"
