"""Every family of causal language models of transformers in a tiny configuration, made on the spot, and its judge."""

import re
from dataclasses import dataclass

from hugging import import_transformers

VOCABULARY = 320
POSITIONS = 128
WINDOW = 5

# Pattern of a whole field's name -> value; the first that fits. What no pattern names keeps its default.
SIZES = (
    (r".*vocab_size.*", VOCABULARY),
    (r"(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|num_blocks|depth)", 4),
    (r"num_attention_heads|n_heads?|.*attention_heads|num_heads|num_q_heads|index_n_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*(key_value|kv)_heads|num_kv_heads|n_kv_heads?", 2),
    (r"linear_num_(key|value)_heads", 2),
    (r"(d_model|hidden_size|n_embd|emb_dim|dim|word_embed_proj_dim|embedding_size|decoder_hidden_size)", 32),
    (r"(embed_dim|output_dim|hidden_size_per_layer_input)", 32),
    (r".*(intermediate_size|ffn_dim|ffn_size|n_inner|dim_ff|hidden_dim|intermediate_dim)$", 48),
    (r".*head_dim|d_kv|attention_head_size|d_head|mamba_d_head", 8),
    (r".*lora_rank", 16),
    (r".*window(_size)?|attention_chunk_size", WINDOW),
    (r".*chunk_size", 4),
    (
        r"max_position_embeddings|n_positions|max_seq_len|max_(source|target)_positions|n_ctx|.*max_position.*",
        POSITIONS,
    ),
    (r"num_experts_per_tok(en)?|.*top_k|moe_topk|moe_k", 2),
    (r"n(um)?_.*experts|num_experts|moe_num_experts", 4),
    (r"n_group|topk_group|num_expert_group.*", 1),
)


def each(*families, **values):
    """Return these values for each of the families."""
    return dict.fromkeys(families, values)


# Where a family needs values of its own.
DECODER = {"is_decoder": True}
LATENT = {"num_key_value_heads": 4}
SPECIAL = {
    **each("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", **DECODER),
    **each("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", **DECODER),
    **each("xlm-roberta", "xlm-roberta-xl", **DECODER),
    "xmod": {**DECODER, "default_language": "en_XX"},
    **each("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", **LATENT),
    **each("glm_moe_dsa", "minicpm3", "youtu", "dots3_note_text", **LATENT, head_dim=8),
    **each("codegen", "gptj", rotary_dim=4),
    **each("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral", "nemotron", head_dim=8, num_key_value_heads=2),
    "longcat_flash": {
        **LATENT,
        "head_dim": 8,
        "qk_head_dim": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "bailing_hybrid": {**LATENT, "kda_safe_gate": False},
    "kimi_linear": {**LATENT, "layer_types": ["linear_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": each("full_attention", "sliding_attention", rope_type="default", rope_theta=10000.0),
    },
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "nemotron_h": {"n_groups": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 300,
        "split_ngram_parts": 2,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 4,
        "num_hidden_layers": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        **LATENT,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "blt": each("encoder_config", "decoder_config", hidden_size_global=32),
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "lsh"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}


# Configurations in parts, by their text part.
SPECIAL["qwen4_exp"] = {"text_config": SPECIAL["qwen4_exp_text"]}
SPECIAL["dots3_note"] = {"text_config": SPECIAL["dots3_note_text"]}


def tiny_config(family):
    """Return a configuration of the family with every size small, as its class allows."""
    transformers = import_transformers()
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    return shrink(kind, SPECIAL.get(family, {}))


def shrink(kind, special):
    """Return a configuration of this class, small; the configurations inside it too."""
    default = kind()
    values = {name: value for name, value in special.items() if name not in default.sub_configs}
    for name, value in vars(default).items():
        if name in values or name.startswith("_"):
            continue
        if name in default.sub_configs and hasattr(value, "to_dict"):
            values[name] = shrink(type(value), special.get(name, {})).to_dict()
        elif name in ("layer_types", "layers_block_type") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))  # some of each
            values[name] = [kinds[i % len(kinds)] for i in range(max(4, len(kinds)))]
        elif isinstance(value, int) and not isinstance(value, bool):
            values[name] = _small(name, value)
    return kind(**values)


def _small(name, value):
    if name.endswith("token_id"):
        return min(value, VOCABULARY - 1)
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value)


