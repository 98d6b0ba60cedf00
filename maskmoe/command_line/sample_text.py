"""Continue texts with a model in transformers' format, such as maskmoe convert writes."""

import argparse
from pathlib import Path
from typing import Any

from maskmoe.command_line import ranges
from maskmoe.command_line.parser import Parser, add_force_argument, add_option, add_seed_argument, say_loading
from maskmoe.conversion.settings import read_model_config
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, check_outputs
from maskmoe.training.inference.flags import add_prompt_arguments
from maskmoe.training.inference.prompts import Prompts, check_prompt

_MIN_TEMPERATURE = 1e-6


def main() -> None:
    """Print each prompt with its continuation, which is computed on a GPU if there is one.

    Raises:
        UserError: The model or the file of prompts is missing or damaged, a prompt is empty or too long for the model,
            or a number is out of range.
    """
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of model and tokenizer")
    add_prompt_arguments(parser)
    add_option(parser, "--max-new-tokens N", "stop after N new tokens", ranges.NEW_TOKENS, default=64)
    divisor = "divide logits by T; 0 takes the most probable token"
    add_option(parser, "--temperature T", divisor, ranges.TEMPERATURE, default=0.8)
    add_option(parser, "--top-k K", "sample among the K most probable tokens; 0 for all", ranges.TOP_K, default=50)
    add_seed_argument(parser, "the sampling", default=1234)
    add_option(parser, "--output FILE", "also write the text to a file", Path)
    add_force_argument(parser)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        raise UserError(f"--model {arguments.model} holds no config.json: name the folder of an exported model")
    positions = read_positions(arguments.model / "config.json")
    if arguments.output is not None:
        inputs = [path for path in (arguments.model, arguments.prompts_file) if path is not None]
        check_outputs([arguments.output], inputs, arguments.force)
    prompts = Prompts(arguments)

    say_loading("importing PyTorch and transformers")
    # Only now, since these imports take seconds and `--help` does not need them.
    import torch
    from transformers import set_seed

    from maskmoe.conversion.model_files import load_exported_model, load_exported_tokenizer

    tokenizer = load_exported_tokenizer(arguments.model)
    prompts_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts.texts]
    for prompt_ids in prompts_ids:
        check_prompt(prompt_ids, arguments.max_new_tokens, positions)
    say_loading("reading the model")
    model = load_exported_model(arguments.model, tokenizer)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    continuation = Continuation(arguments, tokenizer, model)
    set_seed(arguments.seed)
    texts = (text for batch in prompts.batches() for text in continuation.of(prompts_ids[batch]))
    text = prompts.output([*texts])
    print(text)
    if arguments.output is not None:
        with atomic_output(arguments.output) as path:
            path.write_text(text + "\n", encoding="utf-8")


def read_positions(path: Path) -> int | None:
    """Return the number of positions of a model; None if the model names no limit.

    Args:
        path: The model's `config.json`.

    Raises:
        UserError: The file is damaged, or its number of positions is no positive whole number.
    """
    positions = read_model_config(path).get("max_position_embeddings")
    if positions is not None and (type(positions) is not int or positions < 1):
        raise UserError(f"{path}: max_position_embeddings is {positions!r}, not a positive whole number")
    return positions


class Continuation:
    """Continues texts with a model of transformers.

    Args:
        arguments: The arguments of the command line.
        tokenizer: The model's tokenizer.
        model: The model.

    Raises:
        UserError: The model does not end texts by token ids.
    """

    def __init__(self, arguments: argparse.Namespace, tokenizer: Any, model: Any) -> None:
        from transformers import GenerationConfig

        self._tokenizer, self._model = tokenizer, model
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [] if end is None else [end]
        if not all(type(token) is int for token in ends):
            raise UserError(f"generation_config.json in {arguments.model}: eos_token_id is {end!r}, not token ids")
        self._ends = {*ends}
        # Other settings of the folder do not fit the arguments, or not even transformers.
        model.generation_config = GenerationConfig(eos_token_id=ends or None)
        self._options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
        if arguments.temperature > 0:
            # Logits that are divided by the smallest temperatures become infinite.
            temperature = max(arguments.temperature, _MIN_TEMPERATURE)
            self._options |= {"do_sample": True, "temperature": temperature, "top_k": arguments.top_k}

    def of(self, prompts: list[list[int]]) -> list[str]:
        """Return each prompt with its continuation.

        Args:
            prompts: The token ids of each prompt, at least one.
        """
        import torch

        # Pad on the left, because the model adds tokens on the right. The mask hides the padding, so any id serves.
        longest = max(map(len, prompts))
        paddings = [longest - len(ids) for ids in prompts]
        device = self._model.device
        tokens = torch.tensor([[0] * width + ids for width, ids in zip(paddings, prompts, strict=True)], device=device)
        is_real = torch.arange(longest, device=device) >= torch.tensor(paddings, device=device).unsqueeze(1)
        rows = self._model.generate(tokens, attention_mask=is_real.long(), pad_token_id=0, **self._options).tolist()
        return [self._decode(row[width:], longest - width) for row, width in zip(rows, paddings, strict=True)]

    def _decode(self, tokens: list[int], num_prompt_tokens: int) -> str:
        """Return the text of a prompt and of its continuation up to the token that ends a text."""
        new = tokens[num_prompt_tokens:]
        length = next((index for index, token in enumerate(new) if token in self._ends), len(new))
        return self._tokenizer.decode(tokens[: num_prompt_tokens + length], skip_special_tokens=True)
