"""Conversions of whole models in both directions, from any layout of ranks, and inputs that are refused."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from safetensors.torch import load_file, save_file
from support.command_lines import run_command
from support.converted_models import to_megatron
from support.paths import ROOT
from support.tensors import assert_same_tensors, tensors_of
from support.tiny_maskmoe import NUM_EXPERTS, NUM_LAYERS, VOCAB_SIZE, make_config, make_model, random_mask
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskmoe.checkpoint.integrity import check_content, check_structure
from maskmoe.checkpoint.read_routing_mask import read_routing_mask
from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.series import checkpoint_path, write_tracker
from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.megatron_models import COMMON_STATE, MARKER, write_torch_dist
from maskmoe.conversion.settings import Settings
from maskmoe.conversion.tensor_sources import MemorySource
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM


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
    assert_same_tensors(tensors_of(original), tensors_of(release))
    assert read_routing_mask(release).digest == read_routing_mask(original).digest
    megatron_to_huggingface(Settings(load=tmp_path / "back", save=tmp_path / "again"))
    assert contents_of(tmp_path / "again") == contents_of(exported(run))


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


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The checkpoint of a tiny model, and the model's export."""
    folder = tmp_path_factory.mktemp("converted")
    make_model().save_pretrained(folder / "made")
    to_megatron(folder / "made", folder / "run")
    megatron_to_huggingface(Settings(load=folder / "run", save=folder / "exported"))
    return folder / "run" / "release", folder / "exported"


ROUTER = "decoder.layers.1.mlp.router.weight"


def set_nan(tensors, common):
    tensors[ROUTER] = torch.full_like(tensors[ROUTER], float("nan"))


def remove_mask(tensors, common):
    for name in ("row_of_id", "visible_bits", "metadata"):
        del tensors[f"routing_mask.{name}"]


WRONG_CHECKPOINTS = {
    "missing": (lambda tensors, common: tensors.pop(ROUTER), rf"lacks {re.escape(ROUTER)}$"),
    "unexpected": (lambda tensors, common: tensors.update(more=torch.ones(1)), "more$"),
    "shape": (lambda tensors, common: tensors.update({ROUTER: tensors[ROUTER][:, :3]}), re.escape(ROUTER)),
    "nan": (set_nan, "NaN"),
    "no mask": (remove_mask, "--routing-mask"),
    "altered mask": (lambda tensors, common: tensors["routing_mask.row_of_id"][0, 0].bitwise_xor_(1), "routing mask"),
    "no arguments": (lambda tensors, common: common.pop("args"), "arguments"),
}


@pytest.mark.parametrize("wrong", WRONG_CHECKPOINTS)
def test_wrong_checkpoint(converted, tmp_path, wrong):
    change, message = WRONG_CHECKPOINTS[wrong]
    checkpoint = rewrite(converted[0], tmp_path / "wrong", change)
    with pytest.raises(UserError, match=message) as error:
        megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_a_mask_for_a_model_that_has_none(converted, tmp_path):
    checkpoint, exported = converted
    without = rewrite(checkpoint, tmp_path / "without", remove_mask)
    megatron_to_huggingface(Settings(load=without, save=tmp_path / "out"), random_mask())
    assert contents_of(tmp_path / "out")["model.safetensors"] == contents_of(exported)["model.safetensors"]
    with pytest.raises(UserError, match="--routing-mask"):
        megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "other"), random_mask())
    with pytest.raises(UserError, match="--routing-mask"):
        to_megatron(exported, tmp_path / "other", random_mask())


def test_checkpoints_of_other_names_and_arguments(converted, tmp_path):
    """Earlier conversions hold a norm twice, and earlier versions of Megatron name the pattern otherwise."""

    def rename(tensors, common):
        for name in [name for name in tensors if name.endswith("mlp.linear_fc1.layer_norm_weight")]:
            other = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            tensors[other] = tensors[name]
        args = common["args"]
        args.hybrid_override_pattern, args.hybrid_layer_pattern = args.hybrid_layer_pattern, None

    checkpoint = rewrite(converted[0], tmp_path, rename)
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out"))
    assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (converted[1], tmp_path / "out")))


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
    to_megatron(path.parent, tmp_path / "run")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


SENTENCEPIECE, NULL = "SentencePieceTokenizer", "NullTokenizer"


