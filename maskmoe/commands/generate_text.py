"""Continue a text with an exported model, on whatever transformers finds to run on."""

import argparse
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Continue a text with a model in transformers' format, as tools/convert_checkpoint.py writes it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of model and tokenizer")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="stop after so many tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable token")
    parser.add_argument("--top-k", type=int, default=50, help="sample among so many tokens; 0: among all")
    parser.add_argument("--seed", type=int, default=1234, help="of the draw")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the text to a file")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise UserError(f"--model {arguments.model} holds no config.json: name the folder of an exported model")
    if arguments.temperature < 0 or arguments.top_k < 0 or arguments.max_new_tokens < 1:
        raise UserError("--temperature and --top-k must not be negative, --max-new-tokens must be positive")
    return arguments


def main() -> None:
    arguments = parse_arguments()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    import maskmoe.huggingface  # noqa: F401 (registers the model)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", local_files_only=True)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(arguments.prompt, return_tensors="pt").to(model.device)
    if prompt["input_ids"].shape[1] == 0:
        raise UserError("--prompt is empty")
    set_seed(arguments.seed)
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    tokens = model.generate(**prompt, max_new_tokens=arguments.max_new_tokens, **sampling)
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(text)
    if arguments.output is not None:
        with atomic_output(arguments.output) as path:
            path.write_text(text + "\n", encoding="utf-8")
