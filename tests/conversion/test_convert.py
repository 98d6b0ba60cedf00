"""Conversions of whole models in both directions, from any layout of ranks, and inputs that are refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from safetensors.torch import load_file, save_file
from support.converted_models import add_multi_token_prediction, save_model
from support.paths import ROOT
from support.small_moe import make_mask
from support.system import run_maskmoe
from support.tensors import assert_same_tensors, tensors_of
from support.tiny_maskmoe import NUM_EXPERTS, NUM_LAYERS, VOCAB_SIZE, make_config, make_model, random_mask
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskmoe.checkpoint.integrity import check_content, check_structure
from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.saved_names import saved_pattern
from maskmoe.checkpoint.series import checkpoint_path, write_tracker
from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface, upcycle_model
from maskmoe.conversion.megatron_models import COMMON_STATE, MARKER, write_torch_dist
from maskmoe.conversion.settings import Settings, UpcycleSettings
from maskmoe.conversion.tensor_sources import MemorySource
from maskmoe.conversion.tokenizer import export_tokenizer
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM

# Transformer Engine's modules load the norm before experts under this name; converted checkpoints hold it twice.
SECOND_NORM = re.compile(r"decoder\.layers\.(\d+\.)?pre_mlp_layernorm\.weight")


def contents_of(folder):
    """Return the content of each file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """Return a function from the name of a run to the folder of its model in transformers' format."""
    folder = tmp_path_factory.mktemp("exported")

    def export(run):
        save = folder / run
        if not save.exists():
            megatron_to_huggingface(Settings(load=checkpoints(run), save=save))
        return save

    return export


