"""Tokenizers: any text comes back, special tokens keep apart, and the chat template marks what is to be learned."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.tokenizer import (
    SMALLEST,
    SPECIAL_TOKENS,
    TOOL_TAGS,
    learn_bpe,
    load_tokenizer,
    stop_token_ids,
)
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError

STORIES = DataSource(name="demo/stories", subset="100kB")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_stations",
            "description": "Finds stations near a <place>",
            "parameters": {"type": "object", "properties": {"radius_km": {"type": "number"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "find_stations", "arguments": {"radius_km": 2.5, "ort": "Zürich"}}}
CONVERSATION = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Stations near me?"},
    {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "find_stations", "content": "Main Station, 400 m"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "find_stations", "arguments": '{"radius_km": 9}'}]},
    {"role": "tool", "content": {"stations": ["North", "South"]}},
    {"role": "assistant", "content": "North and South."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "Any time.\n"},
]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@given(st.binary(max_size=30))
def test_any_bytes_that_are_text_have_ids(tokenizer, data):
    text = data.decode("utf-8", errors="replace")
    assert tokenizer.unk_token_id is None
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_ids_of_their_own(tokenizer):
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *TOOL_TAGS])
    assert len(set(ids)) == len(ids)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|im_start|>",
        "<|pad|>",
    )
    assert len(tokenizer) == 512
    assert max(tokenizer.get_vocab().values()) == 511
    assert stop_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


def test_nothing_is_added_to_plain_text_and_digits_stand_alone(tokenizer):
    assert tokenizer("Hello")["input_ids"] == tokenizer("Hello", add_special_tokens=False)["input_ids"]
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_tool_tags_are_one_token_each_and_survive_decoding(tokenizer):
    text = '<tool_call>\n{"name": "x"}\n</tool_call><|im_end|>'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_mask_covers_what_the_assistant_says_and_its_end(tokenizer, tools):
    rendered = tokenizer.apply_chat_template(
        CONVERSATION, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    spoken, turns = [], []
    for number, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True):
        if mask:
            spoken.append(number)
        elif spoken:
            turns.append(tokenizer.decode(spoken))
            spoken = []
    call = '<tool_call>\n{"name": "find_stations", "arguments": {"radius_km": 2.5, "ort": "Zürich"}}\n</tool_call>'
    assert turns == [
        f"Let me look.\n{call}\n{call}<|im_end|>",
        '<tool_call>\n{"name": "find_stations", "arguments": {"radius_km": 9}}\n</tool_call><|im_end|>',
        "North and South.<|im_end|>",
        "Any time.\n<|im_end|>",
    ]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("first", [0, 1])
def test_a_conversation_only_grows_at_its_end(tokenizer, tools, first):
    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    messages = CONVERSATION[first:]
    whole = render(messages)
    for count in range(1, len(messages)):
        assert whole.startswith(render(messages[:count]))
        if messages[count]["role"] == "assistant":
            assert whole.startswith(render(messages[:count], add_generation_prompt=True))


def test_tools_calls_and_results_are_rendered_in_full(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tools=TOOLS, tokenize=False)
    head = text[: text.index("<|im_end|>")]
    assert head.startswith("<|im_start|>system\nYou are brief.\n\n")
    assert json.dumps(TOOLS[0]) in head
    assert text.count("You are brief.") == 1
    for part in ('"ort": "Zürich"', "Main Station, 400 m", '{"stations": ["North", "South"]}'):
        assert part in text
    assert text.count("<tool_response>\n") == text.count("\n</tool_response><|im_end|>") == 2
    assert tokenizer.apply_chat_template(CONVERSATION[1:2], tokenize=False) == (
        "<|im_start|>user\nStations near me?<|im_end|>\n"
    )


def test_a_saved_tokenizer_is_an_ordinary_folder(tokenizer, tokenizer_folder, tmp_path):
    names = {path.name for path in tokenizer_folder.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    copy = tmp_path / "copy"
    tokenizer.save_pretrained(copy)
    again = load_tokenizer(str(copy))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert again.all_special_ids == tokenizer.all_special_ids
    beside_its_config = load_tokenizer(str(copy / "tokenizer.json"))
    assert beside_its_config.chat_template == tokenizer.chat_template
    shutil.copy(copy / "tokenizer.json", tmp_path / "bare.json")
    bare = load_tokenizer(str(tmp_path / "bare.json"))
    assert (bare.eos_token, bare.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_bytes_alone_are_the_smallest_vocabulary(tmp_path):
    tokenizer = learn_bpe([STORIES], SMALLEST, tmp_path / "bytes", show_progress=False)
    assert len(tokenizer) == SMALLEST
    assert len(tokenizer("Once upon a time")["input_ids"]) == len("Once upon a time")


def test_weights_share_out_the_bytes(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name * 9} " * 1000)
    sources = [DataSource(name=str(tmp_path / "a.txt"), weight=9), DataSource(name=str(tmp_path / "b.txt"))]
    tokenizer = learn_bpe(sources, 268, tmp_path / "t", max_bytes=1000, show_progress=False)
    merged = [token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) <= {"a", "b", "Ġ"}]
    assert merged
    assert all("b" not in token for token in merged)  # 900 bytes of a, 100 of b: the first merges are all of a


def test_sizes_that_cannot_be_are_answered(tmp_path):
    with pytest.raises(UserError, match=f"vocab_size = 100: expected at least {SMALLEST}: 256 bytes"):
        learn_bpe([STORIES], 100, tmp_path / "t")
    (tmp_path / "short.txt").write_text("abcabc abcabc")
    with pytest.raises(UserError, match="vocab_size = 5000: .*short.txt has enough merges for 2[67][0-9] entries"):
        learn_bpe([DataSource(name=str(tmp_path / "short.txt"))], 5000, tmp_path / "t", show_progress=False)
    assert not (tmp_path / "t").exists()


def test_other_folders_are_not_overwritten(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match="holds more than a tokenizer .model.safetensors."):
        learn_bpe([STORIES], 300, folder)
    with pytest.raises(UserError, match="this is a file; expected a folder"):
        learn_bpe([STORIES], 300, folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "llmlab.json").write_text("{}")
    for size in (300, 310):  # a tokenizer is replaced, its run's record stays
        learn_bpe([STORIES], size, folder, show_progress=False)
        assert len(load_tokenizer(str(folder))) == size
        assert (folder / "llmlab.json").read_text() == "{}"
        assert not list(folder.glob(".saving-*"))


def test_missing_and_broken_tokenizers_are_named(tmp_path, tokenizer_folder):
    with pytest.raises(UserError, match="did you mean 'tokenizer.json'"):
        load_tokenizer(str(tokenizer_folder / "tokeniser.json"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_tokenizer("./no/such/folder")
    with pytest.raises(UserError, match="no tokenizer in this folder; expected tokenizer.json .found nothing"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="broken.json: cannot be read as a tokenizer.json"):
        load_tokenizer(str(tmp_path / "broken.json"))
    with pytest.raises(UserError, match="nobody/nothing: there is no such folder, and the hub gave none"):
        load_tokenizer("nobody/nothing")
