"""The whole transformers model computes the same in every way to run, save and load it."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_moe import make_mask
from support.tiny_maskmoe import (
    NUM_EXPERTS,
    NUM_LAYERS,
    VARIANTS,
    VOCAB_SIZE,
    make_config,
    make_model,
    random_ids,
    random_mask,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from maskmoe.checkpoint.read_routing_mask import buffers_of_routing_mask
from maskmoe.huggingface import MaskMoEConfig, MaskMoEForCausalLM

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
PADDING_ID = 7


def assert_alike(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert equality up to the order of additions, which depends on sizes and memory alignment of matrices."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cache_changes_nothing(variant) -> None:
    model = make_model(**VARIANTS[variant])
    token_ids = random_ids(2, 12)
    whole = model(token_ids).logits
    first = model(token_ids[:, :7], use_cache=True)
    parts, cache = [first.logits], first.cache
    for position in range(7, 12):
        parts.append(model(token_ids[:, position : position + 1], cache=cache, use_cache=True).logits)
    assert_alike(torch.cat(parts, dim=1), whole, tolerance=5e-5)


def generate(model: MaskMoEForCausalLM, token_ids: Tensor, **settings) -> Tensor:
    """Generate 12 new tokens by default; return the new tokens [batch, 12]."""
    settings = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": PADDING_ID} | settings
    return model.generate(token_ids, **settings)[:, token_ids.shape[1] :]


@pytest.mark.parametrize("use_cache", [True, False])
def test_padded_prompts_continue_like_unpadded_prompts(use_cache) -> None:
    model = make_model()
    prompts = [random_ids(1, length, seed=length) for length in (3, 9, 6)]
    longest = max(prompt.shape[1] for prompt in prompts)
    padded = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0), value=PADDING_ID) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts])
    together = generate(model, padded, attention_mask=mask, use_cache=use_cache)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert torch.equal(generate(model, prompt, attention_mask=torch.ones_like(prompt))[0], tokens)


@pytest.mark.parametrize("variant", VARIANTS)
def test_experts_and_attention_implementations_agree(variant) -> None:
    model = make_model(num_experts_per_tok=4, **VARIANTS[variant])
    token_ids = random_ids(2, 10)
    gradients, logits = [], []
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        model.set_attn_implementation("eager" if implementation == "batched_mm" else "sdpa")
        model.zero_grad()
        outputs = model(token_ids, labels=token_ids)
        outputs.loss.backward()
        logits.append(outputs.logits)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other_logits, other_gradients in zip(logits[1:], gradients[1:], strict=True):
        assert_alike(other_logits, logits[0], tolerance=5e-5)
        for name, gradient in gradients[0].items():
            assert_alike(other_gradients[name], gradient, tolerance=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@torch.no_grad()
def test_compiles_as_one_graph(implementation) -> None:
    model = make_model()
    model.set_experts_implementation(implementation)
    token_ids = random_ids(2, 10)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_alike(compiled(token_ids, use_cache=False).logits, model(token_ids).logits)


@pytest.mark.parametrize("variant", ["plain", "gated_shared_experts", "dense_layers", "sigmoid"])
def test_checkpointed_gradients_are_the_same(variant) -> None:
    model = make_model(**VARIANTS[variant]).train()
    token_ids = random_ids(2, 10)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(token_ids, labels=token_ids, output_router_logits=True, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_auxiliary_loss_is_part_of_the_loss() -> None:
    model = make_model(router_aux_loss_coef=0.5)
    token_ids = random_ids(2, 10)
    plain = model(token_ids, labels=token_ids)
    assert plain.router_logits is None
    assert plain.aux_loss is None
    outputs = model(token_ids, labels=token_ids, output_router_logits=True)
    assert [logits.shape for logits in outputs.router_logits] == [(20, NUM_EXPERTS)] * NUM_LAYERS
    for layer, logits in enumerate(outputs.router_logits):
        visible = torch.from_numpy(random_mask().visible_sets(layer))[token_ids.flatten()]
        assert torch.equal(logits.isfinite(), visible)
        assert logits.dtype == torch.float32
    assert_alike(outputs.loss, plain.loss + 0.5 * outputs.aux_loss)
    model.config.output_router_logits = True
    assert torch.equal(model(token_ids, labels=token_ids).loss, outputs.loss)


def test_auxiliary_losses_of_micro_batches_add_up() -> None:
    """Each micro-batch counts by its share of the step's labels, like the labels themselves.

    Trainer reports the number of labels that have a loss: the first label of a sample has none.
    """
    model = make_model(router_aux_loss_coef=0.5)
    labels = random_ids(6, 10)
    labels[1, 3:] = labels[2, :8] = -100
    micro_batches = labels.split((1, 3, 2))
    num_labels = [int((batch[:, 1:] != -100).sum()) for batch in micro_batches]
    loss, expected = torch.zeros(()), torch.zeros(())
    for batch, number in zip(micro_batches, num_labels, strict=True):
        token_ids = batch.clamp(min=0)
        outputs = model(token_ids, labels=batch, output_router_logits=True, num_items_in_batch=sum(num_labels))
        loss = loss + outputs.loss
        plain = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        expected = expected + number / sum(num_labels) * (plain + 0.5 * outputs.aux_loss)
        shifted = torch.nn.functional.pad(batch[:, 1:], (0, 1), value=-100)
        of_shifted = model(
            token_ids,
            labels=batch,
            shift_labels=shifted,
            output_router_logits=True,
            num_items_in_batch=torch.tensor(sum(num_labels)),
        )
        assert torch.equal(of_shifted.loss, outputs.loss)
    assert_alike(loss, expected)


def test_reentrant_checkpointing_is_refused_where_the_auxiliary_loss_has_no_gradient() -> None:
    model = make_model(output_router_logits=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    token_ids = random_ids(2, 10)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(token_ids, labels=token_ids, use_cache=False)
    # Nothing is lost without gradients, without the coefficient, or if routers are not trained.
    with torch.no_grad():
        assert model(token_ids, labels=token_ids, use_cache=False).aux_loss > 0
    for layer in model.model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    assert model(token_ids, labels=token_ids, use_cache=False).aux_loss > 0
    model.requires_grad_(True)
    model.config.router_aux_loss_coef = 0.0
    model(token_ids, labels=token_ids, use_cache=False).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_auxiliary_loss_while_generating() -> None:
    """With a cache, the attention mask is longer than the new tokens."""
    model = make_model(output_router_logits=True)
    prompt = random_ids(2, 5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0  # transformers drops a mask without padding
    assert generate(model, prompt, attention_mask=mask).shape == (2, 12)


def test_inputs_embeds_need_ids() -> None:
    model = make_model()
    token_ids = random_ids(2, 5)
    embeddings = model.get_input_embeddings()(token_ids)
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=embeddings)
    assert torch.equal(model(token_ids, inputs_embeds=embeddings).logits, model(token_ids).logits)
    with pytest.raises(ValueError, match="do not fit"):
        model(token_ids[:, :1], inputs_embeds=embeddings)
    with pytest.raises(RuntimeError, match="out of DATA bounds, id=-1"):
        model(token_ids.index_fill(1, torch.tensor([3]), -1), inputs_embeds=embeddings)


def test_logits_to_keep() -> None:
    model = make_model()
    token_ids = random_ids(2, 5)
    logits = model(token_ids).logits
    assert_alike(model(token_ids, logits_to_keep=2).logits, logits[:, -2:])
    assert_alike(model(token_ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_bit_for_bit(variant, tmp_path) -> None:
    model = make_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    # ZeRO-3 broadcasts the tensors of the file, which neither NCCL nor gloo does for int16.
    assert torch.int16 not in {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MaskMoEForCausalLM
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    token_ids = random_ids(2, 10)
    assert_alike(loaded(token_ids).logits, model(token_ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("variant", ["plain", "sigmoid"])
def test_bfloat16_leaves_the_mask_alone(variant, tmp_path) -> None:
    model = make_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for half in (loaded, cast):
        assert all(parameter.dtype == torch.bfloat16 for parameter in half.parameters())
        for name, value in buffers_of_routing_mask(random_mask()).items():
            buffer = half.model.routing_mask.get_buffer(name)
            assert buffer.dtype == (torch.int32 if name == "row_of_id" else value.dtype)
            assert torch.equal(buffer, value.to(buffer.dtype))
    for name, buffer in loaded.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, model.get_buffer(name))
    token_ids = random_ids(2, 10)
    outputs = loaded(token_ids, output_router_logits=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.router_logits[0].dtype == torch.float32
    prompt = token_ids[:, :5]
    assert generate(loaded, prompt, attention_mask=torch.ones_like(prompt)).shape == (2, 12)


def test_device_map(tmp_path) -> None:
    """As with several devices, each part has hooks. The weights of one part stay on disk."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.routing_mask": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.layers.2": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    token_ids = random_ids(2, 10)
    assert_alike(loaded(token_ids).logits, model(token_ids).logits)
    prompt = token_ids[:, :5]
    mask = torch.ones_like(prompt)
    assert torch.equal(generate(loaded, prompt, attention_mask=mask), generate(model, prompt, attention_mask=mask))


