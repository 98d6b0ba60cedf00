"""TRL and PEFT fine-tune exported models, without a change of the routing mask."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.paths import EXPORTED_MODEL
from support.tiny_maskmoe import make_model, random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.settings import Settings
from maskmoe.huggingface.modeling_maskmoe import MaskMoEPreTrainedModel, load_balancing_loss

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = "mlp.gate.weight"
# Settings of adapters, and the modules of a layer that get adapters.
ADAPTERS = {
    "attention": ({"target_modules": list(ATTENTION)}, {*ATTENTION}),
    "experts": ({"target_modules": [], "target_parameters": list(EXPERTS)}, {"mlp.experts", "mlp.experts.base_layer"}),
    "router": ({"target_modules": [], "target_parameters": [ROUTER]}, {"mlp.gate"}),
    "all linear": ({"target_modules": "all-linear"}, {*ATTENTION}),
}
ALL_ADAPTERS = {"target_modules": "all-linear", "target_parameters": [*EXPERTS, ROUTER]}
EVERY_ID = torch.arange(400).view(10, 40)


class MaskMoETrainer(SFTTrainer):
    """Trains with the model's own loss, as docs/fine-tuning.md shows."""

    compute_loss = Trainer.compute_loss


def fine_tune(folder: Path, adapters: LoraConfig | None = None) -> MaskMoETrainer:
    """Fine-tune the exported model on texts of several lengths, and save the model or its adapters to `folder`."""
    settings = SFTConfig(
        str(folder),
        max_steps=10,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    texts = [{"text": f"def method{number}(self):\n" * (1 + number % 3)} for number in range(32)]
    data = Dataset.from_list(texts)
    trainer = MaskMoETrainer(str(EXPORTED_MODEL), settings, train_dataset=data, peft_config=adapters)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model()
    return trainer


def load(folder: Path = EXPORTED_MODEL) -> MaskMoEPreTrainedModel:
    """Load a model, in evaluation mode; loading verifies the digest of the mask."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel) -> Tensor:
    """Compute the logits for every id of the exported model's vocabulary."""
    return model.eval()(EVERY_ID).logits


def assert_same_mask(folder: Path) -> None:
    """Check that a saved model has the exported model's mask; the export is an older one, whose rows are int16."""
    original, saved = (load_file(path / "model.safetensors") for path in (EXPORTED_MODEL, folder))
    names = [name for name in original if "routing_mask" in name]
    assert len(names) == 3
    for name in names:
        assert saved[name].dtype == (torch.int32 if name.endswith("row_of_id") else torch.uint8)
        assert torch.equal(saved[name], original[name].to(saved[name].dtype))


def test_all_weights(tmp_path: Path) -> None:
    trainer = fine_tune(tmp_path)
    saved = load(tmp_path)
    assert torch.equal(logits_of(saved), logits_of(trainer.model))
    assert_same_mask(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()
    loss = saved(**batch, output_router_logits=True).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_padding_changes_nothing(implementation: str) -> None:
    """A padded batch, the same texts in one row, and text by text: the same losses, router logits and gradients."""
    model = make_model()
    model.set_experts_implementation(implementation)
    texts = [random_ids(length, seed=length) for length in (9, 4, 6)]
    rows = [{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts]

    def gradients_of(loss: Tensor) -> list[Tensor]:
        return torch.autograd.grad(loss, list(model.parameters()))

    model.config.router_aux_loss_coef = 0.0
    alone = [
        model(text[None], labels=text[None], num_items_in_batch=9 + 4 + 6 - 3, output_router_logits=True)
        for text in texts
    ]
    router_logits = tuple(torch.cat(layers) for layers in zip(*(one.router_logits for one in alone), strict=True))
    aux_loss = load_balancing_loss(router_logits, None, model.config)
    loss = sum(one.loss for one in alone) + 0.5 * aux_loss
    gradients = gradients_of(loss)
    model.config.router_aux_loss_coef = 0.5
    for padding_free in (False, True):
        batch = DataCollatorForLanguageModeling(pad_token_id=7, padding_free=padding_free)(rows)
        outputs = model(**batch, output_router_logits=True, use_cache=False)
        real = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else slice(None)
        found = [logits[real] for logits in outputs.router_logits]
        found += [outputs.loss, outputs.aux_loss, *gradients_of(outputs.loss)]
        for actual, expected in zip(found, [*router_logits, loss, aux_loss, *gradients], strict=True):
            largest = float(expected.detach().nan_to_num(neginf=0).abs().max())
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_adapters_obey_the_mask_and_merge(name: str) -> None:
    """New adapters change no bit. PEFT's wrapper of the router counts experts by the dimensions of the weight."""
    settings, modules = ADAPTERS[name]
    model = load()
    before = model(EVERY_ID, output_router_logits=True)
    adapted = get_peft_model(model, LoraConfig(**settings)).eval()
    names = "\n".join(name for name, _ in adapted.named_parameters())
    assert set(re.findall(r"\.layers\.0\.(.+)\.lora_B", names)) == modules
    assert torch.equal(logits_of(adapted), before.logits)
    for parameter in (parameter for name, parameter in adapted.named_parameters() if "lora_B" in name):
        parameter.normal_()
    after = adapted(EVERY_ID, output_router_logits=True)
    assert not torch.equal(after.router_logits[1], before.router_logits[1])
    for logits, original in zip(after.router_logits, before.router_logits, strict=True):
        assert torch.equal(logits.isneginf(), original.isneginf())
    torch.testing.assert_close(logits_of(adapted.merge_and_unload()), after.logits, rtol=1e-4, atol=1e-4)


def test_merged_adapters_return_to_megatron(tmp_path: Path) -> None:
    trainer = fine_tune(tmp_path / "adapters", LoraConfig(**ALL_ADAPTERS))
    expected = logits_of(trainer.model)
    adapted = PeftModel.from_pretrained(load(), str(tmp_path / "adapters"))
    assert torch.equal(logits_of(adapted), expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_mask(tmp_path / "merged")
    assert torch.equal(logits_of(load(tmp_path / "merged")), logits_of(merged))
    trainer.processing_class.save_pretrained(tmp_path / "merged")
    huggingface_to_megatron(Settings(load=tmp_path / "merged", save=tmp_path / "megatron"))
    megatron_to_huggingface(Settings(load=tmp_path / "megatron", save=tmp_path / "again"))
    merged_tensors, again = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    torch.testing.assert_close(merged_tensors, again, rtol=0, atol=0)
