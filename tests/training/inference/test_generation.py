"""Generation from a checkpoint as real processes."""

import json
import shlex
from argparse import Namespace

import pytest
import torch

from maskmoe.errors import UserError
from maskmoe.training.inference import generation
from maskmoe.training.inference.generation import check_generation, sample_next_token

SETTINGS = "--use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size 510 --max-new-tokens 6"


@pytest.fixture(scope="module")
def generate(workplace, start_by_name):
    """Continue the ids "1 2 3" with the checkpoint of a run; return the outcome and the text, if any."""

    def generate(name: str, flags: str, ranks: int = 1, run: str = "start") -> tuple:
        checkpoints = start_by_name(run).result().checkpoints
        folder = workplace.folder / "samples" / name
        folder.mkdir(parents=True)
        output = folder / "sample.txt"
        program = ["-m", "maskmoe.training.generate", "--load", str(checkpoints), "--prompt", "1 2 3"]
        program += ["--output", str(output), *shlex.split(f"{SETTINGS} {flags}")]
        outcome = workplace.execute(program, folder, ranks)
        return outcome, output.read_text() if output.exists() else None

    return generate


def test_continues_the_prompt_alike_on_one_rank_and_two(generate):
    outcome, text = generate("one", "--temperature 0")
    _, text_of_two = generate("two", "--temperature 0 --expert-model-parallel-size 2", ranks=2)

    assert not any(outcome.exit_codes), outcome.report()
    assert text.startswith("1 2 3 ")
    assert len(text.split()) <= 9
    assert text == text_of_two
    assert text in (outcome.folder / "out0.log").read_text()


@pytest.mark.slow
def test_continues_the_prompt_with_latent_attention(generate):
    outcome, text = generate("latent", "--temperature 0", run="latent")
    assert not any(outcome.exit_codes), outcome.report()
    assert text.startswith("1 2 3 ")


@pytest.mark.slow
def test_seed_decides_the_sample(generate):
    texts = [generate(name, f"--seed {seed}")[1] for name, seed in (("a", 1), ("b", 1), ("c", 2))]

    assert texts[0] == texts[1] != texts[2]


SOUND = {
    "pipeline_model_parallel_size": 1,
    "sequence_parallel": False,
    "context_parallel_size": 1,
    "prompts_file": None,
    "prompts_per_batch": 8,
    "moe_expert_capacity_factor": 1.0,
}


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("pipeline_model_parallel_size", 2, "pipelines"),
        ("sequence_parallel", True, "split sequences"),
        ("context_parallel_size", 2, "split sequences"),
        ("prompts_file", "prompts.txt", "use --batch-size 1"),
    ],
)
def test_bad_settings_are_refused(setting, value, message):
    check_generation(Namespace(**SOUND))
    check_generation(Namespace(**SOUND | {"prompts_file": "prompts.txt", "prompts_per_batch": 1}))
    with pytest.raises(UserError, match=message):
        check_generation(Namespace(**SOUND | {setting: value}))


# The smallest temperature takes the most probable token, too.
@pytest.mark.parametrize(
    ("temperature", "top_k", "drawn"), [(0, 0, {1}), (1e-42, 0, {1}), (5, 2, {1, 3}), (5, 0, {0, 1, 2, 3})]
)
def test_drawn_tokens(temperature, top_k, drawn):
    logits, generator = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    found = {sample_next_token(logits, temperature, top_k, generator).item() for _ in range(500)}
    assert found == drawn


class Follower(torch.nn.Module):
    """A causal model whose next token depends on the sum and the length of all tokens so far."""

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor, mask: None) -> torch.Tensor:
        next_ids = (7 * tokens.cumsum(dim=1) + 3 * position_ids) % 50
        return torch.nn.functional.one_hot(next_ids, 64).float()


@pytest.fixture
def continue_prompts(one_rank, monkeypatch):
    """Return `generate` with the model `Follower`, whose texts end with the token 49."""
    monkeypatch.setattr(generation, "get_tokenizer", lambda: Namespace(vocab_size=50, eod=49))

    def continue_prompts(prompts: list[list[int]], temperature: float) -> list[list[int]]:
        args = Namespace(max_new_tokens=9, temperature=temperature, top_k=5, seed=1, rank=1)
        return generation.generate(args, Follower(), prompts)

    return continue_prompts


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_texts_of_a_batch_equal_single_texts(continue_prompts, temperature):
    prompts = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10], [48, 1]]
    texts = continue_prompts(prompts, temperature)
    assert texts == [text for prompt in prompts for text in continue_prompts([prompt], temperature)]
    assert all(text[: len(prompt)] == prompt for text, prompt in zip(texts, prompts, strict=True))
    assert len({len(text) - len(prompt) for text, prompt in zip(texts, prompts, strict=True)}) > 1 or temperature


@pytest.mark.slow
def test_prompts_of_a_file(workplace, start_by_name):
    checkpoints = start_by_name("start").result().checkpoints
    folder = workplace.folder / "samples" / "prompts"
    folder.mkdir(parents=True)
    (folder / "prompts.txt").write_text("1 2 3\n4\n5 6 7 8 9\n")
    load = [*shlex.split(f"--load {checkpoints} {SETTINGS} --temperature 0")]
    outcome = workplace.execute(
        ["-m", "maskmoe.training.generate", *load, "--prompts-file", str(folder / "prompts.txt")], folder
    )
    assert not any(outcome.exit_codes), outcome.report()
    lines = (folder / "out0.log").read_text().splitlines()
    of_file = {record["prompt"]: record["text"] for record in map(json.loads, (s for s in lines if s.startswith("{")))}
    assert [*of_file] == ["1 2 3", "4", "5 6 7 8 9"]
