"""Shared by all tests: no model hub is ever reached, and tiny runs do not fight over the cores."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# at these sizes more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402  # what it imports reads the environment

WORDS = ["what", "is", "one", "two", "three", "four", "five", "the", "answer", "yes", "no", "maybe", "plus"]


@pytest.fixture(scope="session")
def word_tokenizer():
    """Returns a function that makes a tokenizer of these words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(words, **arguments):
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if "cls_token" in arguments:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="[CLS] $A [SEP]",
                pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))],
            )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **arguments)

    return make


@pytest.fixture(scope="session")
def deberta(tmp_path_factory, word_tokenizer):
    """As `OpenAssistant/reward-model-deberta-v3-large-v2`: a pair of question and answer, no chat template."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    folder = tmp_path_factory.mktemp("deberta")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]
    tokenizer = word_tokenizer(words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=24)
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, type_vocab_size=2, relative_attention=True, pos_att_type=["p2c", "c2p"],
        num_labels=1, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
