"""Chat templates in the manner of published ones, and tokenizers of several kinds for them."""

from hugging import import_transformers

# Template, and what it writes after an answer that is learned as its end. Written anew: only their manner is published.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "headers": (  # begins with a token of its own
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
        "{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}",
        "<|eot|>",
    ),
    "instructions": (  # refuses roles that do not alternate; an answer's end is the end of text
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        "</s>",
    ),
    "turns": (  # no system role; the assistant has another name
        "{{ bos_token }}{% if messages and messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "next_ends": (  # what ends an answer is what begins the next message
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>",
    ),
    "lines": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
    ),
    "thoughts_dropped": (  # from all answers but the last
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "asks_for_thoughts": (  # and answers have none
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
        "{% else %}<|assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
        "</s>",
    ),
    "first_message": (  # looks at the first message, and so refuses none
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}{% for m in messages %}"
        "{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "plain": (  # nothing ends an answer
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        "</s>",
    ),
    "tools": (
        "{% if tools %}<|system|>{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
        "<call>{{ call.function.name }}({{ call.function.arguments.city }})</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
}
SPECIAL = [
    *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "<start_of_turn>"),
    *("<end_of_turn>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<think>", "</think>"),
]
KINDS = ("bytes", "blanks", "blanks_first", "python")
_TEXT = [
    "hello world, how are you",
    "hello there: world",
    "1 2 3 where is it?",
    "be brief USER: ASSISTANT: SYSTEM:",
] * 9


def make_chat_tokenizer(kind, template):
    """Return a tokenizer with a template.

    bytes: byte-level BPE. blanks: as SentencePiece, with a blank before the text; blanks_first: before its beginning
    alone. python: without tokens' places.
    """
    transformers = import_transformers()
    if kind == "python":
        tokenizer = _characters()(
            bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=SPECIAL[3:]
        )
    else:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=_trained(kind),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            extra_special_tokens=SPECIAL[3:],
        )
    tokenizer.chat_template = TEMPLATES[template][0]
    return tokenizer


def _trained(kind):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        scheme = "always" if kind == "blanks" else "first"
        inner = Tokenizer(models.BPE(unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
        alphabet = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(_TEXT, trainer)
    return inner


def _characters():
    """Return the class of a tokenizer in Python: a token a character."""
    transformers = import_transformers()

    class Characters(transformers.PreTrainedTokenizer):
        vocab_size = 300

        def get_vocab(self):
            return {chr(i): i for i in range(300)} | self.added_tokens_encoder

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return min(ord(token), 299) if len(token) == 1 else 299

        def _convert_id_to_token(self, index):
            return chr(index)

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    return Characters