@pytest.mark.parametrize("run", [pytest.param("ranks", marks=pytest.mark.slow), "rich"])
def test_converting_back_restores_the_checkpoint(checkpoints, exported, run, tmp_path):
    huggingface_to_megatron(Settings(load=exported(run), save=tmp_path / "back", max_shard_size=20_000))
    release = tmp_path / "back" / "release"
    check_structure(release)
    check_content(release)
    assert (tmp_path / "back" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert len(list(release.glob("*.distcp"))) > 1
    original = checkpoint_path(checkpoints(run), 2)
    back = tensors_of(release)
    second_norms = {name: back.pop(name) for name in list(back) if SECOND_NORM.fullmatch(name)}
    assert_same_tensors(tensors_of(original), back)
    for name, tensor in second_norms.items():
        assert torch.equal(tensor, back[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")])
    assert read_routing_mask(release).digest == read_routing_mask(original).digest
    megatron_to_huggingface(Settings(load=tmp_path / "back", save=tmp_path / "again"))
    assert contents_of(tmp_path / "again") == contents_of(exported(run))


@pytest.mark.slow
def test_the_layout_of_ranks_does_not_matter(checkpoints, exported, tmp_path):
    """The same weights saved by four ranks (tensor, pipeline and expert parallel) and by one rank convert alike."""
    four = read_common_state(checkpoint_path(checkpoints("ranks"), 2))["args"]
    one = read_common_state(checkpoint_path(checkpoints("one rank"), 2))["args"]
    assert (four.world_size, four.tensor_model_parallel_size, four.expert_model_parallel_size) == (4, 2, 2)
    assert (one.world_size, one.tensor_model_parallel_size, one.expert_model_parallel_size) == (1, 1, 1)
    megatron_to_huggingface(Settings(load=checkpoints("one rank"), save=tmp_path / "one"))
    of_one, of_four = contents_of(tmp_path / "one"), contents_of(exported("ranks"))
    differing = {name for name in of_one | of_four if of_one.get(name) != of_four.get(name)}
    assert differing <= {"megatron/args.json", "megatron/padding.safetensors", "integrity.json"}
    assert of_one["model.safetensors"] == of_four["model.safetensors"]


def test_dtype(checkpoints, exported, tmp_path):
    megatron_to_huggingface(Settings(load=checkpoints("rich"), save=tmp_path / "bf16", dtype="bf16"))
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    original, cast = (load_file(folder / "model.safetensors") for folder in (exported("rich"), tmp_path / "bf16"))
    for name, tensor in original.items():
        is_kept = name.endswith("e_score_correction_bias") or not tensor.is_floating_point()
        expected = tensor if is_kept else tensor.bfloat16()
        assert cast[name].dtype == expected.dtype
        assert torch.equal(cast[name], expected)
    flags = huggingface_to_megatron(Settings(load=tmp_path / "bf16", save=tmp_path / "megatron"))
    assert "--bf16" in flags
    assert tensors_of(tmp_path / "megatron" / "release")["embedding.word_embeddings.weight"].dtype == torch.bfloat16


def rewrite(checkpoint, folder, change):
    """Write a copy of a checkpoint with changed tensors or a changed common state; return the copy."""
    tensors, common = tensors_of(checkpoint), read_common_state(checkpoint)
    change(tensors, common)
    write_torch_dist(MemorySource(tensors), {COMMON_STATE: [common]}, folder / "checkpoint", 10**9)
    (folder / "checkpoint" / "metadata.json").write_text(json.dumps(MARKER))
    return folder / "checkpoint"


ROUTER = "decoder.layers.mlp.router.weight"


def set_nan(tensors, common):
    tensors[ROUTER] = torch.full_like(tensors[ROUTER], float("nan"))


def remove_mask(tensors, common):
    for name in ("row_of_id", "visible_bits", "metadata"):
        del tensors[f"routing_mask.{name}"]


WRONG_CHECKPOINTS = {
    "missing": (lambda tensors, common: tensors.pop(ROUTER), rf"lacks {re.escape(ROUTER)}$"),
    "no embedding": (lambda tensors, common: tensors.pop("embedding.word_embeddings.weight"), r"lacks embedding"),
    "unexpected": (lambda tensors, common: tensors.update(more=torch.ones(1)), r"do not account for: more$"),
    "shape": (
        lambda tensors, common: tensors.update({ROUTER: tensors[ROUTER][:, :3]}),
        rf"{re.escape(ROUTER)} has the shape \[2, 3, 32\], it should have \[2, 4, 32\]",
    ),
    "nan": (set_nan, r"model\.layers\.0\.mlp\.gate\.weight holds NaN or infinite values; maskmoe convert --allow-nan"),
    "no mask": (remove_mask, "holds no routing mask; pass the one"),
    "altered mask": (lambda tensors, common: tensors["routing_mask.row_of_id"][0, 0].bitwise_xor_(1), "routing mask"),
    "no arguments": (lambda tensors, common: common.pop("args"), "holds no arguments of Megatron"),
    "setting": (
        lambda tensors, common: common.update(args=Namespace(**vars(common["args"]) | {"normalization": "LayerNorm"})),
        "a model with normalization LayerNorm cannot be expressed",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_CHECKPOINTS)
def test_wrong_checkpoint(checkpoints, tmp_path, wrong):
    change, message = WRONG_CHECKPOINTS[wrong]
    checkpoint = rewrite(checkpoint_path(checkpoints("ranks"), 2), tmp_path / "wrong", change)
    with pytest.raises(UserError, match=message) as error:
        megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_mask_and_nan_on_request(checkpoints, workplace, exported, tmp_path):
    original = checkpoint_path(checkpoints("ranks"), 2)
    mask = read_routing_mask(workplace / "mask.safetensors")
    without = rewrite(original, tmp_path / "without", remove_mask)
    megatron_to_huggingface(Settings(load=without, save=tmp_path / "out"), mask)
    assert contents_of(tmp_path / "out")["model.safetensors"] == contents_of(exported("ranks"))["model.safetensors"]
    with pytest.raises(UserError, match="holds a routing mask; leave --routing-mask out"):
        megatron_to_huggingface(Settings(load=original, save=tmp_path / "other"), mask)
    with pytest.raises(UserError, match="holds the routing mask that it was trained with"):
        huggingface_to_megatron(Settings(load=exported("ranks"), save=tmp_path / "other"), mask)
    nan = rewrite(original, tmp_path / "nan", set_nan)
    megatron_to_huggingface(Settings(load=nan, save=tmp_path / "with nan", allow_nan=True))
    assert load_file(tmp_path / "with nan" / "model.safetensors")["model.layers.1.mlp.gate.weight"].isnan().all()


ROWS, PADDED_ROWS, TOKENIZER_IDS = 310, 384, 300


@pytest.fixture
def dense(tmp_path):
    """The folder of a dense model in transformers' format, with a tokenizer of fewer ids than rows beside it."""
    dense = {"vocab_size": ROWS, "mlp_layer_types": ["dense"] * NUM_LAYERS, "bos_token_id": 1, "eos_token_id": [2, 5]}
    MaskMoEForCausalLM(make_config(**dense)).save_pretrained(tmp_path / "dense")
    text = ["sphinx of black quartz judge my vow "] * 20
    (tmp_path / "dense/tokenizer.model").write_bytes(train_tokenizer(text, TOKENIZER_IDS, num_threads=1))
    return tmp_path / "dense"


def test_tied_output_layer_that_was_saved_again_is_ignored(tmp_path):
    """FSDP gathers both tensors, and transformers saves both."""
    path = tmp_path / "tied" / "model.safetensors"
    dense = {"mlp_layer_types": ["dense"] * NUM_LAYERS, "tie_word_embeddings": True}
    MaskMoEForCausalLM(make_config(**dense)).save_pretrained(path.parent)
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    huggingface_to_megatron(Settings(load=path.parent, save=tmp_path / "run"))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


SENTENCEPIECE, NULL = "SentencePieceTokenizer", "NullTokenizer"


@pytest.mark.parametrize(
    ("trained_with", "vocab_size", "passed", "expected"),
    [
        (NULL, ROWS, None, ROWS),
        (NULL, ROWS, SENTENCEPIECE, ROWS),
        ("TikTokenizer", ROWS, NULL, ROWS),
        ("TikTokenizer", None, NULL, PADDED_ROWS),
        ("Llama2Tokenizer", ROWS, NULL, PADDED_ROWS),
        (SENTENCEPIECE, None, None, TOKENIZER_IDS),
        (SENTENCEPIECE, ROWS, None, TOKENIZER_IDS),
        (SENTENCEPIECE, None, NULL, PADDED_ROWS),
    ],
)
def test_vocabulary_of_a_dense_checkpoint(dense, tmp_path, trained_with, vocab_size, passed, expected):
    """Checkpoints of training do not say how many ids the model has, and some tokenizers ignore `--vocab-size`."""
    tokenizer = {"tokenizer_type": trained_with, "tokenizer_model": str(dense / "tokenizer.model")}

    def change(tensors, common):
        del common["huggingface_config"]
        common["args"] = Namespace(**vars(common["args"]) | tokenizer | {"vocab_size": vocab_size})

    huggingface_to_megatron(Settings(load=dense, save=tmp_path / "run"))
    checkpoint = rewrite(tmp_path / "run/release", tmp_path / "trained", change)
    model = tokenizer["tokenizer_model"] if passed == SENTENCEPIECE else None
    settings = Settings(load=checkpoint, save=tmp_path / "out", tokenizer_type=passed, tokenizer_model=model)
    megatron_to_huggingface(settings)
    assert config_of(tmp_path / "out")["vocab_size"] == expected
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].shape[0] == expected


@pytest.mark.parametrize(
    ("tokenizer_type", "ends", "expected"),
    [(NULL, 2, (1, 2)), (NULL, [2, 5], (1, [2, 5])), (SENTENCEPIECE, [2, 5], (2, [2, 5])), (SENTENCEPIECE, 5, (2, 2))],
)
def test_a_dense_model_keeps_its_rows_and_the_ids_that_begin_and_end_texts(
    dense, tmp_path, tokenizer_type, ends, expected
):
    """The model keeps rows without ids, as Qwen has them. Ids of the tokenizer replace those of the model."""
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((dense / name).read_text())
        (dense / name).write_text(json.dumps(settings | {"eos_token_id": ends}))
    model = str(dense / "tokenizer.model") if tokenizer_type == SENTENCEPIECE else None
    settings = Settings(load=dense, save=tmp_path / "run", tokenizer_type=tokenizer_type, tokenizer_model=model)
    huggingface_to_megatron(settings)
    megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "back"))
    assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "back")))
    generation = json.loads((tmp_path / "back/generation_config.json").read_text())
    for settings in (config_of(tmp_path / "back"), generation):
        assert (settings["bos_token_id"], settings["eos_token_id"]) == expected


