"""Small models whose words are known beforehand, and the run folders that hold them."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|im_end|>", "<|pad|>"
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: k for k, c in enumerate([*alphabet, EOS, PAD])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _random_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    shape |= {"bos_token_id": None, "eos_token_id": None, "initializer_range": 0.5}
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes}))


def _chain(successors: dict[str, str], **changes) -> LlamaForCausalLM:
    """A model whose most likely next token depends on the last one alone: `successors`, or the end token."""
    tokenizer = _byte_tokenizer()
    size = len(tokenizer)
    model = _random_llama(hidden_size=size + size % 4, num_hidden_layers=1, **changes)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, model.config.hidden_size))
        model.lm_head.weight.zero_()
        for token in range(size):
            model.lm_head.weight[tokenizer.eos_token_id, token] = 1.0
        for before, after in successors.items():
            (start,), (end,) = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"]
            model.lm_head.weight[end, start] = 2.0
    return model


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A function that makes a tokenizer with one token a byte and a chat template: `u:hello`, then `a:`."""
    return _byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return _byte_tokenizer()


@pytest.fixture(scope="session")
def random_llama():
    """A function that makes a two-layer Llama with random weights."""
    return _random_llama


@pytest.fixture(scope="session")
def chain():
    """A function that makes a model whose likeliest next token is the successor it is given for the last one."""
    return _chain


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run folder with a small random model."""
    folder = tmp_path / "run"
    _random_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
