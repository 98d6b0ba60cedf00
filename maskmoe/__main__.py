"""Run `python -m maskmoe SUBCOMMAND …`."""

import importlib
import sys

from maskmoe.cli import run_tool

_MODULES = {
    "corpus": "maskmoe.commands.make_corpus",
    "tokenizer": "maskmoe.commands.train_tokenizer",
    "preprocess": "maskmoe.commands.preprocess_data",
    "count": "maskmoe.commands.count_token_frequency",
    "mask": "maskmoe.commands.build_routing_mask",
    "launch": "maskmoe.launch.__main__",
    "convert": "maskmoe.commands.convert_checkpoint",
    "sample": "maskmoe.commands.generate_text",
    "analyze": "maskmoe.commands.analyze_routing",
    "simulate": "maskmoe.commands.simulate_dispatch",
    "thin": "maskmoe.commands.thin_checkpoints",
    "quickstart": "maskmoe.commands.quickstart",
    "compare": "maskmoe.commands.compare",
}


def main() -> None:
    """Run the subcommand that the first argument names."""
    name, *arguments = sys.argv[1:]
    sys.argv = [f"maskmoe {name}", *arguments]
    importlib.import_module(_MODULES[name]).main()


if __name__ == "__main__":
    run_tool(main)