@pytest.mark.parametrize(("ends", "expected"), [([2, 5], [2, 5]), ([5, 7], 2)])
def test_ends_of_texts_survive_training(dense, tmp_path, ends, expected):
    """They are in the folder of the tokenizer, because a checkpoint of training has the arguments only."""
    export_tokenizer(SENTENCEPIECE, dense / "tokenizer.model", dense)
    (dense / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    huggingface_to_megatron(Settings(load=dense, save=tmp_path / "again"))
    shutil.rmtree(dense)
    checkpoint = rewrite(
        tmp_path / "again/release", tmp_path / "trained", lambda _, common: common.pop("huggingface_config")
    )
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out"))
    assert config_of(tmp_path / "out")["eos_token_id"] == expected


def test_a_dense_model_with_further_ids_returns_to_megatron(dense, tmp_path):
    tokenizer = {"tokenizer_type": SENTENCEPIECE, "tokenizer_model": str(dense / "tokenizer.model")}
    huggingface_to_megatron(Settings(load=dense, save=tmp_path / "run", **tokenizer))
    megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "model"))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokens.add_tokens([f"<{number}>" for number in range(PADDED_ROWS - TOKENIZER_IDS + 1)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(len(tokens))
    for saved in (model, tokens):
        saved.save_pretrained(tmp_path / "tuned")
    shutil.copytree(tmp_path / "model/megatron", tmp_path / "tuned/megatron")
    huggingface_to_megatron(Settings(load=tmp_path / "tuned", save=tmp_path / "back"))
    args = load_common_state_dict(tmp_path / "back/release")["args"]
    assert (args.padded_vocab_size, args.tokenizer_type) == (PADDED_ROWS + 128, "HuggingFaceTokenizer")
    megatron_to_huggingface(Settings(load=tmp_path / "back", save=tmp_path / "again"))
    assert_same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "again")))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")) == PADDED_ROWS + 1
    # The same ids in transformers' format. A type that the user chose stays.
    mask = make_mask(np.ones((NUM_LAYERS, PADDED_ROWS + 1, 2), bool))
    settings = Settings(load=tmp_path / "tuned", save=tmp_path / "experts")
    upcycle_model(settings, UpcycleSettings(num_experts=2), mask, to_megatron=False)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "experts")) == PADDED_ROWS + 1
    huggingface_to_megatron(Settings(load=tmp_path / "tuned", save=tmp_path / "typed", tokenizer_type=SENTENCEPIECE))
    assert load_common_state_dict(tmp_path / "typed/release")["args"].tokenizer_type == SENTENCEPIECE
    # A tokenizer with more ids than the model has rows does not replace the tokenizer of training.
    tokens.add_tokens("<one more>")
    tokens.save_pretrained(tmp_path / "tuned")
    huggingface_to_megatron(Settings(load=tmp_path / "tuned", save=tmp_path / "other"))
    assert load_common_state_dict(tmp_path / "other/release")["args"].tokenizer_type == SENTENCEPIECE


