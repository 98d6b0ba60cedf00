"""Models on Transformer Engine's modules: the stub in every run, the real modules with `tests/run.sh --te`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from support.foreign_models import random_ids, save_model
from support.launchers import RANK_SCRIPTS, RunRanks
from support.megatron_models import load_converted_model, logits_of_megatron, save_as_release
from support.ranks.transformer_engine_ranks import IDS, LAYOUTS, SAVED, Described, build_model, describe

from maskmoe.conversion.convert import huggingface_to_megatron
from maskmoe.conversion.megatron_models import open_megatron
from maskmoe.conversion.settings import Settings
from maskmoe.conversion.tensor_sources import Block

# Together, the models have shared experts with a gate, dense layers, biases, norms of each head or of all heads, and
# multi-latent attention.
MODELS = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
ROUNDING = 1e-4  # as in `test_families_in_megatron`


@dataclass(frozen=True)
class Built:
    """The results of a process with Transformer Engine.

    Attributes:
        layouts: descriptions of the models by the name of the layout.
        folder: holds a folder for each of `MODELS`.
        computes: whether the modules compute on the CPU.
    """

    layouts: dict[str, Described]
    folder: Path
    computes: bool


@pytest.fixture(scope="module", params=["stub", pytest.param("installed", marks=pytest.mark.te)])
def built(request, run_ranks: RunRanks, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param)
    torch.save(random_ids(), folder / "ids.pt")
    for name in MODELS:
        save_model(name, folder / name / "original")
        flags = huggingface_to_megatron(Settings(load=folder / name / "original", save=folder / name / "converted"))
        (folder / name / "flags.json").write_text(json.dumps(flags))
        save_as_release(*load_converted_model(folder / name / "converted", flags), folder / name / "local")
    run_ranks(RANK_SCRIPTS / "transformer_engine_ranks.py", folder, request.param, world_size=1, are_preloaded=False)
    layouts = json.loads((folder / "layouts.json").read_text())
    return Built({name: Described(**values) for name, values in layouts.items()}, folder, request.param == "stub")


def parameter_on_transformer_engine(name: str, local: Described) -> str:
    """Return the name of a local model's parameter on Transformer Engine, which fuses norms and groups experts."""
    if any("linear_kv_up_proj" in other for other in local.parameters):
        has_up_projection = any("linear_q_up_proj" in other for other in local.parameters)
        name = name.replace(
            ".q_layernorm.", f".{'linear_q_up_proj' if has_up_projection else 'linear_q_proj'}.layer_norm_"
        )
        name = name.replace(".kv_layernorm.", ".linear_kv_up_proj.layer_norm_")
    else:
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    layer, _, rest = name.partition("pre_mlp_layernorm.")
    if rest and f"{layer}mlp.router.weight" not in local.parameters:
        name = f"{layer}mlp.linear_fc1.layer_norm_{rest}"
    return name


def tensor_on_transformer_engine(name: str, local: Described) -> str:
    """Return the name of a local checkpoint's tensor in a checkpoint of Transformer Engine."""
    layer, _, rest = name.partition("mlp.linear_fc1.layer_norm_")
    return f"{layer}pre_mlp_layernorm.{rest}" if rest and f"{layer}mlp.router.weight" in local.tensors else name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_equal_the_local_models(layout: str, built: Built, one_rank: None) -> None:
    local, found = describe(build_model(layout, "local")), built.layouts[layout]
    expected = {parameter_on_transformer_engine(name, local): shape for name, shape in local.parameters.items()}
    if LAYOUTS[layout].get("moe_grouped_gemm"):
        one_by_one = r"local_experts\.(\d+)\.(linear_fc.)\.weight"
        expected = {re.sub(one_by_one, r"\2.weight\1", name): shape for name, shape in expected.items()}
    assert found.parameters == expected
    assert found.tensors == {tensor_on_transformer_engine(name, local): shape for name, shape in local.tensors.items()}
    # Only Transformer Engine's norms have a state of FP8.
    further = set(found.objects) - set(local.objects)
    assert set(local.objects) <= set(found.objects)
    assert all(re.search(r"(norm)\._extra_state/", name) for name in further), further


@pytest.mark.parametrize("layout", SAVED)
def test_local_models_load_checkpoints_and_compute_the_same(layout: str, built: Built, one_rank: None) -> None:
    local = build_model(layout, "local").eval()
    # The state of FP8, which is empty, is in the local model's checkpoint, too, unless it belongs to a norm.
    local.load_state_dict(dist_checkpointing.load(local.sharded_state_dict(), str(built.folder / layout / "saved")))
    if built.computes:
        logits = torch.load(built.folder / layout / "logits.pt")
        torch.testing.assert_close(logits, logits_of_megatron(local, IDS), atol=ROUNDING, rtol=0)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint in transformers' format, which is the same for all modules."""
    source = open_megatron(checkpoint).source
    return {name: source.read(Block.whole(name, spec.shape)) for name, spec in source.tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_are_exchanged_with_local_models(name: str, built: Built, one_rank: None) -> None:
    """A converted and a local checkpoint are loaded and saved with Transformer Engine, and the result by local modules.

    All of these checkpoints hold the same tensors.
    """
    folder = built.folder / name
    local, _ = load_converted_model(folder / "local_again", json.loads((folder / "flags.json").read_text()))
    expected = tensors_of(folder / "local" / "release")
    for again in ("converted_again", "local_again"):
        found = tensors_of(folder / again / "release")
        assert found.keys() == expected.keys()
        for tensor_name, tensor in expected.items():
            assert torch.equal(found[tensor_name], tensor), tensor_name
    original, _ = load_converted_model(folder / "local", json.loads((folder / "flags.json").read_text()))
    for (parameter_name, parameter), found in zip(original.named_parameters(), local.parameters(), strict=True):
        assert torch.equal(found, parameter), parameter_name
    if built.computes:
        logits = torch.load(folder / "logits.pt")
        torch.testing.assert_close(logits, logits_of_megatron(local, random_ids()), atol=ROUNDING, rtol=0)


@pytest.mark.te
def test_fused_permutation_takes_0_to_3_experts_per_token(run_ranks: RunRanks, tmp_path: Path) -> None:
    run_ranks(RANK_SCRIPTS / "triton_permutation_ranks.py", tmp_path, world_size=1, are_preloaded=False)
    results = torch.load(tmp_path / "results.pt")
    hidden, routing_map, probs = results["hidden"], results["routing_map"], results["probs"]
    # Rows are ordered by expert, then by token.
    experts, tokens = routing_map.t().nonzero(as_tuple=True)
    assert torch.equal(results["rows"], hidden[tokens])
    assert torch.equal(results["row_probs"], probs[tokens, experts])
    assert torch.equal(results["unpermuted_probs"], probs)
    # The sum of up to three equal rows is rounded twice.
    torch.testing.assert_close(results["sums"], hidden * routing_map.sum(dim=1, keepdim=True), rtol=1e-6, atol=0)
    for unsorted, found in (("rows", "sorted_rows"), ("row_probs", "sorted_probs")):
        chunks = results[unsorted].split(results["sizes"].tolist())
        assert torch.equal(results[found], torch.cat([chunks[index] for index in results["order"].tolist()]))
