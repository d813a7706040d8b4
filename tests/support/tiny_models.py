"""Tiny models and tokenizers of transformers, made on the spot: nothing is downloaded."""

from hugging import import_transformers

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


def make_tokenizer(folder, template=CHAT_TEMPLATE):
    """Write a byte-level BPE of 300 tokens, with the tokens of the templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    transformers = import_transformers()
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["hello world, how are you; def f(self): return self.x"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_config(family):
    """Return a tiny configuration of a family of models."""
    transformers = import_transformers()
    positions = {"max_position_embeddings": 64}
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_positions=64)
    if family == "llama":
        return transformers.LlamaConfig(**SIZES, **positions, intermediate_size=48, num_key_value_heads=2)
    kind = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[family]
    return kind(**SIZES, **positions, intermediate_size=48, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)


def make_model(folder, family, template=CHAT_TEMPLATE):
    """Write a model with random weights and its tokenizer."""
    import torch

    transformers = import_transformers()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(make_config(family)).save_pretrained(folder)
    make_tokenizer(folder, template)
    return folder