@pytest.mark.parametrize(
    ("trained_with", "vocab_size", "passed", "expected"),
    [
        (NULL, ROWS, None, ROWS),
        ("TikTokenizer", ROWS, NULL, PADDED_ROWS),
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

    to_megatron(dense, tmp_path / "run")
    checkpoint = rewrite(tmp_path / "run/release", tmp_path / "trained", change)
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out", tokenizer_type=passed))
    assert config_of(tmp_path / "out")["vocab_size"] == expected
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].shape[0] == expected


@pytest.mark.parametrize(
    ("tokenizer_type", "ends", "expected"),
    [(NULL, [2, 5], (1, [2, 5])), (SENTENCEPIECE, [2, 5], (2, [2, 5])), (SENTENCEPIECE, 5, (2, 2))],
)
def test_a_dense_model_keeps_its_rows_and_the_ids_that_begin_and_end_texts(
    dense, tmp_path, tokenizer_type, ends, expected
):
    """The model keeps rows without ids, as Qwen has them. Ids of the tokenizer replace those of the model."""
    (dense / "config.json").write_text(json.dumps(config_of(dense) | {"eos_token_id": ends}))
    model = str(dense / "tokenizer.model") if tokenizer_type == SENTENCEPIECE else None
    settings = Settings(load=dense, save=tmp_path / "run", tokenizer_type=tokenizer_type, tokenizer_model=model)
    huggingface_to_megatron(settings)
    megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "back"))
    assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "back")))
    generation = json.loads((tmp_path / "back/generation_config.json").read_text())
    for settings in (config_of(tmp_path / "back"), generation):
        assert (settings["bos_token_id"], settings["eos_token_id"]) == expected


def test_a_dense_model_with_further_ids_returns_to_megatron(dense, tmp_path):
    """The larger tokenizer, which is not the tokenizer of training, needs flags."""
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
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "tuned")}
    huggingface_to_megatron(Settings(load=tmp_path / "tuned", save=tmp_path / "back", **tokenizer))
    assert load_common_state_dict(tmp_path / "back/release")["args"].padded_vocab_size == PADDED_ROWS + 128
    megatron_to_huggingface(Settings(load=tmp_path / "back", save=tmp_path / "again"))
    assert_same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "again")))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "again")) == PADDED_ROWS + 1


def test_damaged_checkpoint(converted, tmp_path):
    checkpoint = shutil.copytree(converted[0], tmp_path / "run")
    path = checkpoint / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"__1_0\.distcp does not have the content that was saved"):
        megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "out", verify=False))


def test_model_that_was_made_without_a_mask(tmp_path):
    """Its ids see all experts, in training as in transformers, unless it gets a mask."""
    MaskMoEForCausalLM(make_config()).save_pretrained(tmp_path / "made")
    to_megatron(tmp_path / "made", tmp_path / "all")
    assert read_routing_mask(tmp_path / "all").min_visible == NUM_EXPERTS
    mask = random_mask()
    to_megatron(tmp_path / "made", tmp_path / "masked", mask)
    assert read_routing_mask(tmp_path / "masked").digest == mask.digest
    megatron_to_huggingface(Settings(load=tmp_path / "all", save=tmp_path / "back"))
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("made", "back"))
    ids = torch.arange(VOCAB_SIZE)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_the_flags_that_load_the_result_can_be_pasted(dense, tmp_path):
    command = ("convert", "hf-to-megatron", "--load", dense, "--tokenizer-type", "NullTokenizer")
    result = run_command(*command, "--save", tmp_path / "my run")
    assert result.code == 0, result.errors
    flags = shlex.split(result.output.splitlines()[-1])
    assert flags[:3] == ["--load", str(tmp_path / "my run"), "--use-checkpoint-args"]


def test_result_inside_the_source(converted):
    exported = converted[1]
    with pytest.raises(UserError, match="lies inside the folder that is converted"):
        huggingface_to_megatron(Settings(load=exported, save=exported / "result"))
    assert not (exported / "result").exists()


def test_a_damaged_newest_checkpoint_is_not_replaced_by_an_older_one(checkpoints, exported, tmp_path, capsys):
    shutil.copytree(checkpoints("rich"), tmp_path / "run")
    shutil.copytree(checkpoint_path(tmp_path / "run", 2), checkpoint_path(tmp_path / "run", 4))
    write_tracker(tmp_path / "run", 4)
    file = next(checkpoint_path(tmp_path / "run", 4).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"iter_0000004"):
        megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "out"))
    megatron_to_huggingface(Settings(load=tmp_path / "run", save=tmp_path / "older", ckpt_step=2))
    assert f"loading: iteration 2 in {tmp_path / 'run'}\n" in capsys.readouterr().err
    assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "older", exported("rich"))))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """The benchmark fails if a conversion needs more memory than its bound."""
    command = [sys.executable, ROOT / "tools/benchmarks/convert.py", "--gib", "3", "--repeats", "1"]
    result = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"peak memory \d+ MiB", result.stdout)) == 2
