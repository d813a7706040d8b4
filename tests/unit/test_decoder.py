"""The decoder, held against transformers, closed formulas and itself."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hvdtrain.data.torchvision_import import import_torchvision
from hvdtrain.errors import ConfigError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder, one_a_query_head
from hvdtrain.models.elementwise import RMSNorm, rotary_tables, rotate
from hvdtrain.models.loss import IGNORE_INDEX, next_token_loss
from hvdtrain.recipes import load_recipe

VOCAB_SIZE = 61
SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}


def build(dtype: torch.dtype = torch.float32, seed: int = 0, **fields: object) -> Decoder:
    return Decoder(DecoderConfig(**{**SMALL, **fields}), VOCAB_SIZE, seed=seed).to(dtype)


def random_tokens(batch_size: int = 3, length: int = 17) -> Tensor:
    return torch.randint(VOCAB_SIZE, (batch_size, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_logits_equal_those_of_transformers(tied: bool, num_kv_heads: int) -> None:
    pytest.importorskip("transformers")
    if find_spec("torchvision"):  # transformers imports it where it is installed
        import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    model = build(tie_embeddings=tied, num_kv_heads=num_kv_heads, norm_eps=1e-3, rope_theta=500.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial weights, where attention is all but uniform
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
    )
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert set(dict(other.named_parameters())) == set(dict(model.named_parameters()))
    with torch.no_grad():
        ours, theirs = model(random_tokens()), other(random_tokens()).logits
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_parameters_have_the_names_and_shapes_of_llama() -> None:
    shapes = {name: tuple(value.shape) for name, value in build(num_layers=1, num_kv_heads=2).state_dict().items()}
    assert shapes == {
        "model.embed_tokens.weight": (VOCAB_SIZE, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.self_attn.k_proj.weight": (16, 32),
        "model.layers.0.self_attn.v_proj.weight": (16, 32),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.mlp.gate_proj.weight": (48, 32),
        "model.layers.0.mlp.up_proj.weight": (48, 32),
        "model.layers.0.mlp.down_proj.weight": (32, 48),
        "model.norm.weight": (32,),
        "lm_head.weight": (VOCAB_SIZE, 32),
    }


def test_a_token_changes_only_logits_from_its_position_on() -> None:
    model, tokens = build(), random_tokens(batch_size=1)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % VOCAB_SIZE
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:9] == 0).all()
    assert (difference[9:] > 0).all()


def test_rotation_is_a_product_of_complex_numbers() -> None:
    T, D, theta = 50, 8, 10000.0
    x = torch.randn(2, T, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary_tables(torch.arange(T), D, theta, like=x))
    for i in range(D // 2):
        pair = torch.complex(x[..., i], x[..., i + D // 2])
        angle = torch.arange(T, dtype=torch.float64) * theta ** (-2 * i / D)
        expected = pair * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(torch.complex(turned[..., i], turned[..., i + D // 2]), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"),
    [
        ("lm", 257, 705_664),
        ("lm-10m", 4096, 11_514_560),
        ("lm-124m", 50_304, 123_587_328),
        ("lm-1b", 50_304, 1_076_168_704),
        ("lm-3b", 50_304, 2_973_281_280),
    ],
)
def test_the_sizes_that_presets_have(name: str, vocab_size: int, expected: int) -> None:
    recipe: Any = load_recipe(name)
    assert name == "lm" or recipe.data.vocab_size == vocab_size
    with torch.device("meta"):
        assert Decoder(recipe.model, vocab_size).num_parameters() == expected


def test_gradients_of_norm_and_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    tables = rotary_tables(torch.arange(5), 8, 100.0, like=x)
    assert torch.autograd.gradcheck(lambda x: rotate(x, tables), [x])
    ours, torchs = RMSNorm(8, eps=0.1, dtype=torch.float64), torch.nn.RMSNorm(8, eps=0.1, dtype=torch.float64)
    for norm in (ours, torchs):
        norm.weight.data = torch.linspace(-1, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(ours, {"weight": w}, (x,)), [x, ours.weight]
    )


def test_keys_and_values_of_a_group_are_those_of_each_of_its_heads() -> None:
    """What is done on GPUs where there is a mask."""
    q, k, v = (torch.randn(2, heads, 5, 4, dtype=torch.float64) for heads in (6, 2, 2))
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    grouped = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, *one_a_query_head(k, v, 6), seen), grouped)


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped, full = build(torch.float64, num_kv_heads=2), build(torch.float64, num_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(random_tokens()), full(random_tokens()), rtol=0, atol=1e-13)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    for name, value in build(seed=7).state_dict().items():
        assert torch.equal(first[name], value)
    assert not torch.equal(first["lm_head.weight"], build(seed=8).state_dict()["lm_head.weight"])


def test_initial_weights_have_the_documented_spread() -> None:
    model = Decoder(DecoderConfig(num_layers=8, hidden_size=128, num_heads=2), 500)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        std = 0.005 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 0.02 / sqrt(2 * 8)
        assert parameter.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(parameter.mean().item()) < std / 20


def test_tied_embeddings_are_one_tensor_and_counted_once() -> None:
    tied, untied = build(tie_embeddings=True), build(tie_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == VOCAB_SIZE * 32
    block = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert tied.num_parameters() == VOCAB_SIZE * 32 + 2 * block + 32


def test_loss_sums_over_the_targets_that_count() -> None:
    logits = torch.randn(2, 5, VOCAB_SIZE, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = random_tokens(2, 5)
    targets[0, 1] = targets[1, 4] = IGNORE_INDEX
    loss_sum, count = next_token_loss(logits, targets)
    terms = [
        -math.log(F.softmax(logits[b, t].double(), dim=0)[targets[b, t]].item())
        for b in range(2)
        for t in range(5)
        if targets[b, t] != IGNORE_INDEX
    ]
    assert count.item() == len(terms) == 8
    assert count.dtype == torch.int64
    assert loss_sum.item() == pytest.approx(sum(terms), rel=1e-6)


def test_loss_without_targets_is_zero_and_not_nan() -> None:
    logits = torch.randn(1, 4, VOCAB_SIZE, requires_grad=True)
    loss_sum, count = next_token_loss(logits, torch.full((1, 4), IGNORE_INDEX))
    loss_sum.backward()
    assert (loss_sum.item(), count.item()) == (0.0, 0)
    assert logits.grad is not None
    assert not logits.grad.any()


def test_an_untrained_model_is_as_good_as_guessing() -> None:
    tokens = random_tokens(8, 33)
    loss_sum, count = next_token_loss(build()(tokens[:, :-1]), tokens[:, 1:])
    assert loss_sum.item() / count.item() == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)


def test_fp64_is_exact_throughout() -> None:
    """The gradient of a batch is the sum of its samples' to 1e-12; one fp32 table or norm on the way would show."""
    model, tokens = build(torch.float64), random_tokens(4, 33)
    whole = _gradient(model, tokens)
    parts = sum(_gradient(model, sample) for sample in tokens.split(1))
    assert whole.dtype == torch.float64
    assert (whole - parts).abs().max() < 1e-12
    cos, signed_sin = rotary_tables(torch.arange(300), 8, 10000.0, like=whole)
    assert cos[299, 0, 1].item() == pytest.approx(math.cos(299 * 10000.0**-0.25), abs=1e-14)
    assert signed_sin[299, 0, 5].item() == pytest.approx(math.sin(299 * 10000.0**-0.25), abs=1e-14)
    single = build(torch.float32)(tokens).double()
    assert 0 < (single - model(tokens)).abs().max() < 1e-5  # two types of one model


