"""The list of all subcommands of `maskmoe`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Subcommand:
    """One subcommand of `maskmoe`.

    Attributes:
        name: the word, or the two words, after `maskmoe` on the command line.
        module: the module whose `main()` reads `sys.argv` and does the work. Only the chosen subcommand's module is
            imported, so that `maskmoe --help` does not wait for torch.
        help: one line for `maskmoe --help`.
    """

    name: str
    module: str
    help: str


SUBCOMMANDS = (
    Subcommand(
        "corpus", "maskmoe.command_line.make_corpus", "collect the text of Python packages as a training corpus"
    ),
    Subcommand("tokenizer", "maskmoe.command_line.train_tokenizer", "train a SentencePiece tokenizer on raw text"),
    Subcommand("preprocess", "maskmoe.command_line.preprocess_data", "tokenize raw text into a Megatron dataset"),
    Subcommand(
        "count", "maskmoe.command_line.count_token_frequency", "count how often each token id occurs in a dataset"
    ),
    Subcommand("mask", "maskmoe.command_line.build_routing_mask", "build the routing mask from token frequencies"),
    Subcommand(
        "mask widen", "maskmoe.command_line.widen_routing_mask", "let frequent ids of a routing mask see more experts"
    ),
    Subcommand(
        "pretrain", "maskmoe.command_line.pretrain", "pretrain a model file, or from Megatron's flags, with restarts"
    ),
    Subcommand("evaluate", "maskmoe.command_line.evaluate", "compute a checkpoint's loss by token frequency"),
    Subcommand("generate", "maskmoe.command_line.generate", "generate text from a Megatron checkpoint"),
    Subcommand("check", "maskmoe.command_line.check", "check a model file's settings and show what the run needs"),
    Subcommand("status", "maskmoe.command_line.status", "show whether and how a run works, from its run folder"),
    Subcommand(
        "convert", "maskmoe.command_line.convert_checkpoint", "convert checkpoints to and from Hugging Face's format"
    ),
    Subcommand(
        "sample", "maskmoe.command_line.generate_text", "generate text from an exported model, without Megatron"
    ),
    Subcommand("analyze", "maskmoe.command_line.analyze_routing", "show how checkpoints route a text to experts"),
    Subcommand("simulate", "maskmoe.command_line.simulate_dispatch", "predict the cost of dispatch on many GPUs"),
    Subcommand("prune", "maskmoe.command_line.prune_checkpoints", "delete the old checkpoints of a finished run"),
    Subcommand(
        "quickstart", "maskmoe.command_line.quickstart", "go from raw text to an exported model on this machine"
    ),
    Subcommand("compare", "maskmoe.command_line.compare", "train and compare the variants of a suite"),
)
"""All subcommands, in the order in which `maskmoe --help` lists them: a run's steps first, then analysis."""
