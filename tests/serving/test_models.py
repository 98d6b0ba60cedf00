"""vLLM computes exported models as transformers does: log-probabilities to 1e-4 and equal greedy continuations."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.tiny_maskmoe import (
    SERVED_SETTINGS,
    ServedAnswer,
    make_served_model,
    random_prompts,
    save_model,
    transformers_answer,
)

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3000)]

PROMPTS = random_prompts(8, longest=40)
MAX_TOKENS = 16
WITHOUT_TENSOR_PARALLEL = {"all_heads_norm", "latent_attention", "latent_keys_and_values"}
"""Settings that vLLM cannot divide among ranks of tensor parallelism."""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of models by setting."""
    root = tmp_path_factory.mktemp("models")
    return {setting: save_model(make_served_model(setting), root / setting) for setting in SERVED_SETTINGS}


@pytest.fixture(scope="session")
def expected() -> Callable[[str], list[ServedAnswer]]:
    """Return a function from a setting to transformers' answers to `PROMPTS`."""

    def answers(setting: str) -> list[ServedAnswer]:
        model = make_served_model(setting)
        return [transformers_answer(model, prompt, MAX_TOKENS) for prompt in PROMPTS]

    return answers


@pytest.fixture(scope="session")
def answers(answer_with_vllm, models) -> Callable[..., dict[str, Any]]:
    """Return a function from options of vLLM to its answers to `PROMPTS`, in one batch, by setting."""
    known: dict[str, dict[str, Any]] = {}

    def answer(**options: Any) -> dict[str, Any]:
        if (key := str(options)) not in known:
            known[key] = answer_with_vllm(models, PROMPTS, MAX_TOKENS, **options)
        return known[key]

    return answer


def difference(actual: list[dict], expected: list[ServedAnswer]) -> float:
    """The largest difference of log-probabilities; infinite if a continuation differs."""
    largest = 0.0
    for one, other in zip(actual, expected, strict=True):
        if one["tokens"] != other.tokens:
            return float("inf")
        pairs = zip(one["logprobs"], other.logprobs, strict=True)
        largest = max(largest, *(abs(ours - theirs) for ours, theirs in pairs))
    return largest


@pytest.mark.parametrize("setting", SERVED_SETTINGS)
def test_vllm_answers_as_transformers(setting, answers, expected) -> None:
    found = answers()[setting]
    assert not isinstance(found, str), found
    assert difference(found, expected(setting)) < 1e-4


@pytest.mark.parametrize("setting", SERVED_SETTINGS)
def test_tensor_parallel_vllm_answers_as_transformers(setting, answers, expected) -> None:
    found = answers(tensor_parallel_size=2)[setting]
    if setting in WITHOUT_TENSOR_PARALLEL:
        assert isinstance(found, str)  # refused, not computed wrongly
        return
    assert not isinstance(found, str), found
    assert difference(found, expected(setting)) < 1e-4


def test_pipeline_stages_answer_as_transformers(answer_with_vllm, models, expected) -> None:
    """Three stages of one layer, compiled, since vLLM's stages on CPUs need it; batches end within prompts."""
    chosen = {setting: models[setting] for setting in ("mixed", "tied")}
    options = {"pipeline_parallel_size": 3, "enforce_eager": False, "max_num_batched_tokens": 32}
    override = {"MaskMoEForCausalLM": "vllm_maskmoe:MaskMoEForCausalLM"}
    found = answer_with_vllm(chosen, PROMPTS, MAX_TOKENS, model_class_overrides=override, **options)
    for setting, answers in found.items():
        assert not isinstance(answers, str), answers
        assert difference(answers, expected(setting)) < 1e-4, setting


# ---- Faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def altered(models, tmp_path) -> Path:
    """A copy of the model "mixed" to alter."""
    return shutil.copytree(models["mixed"], tmp_path / "altered")


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_model_without_its_mask_is_refused(answer_with_vllm, altered, eager) -> None:
    """tests/huggingface/test_guards.py has more masks that are incomplete or altered."""
    tensors = load_file(altered / "model.safetensors")
    del tensors["model.routing_mask.visible_bits"]
    save_file(tensors, altered / "model.safetensors", {"format": "pt"})
    found = answer_with_vllm({"altered": altered}, PROMPTS, MAX_TOKENS, enforce_eager=eager)["altered"]
    assert isinstance(found, str)
    assert "the routing mask was never loaded" in found


def test_a_model_whose_router_vllm_replaces_does_not_run(run_script, models) -> None:
    """If vLLM took the router for one that it knows, the router would get no ids."""
    process = run_script("replace_routers.py", models["mixed"])
    assert process.returncode == 0, process.stdout[-3000:]