def test_multi_token_prediction_that_transformers_did_not_save_again(tmp_path):
    save_model("deepseek_v3", tmp_path / "original")
    add_multi_token_prediction(tmp_path / "original")
    huggingface_to_megatron(Settings(load=tmp_path / "original", save=tmp_path / "megatron"))
    megatron_to_huggingface(Settings(load=tmp_path / "megatron", save=tmp_path / "model", max_shard_size=20_000))
    assert any((tmp_path / "model" / "megatron").glob("mtp-00001-of-*.safetensors"))
    shutil.rmtree(tmp_path / "model" / "megatron")
    with pytest.raises(UserError, match=r"megatron/mtp\.safetensors does not exist$"):
        huggingface_to_megatron(Settings(load=tmp_path / "model", save=tmp_path / "back"))


def test_damaged_checkpoint(checkpoints, tmp_path):
    shutil.copytree(checkpoints("ranks"), tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", 2) / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"__1_0\.distcp does not have the content that was saved"):
        megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "out", verify=False))


def test_model_that_was_made_without_a_mask(tmp_path):
    """Its ids see all experts, in training as in transformers, unless it gets a mask."""
    MaskMoEForCausalLM(make_config()).save_pretrained(tmp_path / "made")
    huggingface_to_megatron(Settings(load=tmp_path / "made", save=tmp_path / "all"))
    assert read_routing_mask(tmp_path / "all").min_visible == NUM_EXPERTS
    mask = random_mask()
    huggingface_to_megatron(Settings(load=tmp_path / "made", save=tmp_path / "masked"), mask)
    assert read_routing_mask(tmp_path / "masked").digest == mask.digest
    megatron_to_huggingface(Settings(load=tmp_path / "all", save=tmp_path / "back"))
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("made", "back"))
    ids = torch.arange(VOCAB_SIZE)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    tensors["model.routing_mask.visible_bits"].fill_(1)
    save_file(tensors, tmp_path / "made" / "model.safetensors")
    with pytest.raises(UserError, match="the routing mask was altered or damaged"):
        huggingface_to_megatron(Settings(load=tmp_path / "made", save=tmp_path / "altered"))