def _gradient(model: Decoder, tokens: Tensor) -> Tensor:
    loss_sum, _ = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
    assert loss_sum.dtype == torch.float64
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss_sum, list(model.parameters()))])


def test_bf16_autocast_and_bf16_weights_give_an_fp32_loss() -> None:
    model, tokens = build(), random_tokens()
    expected, _ = next_token_loss(model(tokens), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        autocast, _ = next_token_loss(logits, tokens)
    bf16, _ = next_token_loss(model.to(torch.bfloat16)(tokens), tokens)
    assert logits.dtype == torch.bfloat16
    assert autocast.dtype == bf16.dtype == torch.float32
    assert autocast.item() == pytest.approx(expected.item(), rel=1e-3)
    assert bf16.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    model = build(num_kv_heads=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(random_tokens()), model(random_tokens()))


def test_learns_a_repeating_text() -> None:
    model = build(num_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = (torch.arange(33) * 7 % 12).repeat(4, 1)
    for _ in range(60):
        loss_sum, count = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        (loss_sum / count).backward()
        optimizer.step()
    assert (loss_sum / count).item() < 0.05


@pytest.mark.parametrize(("hidden_size", "expected"), [(256, 704), (768, 2048), (192, 512), (32, 128)])
def test_feed_forward_size_is_8_thirds_rounded_up_to_64(hidden_size: int, expected: int) -> None:
    assert DecoderConfig(hidden_size=hidden_size, num_heads=2).feed_forward_size == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_heads": 3}, r"hidden_size = 100 .* multiple of 6, such as 102"),
        ({"hidden_size": 12, "num_heads": 4}, r"hidden_size = 12 .* multiple of 8, such as 16"),
        ({"hidden_size": 48, "num_heads": 6, "num_kv_heads": 4}, r"num_kv_heads to one of 1, 2, 3, 6"),
        ({"num_layers": 0}, r"num_layers = 0 must be greater than 0"),
        ({"intermediate_size": -64}, r"intermediate_size = -64"),
        ({"norm_eps": -1.0}, r"norm_eps = -1.0 must not be negative"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**fields)


def test_the_residual_stream_has_the_type_of_the_products() -> None:
    """With autocast, each block takes and gives 16 bits; gradients are what they are with fp32, to rounding."""
    tokens, found = random_tokens(), []
    for residual_dtype, wanted in (("fp32", torch.float32), ("products", torch.bfloat16)):
        model = build(residual_dtype=residual_dtype)
        types: set[torch.dtype] = set()

        def note(_: Any, given: Any, out: Tensor, types: set[torch.dtype] = types) -> None:
            types.update((given[0].dtype, out.dtype))

        for block in model.model.layers:
            block.register_forward_hook(note)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, tokens)
        assert types == {wanted}
        assert loss.dtype == torch.float32
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    (plain, *gradients), (ours, *others) = found
    assert abs(ours - plain) < 0.01 * plain
    assert any(not torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    for one, other in zip(gradients, others, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() < 0.05 * one.norm()


def test_without_autocast_the_residual_stream_is_that_of_the_weights() -> None:
    tokens = random_tokens()
    assert torch.equal(build(residual_dtype="products")(tokens), build()(tokens))
