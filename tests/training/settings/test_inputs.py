"""Runs with `--change-routing-mask` continue with another routing mask; the datasets of a run are checked."""

from argparse import Namespace
from itertools import product
from unittest.mock import Mock

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig
from support.datasets import frequency_of, write_documents
from support.system import few_open_files
from support.training import TrainingOutcome

from maskmoe.checkpoint.read_routing_mask import read_routing_mask
from maskmoe.checkpoint.series import checkpoint_path, locate_checkpoint
from maskmoe.command_line.build_routing_mask import read_mask
from maskmoe.data.indexed_dataset import DatasetIndex, read_index
from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.settings import inputs
from maskmoe.training.settings.inputs import data_errors, find_routing_mask

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


def output_of(run: TrainingOutcome) -> str:
    """Return what all ranks of a run wrote to stdout."""
    return "".join(log.read_text() for log in run.folder.glob("out*.log"))


def masks_of(workplace, *names: str) -> list[RoutingMask]:
    return [RoutingMask.load(workplace.folder / f"{name}.safetensors") for name in names]


@pytest.mark.runs("wider mask", "wider mask, reference", "fp32")
def test_losses_are_those_of_the_new_mask_with_the_weights_of_the_checkpoint(runs):
    """The reference puts the new mask's tables into the model that was loaded with the old mask."""
    changed, reference, unchanged = runs
    assert changed.iterations == reference.iterations == [8, 9, 10]
    assert changed.difference(reference) == 0
    assert changed.difference(unchanged, ["lm loss"]) > 50 * FP32_ORDER_OF_SUMS


@pytest.mark.runs(
    "Megatron's own model",
    "Megatron's own model, continued with its mask",
    "Megatron's own model, continued from ours",
)
def test_megatrons_own_model_continues_with_its_mask_and_back(runs, workplace):
    """Where Megatron-Core has hash layers, the first two MoE layers are hash layers."""
    megatrons, ours, back = runs
    (mask,) = masks_of(workplace, "megatrons")
    assert ours.iterations == [8, 9, 10]
    assert back.iterations == [11, 12]
    for run in (ours, back):
        assert run.difference(megatrons, ["lm loss", "grad-norm"]) < FP32_ORDER_OF_SUMS
    assert read_routing_mask(checkpoint_path(ours.checkpoints, 10)).digest == mask.digest
    with pytest.raises(UserError, match="holds no routing mask"):
        read_routing_mask(checkpoint_path(megatrons.checkpoints, 7))


@pytest.mark.runs("Megatron's own model")
def test_megatrons_own_model_continues_only_on_purpose(runs, workplace):
    (megatrons,) = runs
    args = Namespace(
        num_experts=8,
        skip_train=False,
        change_routing_mask=False,
        routing_mask=workplace.folder / "hash_layers.safetensors",
        hybrid_layer_pattern="*E*E*E*E",
        moe_router_score_function="softmax",
        moe_router_topk=1,
    )
    checkpoint = checkpoint_path(megatrons.checkpoints, 7)
    with pytest.raises(UserError, match=r"holds no routing mask.*pass --change-routing-mask"):
        find_routing_mask(args, checkpoint, print)
    args.change_routing_mask = True
    if hasattr(TransformerConfig, "moe_n_hash_layers"):
        with pytest.raises(UserError, match="whose softmax is over all experts"):
            find_routing_mask(args, checkpoint, print)
    else:
        lines = []
        find_routing_mask(args, checkpoint, lines.append)
        assert "none in the checkpoint → " in lines[0]


@pytest.mark.runs("wider mask")
def test_start_reports_the_change_once(runs, workplace):
    (changed,) = runs
    old, new = masks_of(workplace, "mask", "wider")
    (line,) = [line for line in output_of(changed).splitlines() if line.startswith("note: routing mask: ")]
    assert line == f"note: routing mask: {old.digest[:16]}… of the checkpoint → {new.digest[:16]}…"


@pytest.mark.runs("wider mask", "fp32")
def test_later_checkpoints_hold_the_new_mask(runs, workplace):
    changed, unchanged = runs
    old, new = masks_of(workplace, "mask", "wider")
    for run, iteration, mask in ((unchanged, 7, old), (changed, 8, new), (changed, 10, new)):
        saved = read_routing_mask(checkpoint_path(run.checkpoints, iteration))
        assert saved.digest == mask.digest
        assert (saved.visible_bits == mask.visible_bits).all()
    assert read_mask(changed.checkpoints).digest == new.digest


def arguments(mask: object, **further: object) -> Namespace:
    settings = {"change_routing_mask": False, "skip_train": False, "moe_router_topk": 1} | further
    return Namespace(routing_mask=mask, num_experts=8, expert_model_parallel_size=2, **settings)


@pytest.mark.runs("wider mask", "fp32")
def test_other_mask_is_refused_unless_the_flag_is_given(runs, workplace):
    changed, unchanged = runs
    old, new = masks_of(workplace, "mask", "wider")
    for run, given, own in ((changed, old, "mask"), (unchanged, new, "wider")):
        args = arguments(workplace.folder / f"{own}.safetensors")
        with pytest.raises(UserError, match=r"or leave --routing-mask out .*; pass --change-routing-mask to change"):
            find_routing_mask(args, locate_checkpoint(run.checkpoints), pytest.fail)
        args.change_routing_mask = True
        reports = []
        assert find_routing_mask(args, locate_checkpoint(run.checkpoints), reports.append).digest == given.digest
        assert " of the checkpoint → " in reports[0]
        # Evaluation and generation have no such flag, so their error does not name the flag.
        args.change_routing_mask, args.skip_train = False, True
        with pytest.raises(UserError, match=r"to use it$"):
            find_routing_mask(args, locate_checkpoint(run.checkpoints), pytest.fail)