@pytest.fixture(scope="module")
def with_args(tmp_path_factory):
    """The checkpoint of a tiny model, and its export with Megatron's arguments."""
    folder = tmp_path_factory.mktemp("args")
    make_model().save_pretrained(folder / "made")
    huggingface_to_megatron(Settings(load=folder / "made", save=folder / "run"))
    megatron_to_huggingface(Settings(load=folder / "run", save=folder / "exported"))
    return folder / "run" / "release", folder / "exported"


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_layer_pattern": None, "num_layers": "x"},
        {"rotary_base": None},
        {"hybrid_layer_pattern": None, "moe_layer_freq": 0},
        {"hybrid_layer_pattern": 5},
        {"moe_router_load_balancing_type": None},
    ],
    ids=str,
)
def test_arguments_of_wrong_values(with_args, tmp_path, changes):
    checkpoint, exported = with_args

    def change(tensors, common):
        common["args"] = Namespace(**vars(common["args"]) | changes)

    with pytest.raises(UserError) as refusal:
        megatron_to_huggingface(Settings(load=rewrite(checkpoint, tmp_path, change), save=tmp_path / "out"))
    assert "\n" not in str(refusal.value)
    args = json.loads((exported / "megatron/args.json").read_text())
    shutil.copytree(exported, tmp_path / "model")
    (tmp_path / "model/megatron/args.json").write_text(json.dumps(args | changes))
    with suppress(UserError):  # arguments of another model than the configuration's are replaced
        huggingface_to_megatron(Settings(load=tmp_path / "model", save=tmp_path / "out"))


def test_hybrid_model_of_an_earlier_version_of_megatron(with_args, tmp_path):
    def rename(tensors, common):
        args = common["args"]
        args.hybrid_override_pattern, args.hybrid_layer_pattern = args.hybrid_layer_pattern, None

    checkpoint = rewrite(with_args[0], tmp_path, rename)
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out"))
    assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (with_args[1], tmp_path / "out")))
    huggingface_to_megatron(Settings(load=tmp_path / "out", save=tmp_path / "gpt", hybrid_layer_pattern="none"))
    assert saved_pattern(load_common_state_dict(tmp_path / "gpt" / "release")["args"]) is None


def test_weights_that_are_integers(dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].int()}, dense / "model.safetensors")
    with pytest.raises(UserError, match=r"has weights that are not floating-point numbers: model\.norm\.weight$"):
        huggingface_to_megatron(Settings(load=dense, save=tmp_path / "run"))


def test_flags_that_a_transformers_model_does_not_take(dense, tmp_path):
    settings = Settings(load=dense, save=tmp_path / "out", tokenizer_model=str(dense / "tokenizer.model"))
    with pytest.raises(UserError, match=r"--tokenizer-model .*tokenizer\.model needs --tokenizer-type$"):
        huggingface_to_megatron(settings)
    (dense / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"^--tokenizer-type SentencePieceTokenizer needs --tokenizer-model$"):
        huggingface_to_megatron(Settings(load=dense, save=tmp_path / "out", tokenizer_type=SENTENCEPIECE))
    settings = Settings(load=dense, save=tmp_path / "out", ckpt_step=3)
    with pytest.raises(UserError, match=r"--ckpt-step 3 chooses a checkpoint, but .*dense is a model$"):
        upcycle_model(settings, UpcycleSettings(4), random_mask(), to_megatron=True)


def test_the_flags_that_load_the_result_can_be_pasted(dense, tmp_path):
    result = run_maskmoe("convert", "hf-to-megatron", "--load", dense, "--save", tmp_path / "my run")
    assert result.returncode == 0, result.stderr
    flags = shlex.split(result.stdout.splitlines()[-1])
    assert flags[:3] == ["--load", str(tmp_path / "my run"), "--use-checkpoint-args"]


def test_result_inside_the_source(exported):
    with pytest.raises(UserError, match="lies inside the folder that is converted"):
        huggingface_to_megatron(Settings(load=exported("ranks"), save=exported("ranks") / "megatron"))
    assert not (exported("ranks") / "megatron" / "release").exists()


def test_newest_checkpoint_that_is_damaged_is_not_replaced_by_an_older_one(checkpoints, exported, tmp_path, capsys):
    shutil.copytree(checkpoints("rich"), tmp_path / "run")
    shutil.copytree(checkpoint_path(tmp_path / "run", 2), checkpoint_path(tmp_path / "run", 4))
    write_tracker(tmp_path / "run", 4)
    file = next(checkpoint_path(tmp_path / "run", 4).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"iter_0000004 .* bytes; to use an older checkpoint, name its folder: .*0002"):
        megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "out"))
    capsys.readouterr()
    older = checkpoint_path(tmp_path / "run", 2)
    for load, step, save in ((tmp_path / "run", 2, tmp_path / "by step"), (older, None, tmp_path / "by folder")):
        megatron_to_huggingface(Settings(load=load, save=save, ckpt_step=step))
        assert f"loading: iteration 2 in {tmp_path / 'run'}\n" in capsys.readouterr().err
        assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (save, exported("rich"))))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """The benchmark fails if a conversion needs more memory than its bound."""
    command = [sys.executable, ROOT / "tools/benchmarks/convert.py", "--gib", "3", "--repeats", "1"]
    result = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"peak memory \d+ MiB", result.stdout)) == 2
