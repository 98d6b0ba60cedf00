"""What is wrong with a `--hybrid-layer-pattern` and with the settings beside it."""

from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

KINDS = {
    Symbols.ATTENTION: "attention",
    Symbols.MLA: "multi-latent attention",
    Symbols.GDN: "gated delta net",
    Symbols.MAMBA: "Mamba",
    Symbols.MLP: "MLP",
    Symbols.MOE: "MoE",
}
"""The kind of layer that each symbol of a pattern stands for."""

_FLAG = "--hybrid-layer-pattern"


def pattern_errors(args: Namespace) -> Iterator[str]:
    """Yield an error for everything that is wrong with the pattern; nothing for a model without a pattern.

    How the pattern is divided into pipeline stages is not judged here, see `maskmoe.check.layout`.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    if args.hybrid_layer_pattern is None:
        return
    errors = list(_errors_of_symbols(args.hybrid_layer_pattern))
    if not errors:
        symbols = set(args.hybrid_layer_pattern)
        errors += [*_errors_of_kinds(args, symbols), *_contradictions(args)]
    yield from errors


def _errors_of_symbols(pattern: str) -> Iterator[str]:
    """Yield an error if the pattern cannot be read."""
    decoder, *predictions = pattern.split(Symbols.MTP_SEPARATOR)
    known = ", ".join(f"{symbol} ({kind})" for symbol, kind in KINDS.items())
    for part, separators, where in ((decoder, Symbols.PIPE, ""), ("".join(predictions), "", " after /")):
        wrong = [symbol for symbol in part if symbol not in {*KINDS, *separators}]
        if wrong:
            between = f", and {Symbols.PIPE} between pipeline stages" if separators else ""
            yield f"{_FLAG} {pattern} has {wrong[0]!r}{where}: the symbols are {known}{between}"
    if not decoder.replace(Symbols.PIPE, ""):
        yield f"{_FLAG} {pattern!r} has no layers: write a symbol for each layer, such as '*E*E'"
    if len(set(predictions)) > 1:
        yield (
            f"{_FLAG} {pattern} predicts further tokens by different layers ({', '.join(predictions)}): write the "
            "same symbols after each /"
        )


def _errors_of_kinds(args: Namespace, symbols: set[str]) -> Iterator[str]:
    """Yield an error for each kind of layer that the settings exclude, or that excludes another kind."""
    if Symbols.MOE in symbols and not args.num_experts:
        yield f"{_FLAG} has MoE layers (E): pass --num-experts, or write - for an MLP"
    if Symbols.MOE not in symbols and args.num_experts:
        yield f"--num-experts {args.num_experts} needs a MoE layer (E) in {_FLAG}"
    if {Symbols.ATTENTION, Symbols.MLA} <= symbols:
        yield f"{_FLAG} has attention (*) and multi-latent attention (+): Megatron-Core builds one of the two"
    elif Symbols.ATTENTION in symbols and args.multi_latent_attention:
        yield f"--multi-latent-attention contradicts the attention layers (*) of {_FLAG}: write + instead of *"
    if Symbols.MAMBA in symbols and find_spec("mamba_ssm") is None:
        yield f"{_FLAG} has Mamba layers (M), which need the Python package mamba_ssm: install the package"
    if args.position_embedding_type == "mrope":
        yield (
            f"--position-embedding-type mrope has no effect with {_FLAG}: Megatron-Core's HybridModel has no such "
            "embedding. Use rope."
        )


def _contradictions(args: Namespace) -> Iterator[str]:
    """Yield an error for each flag that says something else than the pattern."""
    decoder, *predictions = args.hybrid_layer_pattern.split(Symbols.MTP_SEPARATOR)
    depths = sum(map(bool, predictions))
    if (args.mtp_num_layers or depths) != depths:
        yield (
            f"--mtp-num-layers {args.mtp_num_layers} contradicts {_FLAG}, which has {depths} groups of layers after /: "
            "leave the flag out, or write / and the layers for each predicted token"
        )
    if args.use_checkpoint_args:
        return  # The remaining settings can be those of a GPT model, which the hybrid run continues.
    layers = len(decoder.replace(Symbols.PIPE, ""))
    if args.num_layers not in (None, layers):
        yield f"--num-layers {args.num_layers} contradicts {_FLAG}, which has {layers} layers: leave the flag out"
    if args.moe_layer_freq != 1:
        yield f"--moe-layer-freq has no effect with {_FLAG}, whose symbols E are the MoE layers: leave the flag out"