def all_families():
    """Return the names of the families that AutoModelForCausalLM knows."""
    return list(import_transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(family, **settings):
    """Return a model of the family with new weights, loaded as the recipe hf loads it."""
    import tempfile
    from pathlib import Path

    from hvdtrain.recipes.transformers_models.loading import load_model

    config = tiny_config(family)
    for name, value in settings.items():
        setattr(config.get_text_config(), name, value)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return load_model(None, Path(folder) / "config.json", "auto", seed=0)


@dataclass(frozen=True)
class Verdict:
    """What became of a family: "packed", "rows", "refused", "wrong", or "not made" where the tests cannot make one."""

    word: str
    why: str


def judge(family, length=48, ways=(), **settings):
    """Have the recipe find its way through a tiny model of the family, and judge its loss and gradient.

    The judge is the loss that transformers computes of each document alone. Samples are longer than every window.
    `ways`, where given, are tried in the place of the recipe's.
    """
    from hvdtrain.errors import UsageError
    from hvdtrain.recipes.transformers_models.probe import find_way

    import_transformers().utils.logging.set_verbosity_error()
    try:
        model = tiny_model(family, **settings)
    except Exception as error:
        return Verdict("not made", _short(error))
    import torch

    try:
        more = {"packed": ways} if ways else {}
        way = find_way(model, torch.arange(5, VOCABULARY - 20), length, **more)
    except UsageError as error:
        return Verdict("refused", str(error))
    difference = loss_difference(model, way, length)
    found = way.findings[-1].layout.name
    word = "rows" if "row" in found else "packed"
    chunks = "" if way.loss.head else ", logits whole"
    return Verdict(
        word if difference < 1e-4 else "wrong", f"loss and gradient differ by {difference:.0e}; {way}{chunks}"
    )


def loss_difference(model, way, length):
    """Return by how much our loss and its gradient differ from those of transformers for each document alone."""
    import torch

    model.eval()
    generator = torch.Generator().manual_seed(1)
    lengths = [[7, length - 20, 13], [length], [1, 2, length - 9, 6]]
    rows, alone = [], 0.0
    embeddings = model.get_input_embeddings().weight
    for sample in lengths:
        documents = [torch.randint(5, VOCABULARY - 20, (n,), generator=generator) for n in sample]
        rows.append(documents)
        for document in documents:
            if len(document) > 1:
                logits = model(input_ids=document[None, :]).logits
                alone = alone + torch.nn.functional.cross_entropy(logits[0, :-1], document[1:], reduction="sum")
    ours = way.loss(model, as_batch(rows), 4 * VOCABULARY * 20)["loss"]
    of_loss = float(abs(ours - alone).detach() / abs(alone).detach())
    try:
        (expected,) = torch.autograd.grad(alone, [embeddings])
    except AssertionError:  # the reformer has no gradient but while it draws random numbers
        return of_loss
    (gradient,) = torch.autograd.grad(ours, [embeddings])
    return max(of_loss, float((gradient - expected).norm() / expected.norm()))


def as_batch(samples):
    """Return samples of documents, int64 `(n,)` each, as `PackedDocuments` would; a short sample is filled up."""
    import torch

    length = max(sum(map(len, documents)) for documents in samples)
    columns = []
    for i, documents in enumerate(samples):
        filling = torch.zeros(length - sum(map(len, documents)), dtype=torch.int64)
        tokens = torch.cat([*documents, filling])
        targets = torch.cat([torch.cat((d[1:], torch.tensor([-100]))) for d in documents] + [filling - 100])
        number = torch.cat([torch.full_like(d, 10 * i + j) for j, d in enumerate(documents)] + [filling - 1])
        last = torch.arange(len(documents[-1]), len(documents[-1]) + len(filling))
        positions = torch.cat([torch.arange(len(d)) for d in documents] + [last])
        columns.append((tokens, targets, number, positions))
    return tuple(map(torch.stack, zip(*columns, strict=True)))


def _short(error):
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"/\S*/config\.json", "config.json", " ".join(lines))  # which lay in a folder of this moment
    return f"{type(error).__name__}: {text[:150]}"