def test_model_without_a_mask_is_refused(tmp_path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.endswith("row_of_id")},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"no routing mask: model\.routing_mask\.row_of_id"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_model_without_experts() -> None:
    config = make_config(mlp_layer_types=["dense"] * NUM_LAYERS)
    assert config.routing_mask is None
    assert config.router_aux_loss_coef == 0.0  # else TRL's trainers fail, because they find no router logits
    torch.manual_seed(0)
    model = MaskMoEForCausalLM(config).eval()
    token_ids = random_ids(2, 10)
    outputs = model(token_ids, labels=token_ids, output_router_logits=True)
    assert outputs.aux_loss is None
    assert outputs.loss.isfinite()
    embeddings = model.get_input_embeddings()(token_ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, outputs.logits)


@pytest.mark.parametrize("arguments", [(VOCAB_SIZE,), (VOCAB_SIZE - 1, VOCAB_SIZE)])
def test_vocabulary_may_keep_its_size(arguments) -> None:
    model = make_model()
    assert model.resize_token_embeddings(*arguments).num_embeddings == VOCAB_SIZE


@pytest.mark.parametrize("arguments", [(VOCAB_SIZE + 2,), (VOCAB_SIZE - 20,), (None, 64)])
def test_vocabulary_cannot_change(arguments) -> None:
    with pytest.raises(ValueError, match=f"the routing mask is for {VOCAB_SIZE} token ids"):
        make_model().resize_token_embeddings(*arguments)
    dense = MaskMoEForCausalLM(make_config(mlp_layer_types=["dense"] * NUM_LAYERS))
    dense.resize_token_embeddings(*arguments)


