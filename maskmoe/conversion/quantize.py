"""Quantizes exported models: torchao stores the weights of attention, MLPs and experts in int8."""

import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig, set_seed

from maskmoe.checkpoint.integrity import FileRecord, Manifest
from maskmoe.conversion.huggingface_models import check_files, open_model
from maskmoe.conversion.model_config import read_model_config
from maskmoe.conversion.model_tensors import ROUTING_MASK_PREFIX, read_mask
from maskmoe.conversion.opened_model import CONFIG_FILE
from maskmoe.conversion.safetensors_files import SafetensorsSource
from maskmoe.conversion.tokenizer import TOKENIZER_FILES
from maskmoe.conversion.writing import OutputFolder
from maskmoe.errors import UserError
from maskmoe.files.json_files import write_record
from maskmoe.files.outputs import lies_inside
from maskmoe.huggingface import MaskMoEConfig

REPORT_FILE = "quantization.json"
"""Name of the file beside a quantized model with what `QuantizationReport` holds."""
# All projections of all layers, as modules or as parameters of experts. Embeddings, the output layer, routers, gates,
# norms and the routing mask keep their types.
_QUANTIZED = r"re:model\.layers\.\d+\..*_proj(_with_mqa)?"
_MAX_TOKENS = 16384
_SAMPLES, _SAMPLED_TOKENS = 16, 128


@dataclass(frozen=True)
class QuantizationReport:
    """How quantization changed a model.

    Attributes:
        text: the file whose text the losses are of; None for text that the original model sampled.
        num_tokens: number of tokens that the losses are averages over.
        loss: mean loss of the original model, in nats per token.
        quantized_loss: mean loss of the quantized model.
        num_bytes: bytes of the original model's tensors.
        quantized_bytes: bytes of the quantized model's tensors.
        mask_digest: digest of the routing mask, which is the same in both models; None without experts.
    """

    text: str | None
    num_tokens: int
    loss: float
    quantized_loss: float
    num_bytes: int
    quantized_bytes: int
    mask_digest: str | None

    def summary(self) -> str:
        """Return one line for people."""
        text = f"of {self.text}" if self.text else "that the model sampled itself"
        return (
            f"loss {self.loss:.4f} -> {self.quantized_loss:.4f} ({self.quantized_loss - self.loss:+.4f}) on "
            f"{self.num_tokens:,} tokens {text}; {self.num_bytes / 2**20:.1f} MiB -> "
            f"{self.quantized_bytes / 2**20:.1f} MiB; routing mask unchanged"
        )


def quantize_model(load: Path, save: Path, text: Path | None = None, verify: bool = True) -> QuantizationReport:
    """Write a copy of an exported model whose projections and experts have int8 weights.

    Every row of a weight gets a scale. torchao must be installed.

    Args:
        load: the folder of the exported model.
        save: a new folder for the quantized model.
        text: a file of text to measure the losses on; by default the model samples text.
        verify: compare the model's files with the digests that were saved with them.

    Raises:
        UserError: `load` holds no exported model, or a quantized model; `save` is not new; the text cannot be read or
            is too short.
    """
    if read_model_config(load / CONFIG_FILE).get("model_type") != MaskMoEConfig.model_type:
        raise UserError(f"{load} holds no exported MaskMoE model; convert it first")
    open_model(load)  # refuses a model that is quantized or incomplete
    if lies_inside(save, load):
        raise UserError(f"{save} lies inside the folder that is converted; name a folder elsewhere")
    check = partial(check_files, load) if verify else lambda: None
    with OutputFolder(save, {"quantize": str(load.resolve()), "text": text and str(text)}, check) as output:
        output.check()
        # Measure the original model.
        model = _load(load)
        tokens = _read_tokens(load, text, model) if text else _sample_tokens(model)
        loss = _mean_loss(model, tokens)
        # Quantize the model while it is loaded again, which is how transformers does it.
        del model
        model = _load(load, quantization_config=_quantization_config())
        quantized_loss = _mean_loss(model, tokens)
        # Write the model with everything beside it but what only Megatron needs.
        model.save_pretrained(output.path)
        for name in TOKENIZER_FILES:
            if (load / name).is_file():
                shutil.copy(load / name, output.path)
        original, quantized = SafetensorsSource(load), SafetensorsSource(output.path)
        report = QuantizationReport(
            text=str(text) if text else None,
            num_tokens=tokens.numel() - len(tokens),  # the first token of each row has no loss
            loss=loss,
            quantized_loss=quantized_loss,
            num_bytes=_num_bytes(original),
            quantized_bytes=_num_bytes(quantized),
            mask_digest=_mask_digest(original, quantized),
        )
        write_record(asdict(report), output.path / REPORT_FILE, indent=2)
        Manifest.of({file.name: FileRecord.of(file) for file in quantized.files}).save(output.path)
        output.complete()
    return report


def _quantization_config() -> TorchAoConfig:
    # pyrefly: ignore[missing-import]  # torchao is installed only for quantization
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    return TorchAoConfig(FqnToConfig({_QUANTIZED: Int8WeightOnlyConfig(version=2)}))


def _load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False, **options
    ).eval()


def _read_tokens(folder: Path, text: Path, model: Any) -> Tensor:
    """Return the tokens of a text, int64 [rows, length], in rows of as many tokens as the model was made for."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {text} as UTF-8 text: {error}") from error
    if not (folder / TOKENIZER_FILES[0]).is_file():
        raise UserError(f"{folder} has no tokenizer, so --text cannot be used")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(content)["input_ids"][:_MAX_TOKENS]
    length = min(model.config.max_position_embeddings, len(ids))
    if length < 2:
        raise UserError(f"{text} has {len(ids)} tokens; two or more are needed")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def _sample_tokens(model: Any) -> Tensor:
    """Let a model sample text after random tokens; return int64 [samples, length]."""
    set_seed(1234)
    length = min(_SAMPLED_TOKENS, model.config.max_position_embeddings)
    first = torch.randint(model.config.vocab_size, (_SAMPLES, 1))
    settings = {"do_sample": True, "top_k": 0, "min_new_tokens": length - 1, "max_new_tokens": length - 1}
    return model.generate(first, attention_mask=torch.ones_like(first), pad_token_id=0, **settings)


@torch.no_grad()
def _mean_loss(model: Any, tokens: Tensor) -> float:
    """Return the mean loss over tokens [rows, length], in nats."""
    losses = [model(row[None], labels=row[None], use_cache=False).loss.item() for row in tokens]
    return sum(losses) / len(losses)


def _num_bytes(source: SafetensorsSource) -> int:
    return sum(spec.num_bytes for spec in source.tensors.values())


def _mask_digest(original: SafetensorsSource, quantized: SafetensorsSource) -> str | None:
    """Return the digest of the routing mask of both models; both masks are verified."""
    masks = [read_mask(source, ROUTING_MASK_PREFIX) for source in (original, quantized)]
    before, after = (mask.digest if mask else None for mask in masks)
    assert before == after, f"quantization changed the routing mask from {before} to {after}"
    return before
