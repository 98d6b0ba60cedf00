"""Continue a text with a model in transformers' format, such as convert_checkpoint.py writes."""

import argparse
from pathlib import Path
from typing import Any

from maskmoe import ranges
from maskmoe.cli import atomic_output
from maskmoe.command_line import Parser
from maskmoe.errors import UserError


def main() -> None:
    """Print the prompt with its continuation, which is computed on a GPU if there is one.

    Raises:
        UserError: the model does not exist, or a number is out of range.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of model and tokenizer")
    add("--prompt", required=True, help="text to continue")
    add("--max-new-tokens", type=ranges.NEW_TOKENS, default=64, metavar="N", help="stop after N new tokens")
    add(
        "--temperature",
        type=ranges.TEMPERATURE,
        default=0.8,
        help="divide logits by this; 0 takes the most probable token",
    )
    add("--top-k", type=ranges.TOP_K, default=50, help="sample among the K most probable tokens; 0 for all")
    add("--seed", type=ranges.SEED, default=1234, help="seed of the sampling")
    add("--output", type=Path, metavar="FILE", help="also write the text to a file")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise UserError(f"--model {arguments.model} holds no config.json: name the folder of an exported model")

    # Only now, since these imports take seconds and `--help` does not need them.
    import torch
    from transformers import set_seed

    from maskmoe.exported_model import load_exported_model

    model, tokenizer = load_exported_model(arguments.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if prompt["input_ids"].shape[1] == 0:
        raise UserError("--prompt is empty")
    length, most = prompt["input_ids"].shape[1] + arguments.max_new_tokens, model.config.max_position_embeddings
    if length > most:
        raise UserError(
            f"--prompt has {length - arguments.max_new_tokens} tokens, which together with --max-new-tokens "
            f"{arguments.max_new_tokens} exceed the model's {most} positions"
        )
    set_seed(arguments.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    tokens = model.generate(**prompt, max_new_tokens=arguments.max_new_tokens, **sampling)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(text)
    if arguments.output is not None:
        with atomic_output(arguments.output) as path:
            path.write_text(text + "\n", encoding="utf-8")
