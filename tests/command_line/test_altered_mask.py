"""No command uses a model's routing mask that was altered after the export, and none runs code of a model's folder."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.tiny_maskmoe import make_model, mask_tensors, random_mask
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from maskmoe.command_line import generate_text
from maskmoe.conversion.huggingface_models import open_model
from maskmoe.conversion.model_tensors import routing_mask_tensors
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEForCausalLM

PREFIX = "model.routing_mask."


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, whose configuration has the digest of its mask."""
    folder = tmp_path_factory.mktemp("exported")
    mask = random_mask()
    make_model(mask, routing_mask=routing_mask_tensors(mask)[1]).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be altered."""
    return shutil.copytree(exported, tmp_path / "model")


def alter_row(tensors: dict) -> None:
    rows = tensors[f"{PREFIX}row_of_id"]
    rows[0, 0], rows[0, 1] = rows[0, 1].clone(), rows[0, 0].clone()
    rows[0, 2] = (rows[0, 2] + 1) % 2


def alter_bits(tensors: dict) -> None:
    tensors[f"{PREFIX}visible_bits"][0, -1] ^= 1


def alter_metadata(tensors: dict) -> None:
    text = bytes(tensors[f"{PREFIX}metadata"].tolist()).replace(b'seed\\":0', b'seed\\":1')
    assert text != bytes(tensors[f"{PREFIX}metadata"].tolist())
    tensors[f"{PREFIX}metadata"].copy_(tensors[f"{PREFIX}metadata"].new_tensor(list(text)))


def replace_by_another_mask(tensors: dict) -> None:
    others = (
        {PREFIX + name: tensor for name, tensor in mask_tensors(random_mask(seed=n)).items()} for n in range(1, 999)
    )
    tensors |= next(other for other in others if all(other[name].shape == tensors[name].shape for name in other))


CHANGES = [alter_row, alter_bits, alter_metadata, replace_by_another_mask]


def change(model: Path, alter) -> None:
    tensors = load_file(model / "model.safetensors")
    alter(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def sample(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--model", str(model), "--prompt", "a b", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["maskmoe sample", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    generate_text.main()


def test_intact_model_is_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_model(model)
    sample(model, monkeypatch)


@pytest.mark.parametrize("alter", CHANGES)
def test_altered_mask_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch, alter) -> None:
    change(model, alter)
    with pytest.raises(UserError, match=r"mask"):  # hf-to-megatron and analyze
        open_model(model)
    with pytest.raises(ValueError, match="does not match its digest"):
        MaskMoEForCausalLM.from_pretrained(model)
    with pytest.raises(UserError, match="does not match its digest"):
        sample(model, monkeypatch)


def write_code(model: Path) -> Path:
    """Write a module that leaves a trace when it runs, and return the path of the trace."""
    trace = model.parent / "code-has-run"
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Evil: pass\n"
    (model / "evil.py").write_text(code)
    return trace


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_code_of_a_models_folder_is_not_offered(
    model: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trace = write_code(model)
    content = json.loads((model / name).read_text())
    if name == "config.json":
        content |= {
            "model_type": "unknown",
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        }
    else:
        content |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (model / name).write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        sample(model, monkeypatch)
    assert len(str(refusal.value).splitlines()) == 1
    assert not trace.exists()
    assert "[y/N]" not in capsys.readouterr().out
