"""Continue a text with a model in transformers' format, such as convert_checkpoint.py writes."""

import argparse
from pathlib import Path
from typing import Any

from maskmoe.cli import atomic_output
from maskmoe.commands.progress import say_loading
from maskmoe.errors import UserError


def main() -> None:
    """Print the prompt with its continuation, which is computed on a GPU if there is one.

    Raises:
        UserError: the model does not exist, or a number is out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of model and tokenizer")
    add("--prompt", required=True, help="text to continue")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="stop after N new tokens")
    add("--temperature", type=float, default=0.8, help="divide logits by this; 0 takes the most probable token")
    add("--top-k", type=int, default=50, help="sample among the K most probable tokens; 0 for all")
    add("--seed", type=int, default=1234, help="seed of the sampling")
    add("--output", type=Path, metavar="FILE", help="also write the text to a file")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise UserError(f"--model {arguments.model} holds no config.json: name the folder of an exported model")
    if arguments.temperature < 0 or arguments.top_k < 0 or arguments.max_new_tokens < 1:
        raise UserError("--temperature and --top-k must not be negative, --max-new-tokens must be positive")

    if not arguments.prompt.strip():
        raise UserError("--prompt is empty")

    say_loading("importing PyTorch and transformers")
    # Only now, since these imports take seconds and `--help` does not need them.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    import maskmoe.huggingface  # noqa: F401 (registers the model)

    say_loading("reading the model")
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", local_files_only=True)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if prompt["input_ids"].shape[1] == 0:
        raise UserError("--prompt is empty")
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
