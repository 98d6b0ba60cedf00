"""Continue texts with a checkpoint of Megatron or with an exported model; print each prompt with its continuation.

A checkpoint is first exported to a temporary folder, below TMPDIR if that variable is set. To generate often, export it
once with maskmoe convert megatron-to-hf, and name the exported folder. The text goes to stdout, everything else to
stderr.

Examples:
  %(prog)s --load runs/a/checkpoints --prompt "def __init__(self"
  %(prog)s --load runs/a/model --prompts-file prompts.jsonl --temperature 0 --output texts.jsonl
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import batched
from pathlib import Path
from typing import Any

from tqdm import tqdm

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_seed_argument, command_parser, say_loading
from maskmoe.arguments.parser import add_option
from maskmoe.conversion.seal import check_seal
from maskmoe.conversion.settings import CONFIG_FILE
from maskmoe.data.documents import read_blocks
from maskmoe.data.inputs import find_inputs
from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import write_text
from maskmoe.files.parsing import refuse_surrogates
from maskmoe.files.paths import check_folder

_KEY = "prompt"
_MIN_TEMPERATURE = 1e-6  # logits that are divided by less become infinite


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of this process."""
    parser = command_parser(__doc__)
    folder = "folder of an exported model, of a checkpoint, or of a run's checkpoints"
    add_option(parser, "--load DIR", folder, Path, required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    add_option(source, "--prompt TEXT", "the text to continue")
    file = "JSON lines with texts to continue in the key `prompt`; the output is JSON lines with the keys `prompt` and "
    file += "`text`"
    add_option(source, "--prompts-file FILE", file, Path)
    batch = "continue this many texts of --prompts-file at a time"
    add_option(parser, "--batch-size N", batch, ranges.COUNT, default=8)
    length = "stop after this many new tokens, or at the end of the text"
    add_option(parser, "--max-new-tokens N", length, ranges.COUNT, default=64)
    divisor = "divide logits by this before a token is drawn; 0 takes the most probable token"
    add_option(parser, "--temperature T", divisor, ranges.TEMPERATURE, default=0.8)
    add_option(parser, "--top-k K", "draw among the K most probable tokens; 0: all", ranges.NUMBER, default=50)
    add_seed_argument(parser, "the drawing", default=1234)
    add_option(parser, "--output FILE", "also write the text to this file", Path)
    add_force_argument(parser)
    group = parser.add_argument_group("checkpoints of Megatron")
    step = "iteration of a run's checkpoints to read, as Megatron's flag (default: the newest, if undamaged)"
    add_option(group, "--ckpt-step I", step, ranges.NUMBER)
    add_option(group, "--tokenizer-type T", "type of the tokenizer (default: the checkpoint's)")
    add_option(group, "--tokenizer-model F", "file of the tokenizer of training (default: the checkpoint's)")
    add_option(group, "--routing-mask F", "routing mask for a checkpoint that holds none", Path)
    return parser.parse_args()


def main() -> None:
    """Print each prompt with its continuation, which is computed on a GPU if there is one.

    Raises:
        UserError: The model, its tokenizer or the file of prompts is missing or damaged, a prompt is empty or too long
            for the model, or a number is out of range.
    """
    arguments = parse_arguments()
    check_folder(arguments.load, "--load")
    if arguments.output is not None:
        paths = (arguments.load, arguments.prompts_file, arguments.tokenizer_model, arguments.routing_mask)
        check_outputs([arguments.output], [Path(path) for path in paths if path is not None], arguments.force)
    if arguments.prompts_file is not None:
        prompts = read_prompts(arguments.prompts_file)
    else:
        refuse_surrogates(arguments.prompt, "--prompt")
        prompts = [arguments.prompt]

    with exported_folder(arguments) as folder:
        # Only now, since these imports take seconds and `--help` does not need them.
        from transformers import set_seed

        from maskmoe.conversion.model_files import load_exported_model, load_exported_tokenizer

        say_loading("reading the model")
        tokenizer = load_exported_tokenizer(folder)
        if tokenizer is None:
            raise UserError(f"--load {arguments.load} has no tokenizer: give the tokenizer of training")
        model = load_exported_model(folder)
    continuation = Continuation(arguments, tokenizer, model)
    set_seed(arguments.seed)
    batches = [*batched(map(continuation.token_ids, prompts), arguments.batch_size)]
    progress = tqdm(batches, desc="generating", unit="batch", disable=len(batches) == 1)
    texts = [text for batch in progress for text in continuation.of(batch)]
    if arguments.prompts_file is not None:
        results = ({_KEY: prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True))
        texts = [json.dumps(result, ensure_ascii=False) for result in results]
    output = "\n".join(texts)
    if arguments.output is not None:
        write_text(arguments.output, output + "\n")
    print(output)  # last, since nobody may read it: `| head`


def read_prompts(path: Path) -> list[str]:
    """Return the texts in the key `prompt` of a file of JSON lines. Raises UserError."""
    blocks = read_blocks(find_inputs([path], "jsonl"), [_KEY])
    return [prompt for block in blocks for prompt in block.documents([_KEY])[0]]


@contextmanager
def exported_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of the model in transformers' format, a temporary folder for a checkpoint of Megatron.

    Raises:
        UserError: The checkpoint is missing or damaged, or transformers cannot express its model; or flags for
            checkpoints are given along with an exported model.
    """
    of_checkpoint = ("ckpt_step", "tokenizer_type", "tokenizer_model", "routing_mask")
    given = {name: value for name in of_checkpoint if (value := getattr(arguments, name)) is not None}
    if (arguments.load / CONFIG_FILE).is_file():
        if given:
            flag = f"--{next(iter(given)).replace('_', '-')}"
            raise UserError(f"{flag} is for checkpoints of Megatron, but --load {arguments.load} is an exported model")
        say_loading("checking the files of the model")
        check_seal(arguments.load)
        say_loading("importing PyTorch and transformers")
        yield arguments.load
        return
    say_loading("importing PyTorch and Megatron-Core")
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from maskmoe.checkpoint.read_routing_mask import read_routing_mask
    from maskmoe.conversion.convert import temporary_export

    mask = given.pop("routing_mask", None)
    with temporary_export(arguments.load, mask and read_routing_mask(mask), **given) as folder:
        yield folder


class Continuation:
    """Continues texts with a model of transformers.

    Args:
        arguments: The arguments of the command line.
        tokenizer: The model's tokenizer.
        model: The model.
    """

    def __init__(self, arguments: argparse.Namespace, tokenizer: Any, model: Any) -> None:
        from transformers import GenerationConfig

        self._tokenizer, self._model = tokenizer, model
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._ends = {*ends}
        # Other settings of the folder do not fit the arguments, or not even transformers.
        model.generation_config = GenerationConfig(eos_token_id=ends or None)
        self._options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
        if arguments.temperature >= _MIN_TEMPERATURE:
            self._options |= {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}

    def token_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, at least one.

        Raises:
            UserError: The prompt has no token, or the text would be longer than the model's positions.
        """
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        if not ids:
            raise UserError("the prompt is empty")
        num_new = self._options["max_new_tokens"]
        positions = getattr(self._model.config, "max_position_embeddings", None)  # not every model has a limit
        if positions is not None and len(ids) + num_new > positions:
            raise UserError(
                f"{len(ids)} prompt tokens and {num_new} new ones exceed the model's {positions} positions; "
                "shorten the prompt or lower --max-new-tokens"
            )
        return ids

    def of(self, prompts: Sequence[list[int]]) -> list[str]:
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