@pytest.mark.parametrize(
    ("settings", "is_reported"),
    [
        ({"topk": 1}, True),
        ({"topk": 2}, False),
        ({"assignment": "uniform"}, False),
    ],
)
def test_mask_for_another_topk_is_reported(tmp_path, settings, is_reported):
    defaults = {"assignment": "balanced", "frequent_mass": 0.4, "frequent_visible_experts": 2}
    recipe = MaskRecipe(8, 1, **defaults | settings)
    build_routing_mask(recipe, frequency=frequency_of([9, 5, 3, 1, 1])).save(tmp_path / "mask")
    reports = []
    find_routing_mask(arguments(tmp_path / "mask", moe_router_topk=2), None, reports.append)
    assert [line for line in reports if "balances the load of the experts at top-1" in line] == reports
    assert bool(reports) == is_reported


@pytest.mark.runs("wider mask")
def test_flag_changes_nothing_if_the_masks_are_equal(runs, workplace):
    (changed,) = runs
    for checkpoint in (locate_checkpoint(changed.checkpoints), None):
        reports = []
        args = arguments(workplace.folder / "wider.safetensors", change_routing_mask=True)
        find_routing_mask(args, checkpoint, reports.append)
        assert len(reports) == 1
        assert "--change-routing-mask changes nothing" in reports[0]


@pytest.mark.slow
@pytest.mark.runs("dispatch without plans, on 1", "dispatch without plans")
def test_change_agrees_between_layouts(runs):
    """Dispatch is planned before the change and not after the change."""
    reference, run = runs
    assert run.iterations == reference.iterations
    assert run.difference(reference) < FP32_ORDER_OF_SUMS
    assert output_of(run).count("routing mask: ") == 1  # only the first rank prints the line


# ---- Datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def args(tmp_path) -> Namespace:
    """The arguments of a run with 40 datasets of ten documents."""
    for number in range(40):
        write_documents(tmp_path / str(number), [range(3)] * 10)
    paths = dict.fromkeys(("train_data_path", "valid_data_path", "test_data_path"))
    files = dict.fromkeys(("data_args_path", "per_split_data_args_path", "data_cache_path"))
    lengths = {"seq_length": 2, "eval_iters": 1, "fim_data": False}
    data_path = [str(tmp_path / str(number)) for number in range(40)]
    return Namespace(**paths, **files, **lengths, data_path=data_path, split="9,1,0", mock_data=False, skip_train=False)


def test_few_files_are_open_at_a_time(args):
    with few_open_files():
        assert list(data_errors(args, None, 10)) == []


def test_every_dataset_has_all_parts(args):
    args.split = "8,1,1"
    write_documents(args.data_path[-1], [range(3)])
    error, _ = data_errors(args, None, 10)
    assert error.startswith(f"dataset {args.data_path[-1]}: --split 8,1,1 leaves the validation part no tokens")


def test_documents_end_with_the_id_that_flags_look_for(args, monkeypatch):
    """Two settings beside one `tokenizer.json`, of a base model and of a chat model, can name different ids."""
    made_with = TokenizerRecord("HuggingFaceTokenizer", "tokenizer.json", "0" * 64, 10, 3)
    args.data_path = args.data_path[:1]
    write_documents(args.data_path[0], [range(4)] * 10, tokenizer=made_with)
    args.tokenizer_sha256, args.tokenizer_model = made_with.sha256, "chat"
    flags = dict.fromkeys(("eod_mask_loss", "reset_attention_mask", "reset_position_ids", "fim_data"), False)
    for flag, eod_id in product((None, *flags), (3, 4, None)):
        monkeypatch.setattr(inputs, "get_tokenizer", lambda: Namespace(eod=eod_id))  # noqa: B023 - called in this turn
        vars(args).update(flags | ({} if flag is None else {flag: True}))
        errors = list(data_errors(args, None, 10))
        assert len(errors) == (flag is not None and eod_id != 3)
        assert all(f"now names id {eod_id}, which --eod-mask-loss" in error for error in errors)


def test_counted_dataset_is_not_read(tmp_path, args, monkeypatch):
    args.data_path = args.data_path[:1]
    index = read_index(args.data_path[0])
    dataset = {"idx_sha256": index.idx_sha256, "bin_bytes": index.bin_bytes}
    mask = Namespace(provenance=Namespace(datasets=(dataset,)))
    monkeypatch.setattr(DatasetIndex, "map_tokens", Mock(side_effect=AssertionError))
    assert list(data_errors(args, mask, 3)) == []


def test_ranks_share_the_datasets_and_nodes_share_the_token_ids(tmp_path, args, monkeypatch):
    monkeypatch.setattr(inputs, "_CHUNK_TOKENS", 10)
    (tmp_path / "2.idx").unlink()
    (tmp_path / "1.bin").write_bytes(29 * b"\0\0" + b"\xff\xff")  # in the third chunk
    for (rank, node), message in {
        (0, 0): "2.idx does not exist",
        (0, 1): "2.idx does not exist",
        (1, 0): "1 holds token id 65535 at position 29",
        (1, 1): "",
    }.items():
        variables = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": node, "GROUP_WORLD_SIZE": 2}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        errors = list(data_errors(args, None, 10))
        assert len(errors) == bool(message)
        assert all(message in error for error in errors)


def test_index_is_not_hashed_if_no_counted_dataset_has_its_size(args, monkeypatch):
    monkeypatch.setattr(DatasetIndex, "idx_sha256", property(Mock(side_effect=AssertionError)))
    mask = Namespace(provenance=Namespace(datasets=({"idx_sha256": "0" * 64, "bin_bytes": 2},)))
    assert list(data_errors(args, mask, 10)) == []