def test_expert_bias_of_a_new_model_is_not_in_half_precision() -> None:
    """Some ways to load weights, such as DeepSpeed ZeRO-3, copy them into the tensors of the constructor."""
    config = make_config(scoring_func="sigmoid", norm_topk_prob=True, use_expert_bias=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert [bias.dtype for bias in biases] == [torch.float32] * NUM_LAYERS


BAD = [
    *({"qk_norm": "heads"}, {"qk_norm": "latent"}, {"scoring_func": "tanh"}, {"aux_loss_tokens": "some"}),
    *({"mlp_layer_types": ["sparse"]}, {"mlp_layer_types": ["moe"] * NUM_LAYERS}, {"num_experts_per_tok": 7}),
    *({"n_group": 3}, {"num_experts_per_tok": 3, "n_group": 3, "topk_group": 2}),
    {"routing_mask": {"num_tables": 2, "row_dtype": "int16"}},
    VARIANTS["latent_attention"] | {"qk_norm": "head"},
]


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_bad_configurations_are_refused(settings) -> None:
    with pytest.raises(ValueError, match="num_tables|qk_norm|" + [*settings][-1]):
        make_config(**settings)


def test_attributes_that_some_versions_of_transformers_read() -> None:
    """Up to 5.19, Trainer passes the cache to `compute_metrics` by default, and latent attention reads the size.

    5.24 takes a model with such a size for one with latent attention.
    """
    assert make_config().qk_head_dim is None
    assert {"cache", "past_key_values"} <= {*MaskMoEConfig.keys_to_ignore_at_inference}
    model = make_model(**VARIANTS["latent_attention"])
    assert model.config.qk_head_dim == model.model.layers[0].self_attn.qk_head_dim
    assert "qk_head_dim" not in model.config.to_dict()


def test_shared_table_and_wide_rows() -> None:
    """A model with one table for all layers and int32 rows computes the same as with int16 rows."""
    mask = make_mask(random_mask().visible_sets(0)[None], NUM_LAYERS)
    model = make_model(mask)
    wide = MaskMoEForCausalLM(make_config(mask, routing_mask=model.config.routing_mask | {"row_dtype": "int32"})).eval()
    for value, copied in zip(wide.state_dict().values(), model.state_dict().values(), strict=True):
        value.copy_(copied)  # `load_state_dict` would compare the digest, which depends on the type of the rows
    assert wide.model.routing_mask.stored_dtype == torch.int32
    token_ids = random_ids(2, 10)
    assert torch.equal(wide(token_ids).logits, model(token_ids).logits)
