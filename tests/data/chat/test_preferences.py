"""Preference rows: the tokens that TRL makes of the same messages, what is cut, what is lost, and what is refused."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from llmlab.data.chat.makers import PreferenceEncoder
from llmlab.data.chat.rows import build_rows
from llmlab.data.tokenizer import load_tokenizer
from llmlab.settings.data import DataSettings
from llmlab.settings.errors import UserError

LENGTHS = ("prompt_ids", "chosen_ids", "rejected_ids")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count):
    return [{"prompt": f"Question {k}?", "chosen": f"Yes {k}.", "rejected": f"No {k}, never."} for k in range(count)]


def message(role, content):
    return {"role": role, "content": content}


def pair(prompt="Who is it?", chosen="It is Mia.", rejected="It is Tom.", tools=None):
    sides = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
    return {"prompt": [message("user", prompt)], **sides, "tools": tools}


@pytest.fixture
def tokenizer(tokenizer_folder):
    """One of our own: its template is changed here."""
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def make(tokenizer):
    """Returns a function that makes a row of a pair."""

    def make(pair, max_length=512, **options):
        return PreferenceEncoder(tokenizer, max_length=max_length, **options).make(pair)

    return make


@pytest.fixture
def build(tokenizer, tmp_path):
    def build(*sources, max_length=128, max_prompt_length=None, allow_truncated=0.05, **changes):
        values = {"validation_fraction": 0, "cache_dir": str(tmp_path / "cache"), "num_proc": 1, **changes}
        maker = PreferenceEncoder(tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
        settings = DataSettings(datasets=list(sources), **values)
        return build_rows(settings, maker, seed=3, allow_truncated=allow_truncated)

    return build


def test_rows_are_those_of_trl(build, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    long = [message("system", "Be brief."), message("user", "Hi."), message("assistant", "Hello!")]
    rows = [
        {key: value for key, value in pair().items() if key != "tools"},
        {**pair("ö?", "日本.", "\n\n yes"), "prompt": [*long, message("user", "Who?")]},
        {
            "prompt": [message("user", "Who?")],
            "chosen": [message("assistant", "Me."), message("user", "And?"), message("assistant", "You.")],
            "rejected": [message("assistant", "Me, me. ")],
        },
    ]
    rows = [{key: value for key, value in row.items() if key != "tools"} for row in rows]
    ours = build(write(tmp_path / "a.jsonl", rows)).train
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)) for _ in range(2))
    theirs = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=128),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset
    for name in LENGTHS:
        assert ours[name][:] == theirs[name][:], name
    assert len(ours) == 3


def test_a_completion_is_the_answer_and_the_end_of_its_turn(make, tokenizer):
    row = make(pair())
    assert tokenizer.decode(row["prompt_ids"]).endswith("Who is it?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(row["chosen_ids"]) == "It is Mia.<|im_end|>\n"
    assert tokenizer.decode(row["rejected_ids"]) == "It is Tom.<|im_end|>\n"
    assert row["problem"] == "" and not row["lost"] and row["cut"] == row["prompt_cut"] == 0
    assert row["tokens"] == 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def test_tools_are_in_the_prompt(make, tokenizer):
    tool = {"type": "function", "function": {"name": "find_ball", "parameters": {}}}
    assert "find_ball" in tokenizer.decode(make(pair(tools=[tool]))["prompt_ids"])


def test_prompts_lose_their_beginning_and_completions_their_end(make):
    whole = make(pair(chosen="It is Mia the fox, and Tom the owl.", rejected="Tom."))
    prompt, chosen, rejected = (whole[name] for name in LENGTHS)
    assert len(chosen) > 8 > len(rejected)
    options = {"max_prompt_length": 5, "max_length": 5 + 8}
    row = make(pair(chosen="It is Mia the fox, and Tom the owl.", rejected="Tom."), **options)
    assert row["prompt_ids"] == prompt[-5:]
    assert row["chosen_ids"] == chosen[:8]  # 13 tokens in all, 5 of them the prompt's
    assert row["rejected_ids"] == rejected
    assert (row["prompt_cut"], row["cut"], row["lost"]) == (1, 1, False)
    assert row["tokens"] == 2 * 5 + 8 + len(rejected)
    assert row["whole"] == len(prompt) + len(chosen)
    exact = make(pair(), max_prompt_length=len(prompt))
    assert exact["prompt_ids"] == prompt and exact["prompt_cut"] == 0


def test_pairs_that_are_cut_to_the_same_are_lost(make):
    together = {"chosen": "It is my old friend Mia.", "rejected": "It is my old friend Tom."}
    whole = make(pair(**together))
    prompt, chosen, rejected = (whole[name] for name in LENGTHS)
    same = next(k for k, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    assert make(pair(**together), max_length=len(prompt) + same)["lost"]
    assert not make(pair(**together), max_length=len(prompt) + same + 1)["lost"]
    assert make(pair(**together), max_length=len(prompt))["lost"]
    row = make(pair(**together), max_length=len(prompt) - 2)
    assert row["lost"] and row["chosen_ids"] == []


def test_what_was_read_cut_lost_and_dropped_is_reported(build, tmp_path):
    rows = pairs(36)
    rows += [{"prompt": "word " * 60 + "Who?", "chosen": "Me.", "rejected": "You."}]  # its beginning is cut
    rows += [{"prompt": "Who?", "chosen": "Me." * 60, "rejected": "You."}]  # its end is cut
    rows += [{"prompt": "Who?", "chosen": "Me. " * 60 + "a", "rejected": "Me. " * 60 + "b"}]  # nothing is left
    rows += [{"prompt": "Who?", "chosen": "Me.", "rejected": "Me."}]
    rows += [{"prompt": "Who?", "chosen": "Me.", "rejected": ""}]
    source = write(tmp_path / "a.jsonl", rows)
    data = build(source, max_length=80, max_prompt_length=40, allow_dropped=0.05)
    report = data.reports[0]
    assert report.dropped == {"chosen and rejected are the same": 1, "an empty completion": 1}
    assert (report.rows, report.trained_rows, report.lost) == (41, 38, 1)
    assert (report.counts["prompt_cut"], report.counts["cut"]) == (1, 1)
    assert report.counts["tokens"] == sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in data.train
    )
    summary = report.summary()
    for part in (
        "(preference)",
        "38 rows",
        "1 prompts truncated on the left",
        "1 truncated",
        "1 left out: no trained token left after truncation",
    ):
        assert part in summary
    assert "1 dropped: an empty completion" in summary
    assert max(map(len, data.train["prompt_ids"])) == 40
    with pytest.raises(UserError, match="2 of 41 rows cannot be used, the first is row 40: 1 x chosen and rejected"):
        build(source, max_length=80, max_prompt_length=40, allow_dropped=0.01)
    with pytest.raises(
        UserError, match="nothing left to train after truncation to max_length = 80, the first is row 39"
    ):
        build(source, max_length=80, max_prompt_length=40, allow_dropped=0.05, allow_truncated=0)


def test_limits_change_the_cached_rows(build, tmp_path):
    source = write(tmp_path / "a.jsonl", pairs(4))
    assert max(map(len, build(source).train["prompt_ids"])) > 5
    assert max(map(len, build(source, max_prompt_length=5).train["prompt_ids"])) == 5


def test_formats_mix(build, tokenizer, tmp_path):
    turns = [message("user", "Hi"), message("assistant", "Second")]
    two = write(tmp_path / "b.jsonl", [{"chosen": turns, "rejected": [turns[0], message("assistant", "x")]}])
    data = build(write(tmp_path / "a.jsonl", pairs(4)), two)
    assert [report.form for report in data.reports] == ["preference", "hh-rlhf transcript"]
    assert {"Second", "Yes 1."} <= {
        tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in data.train["chosen_ids"]
    }


OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (OPEN + "{% endfor %}" + PROMPT, "row 1 .* would never stop: it ends with"),
        (
            OPEN + "<|im_end|>{% if messages | length > 1 %} once more{% endif %}\n{% endfor %}" + PROMPT,
            "4 of 4 rows cannot be used, .* 4 x the chat template renders the prompt differently",
        ),
        (
            "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
            + OPEN + "<|im_end|>\n{% endfor %}" + PROMPT,
            "4 x the chat template refuses the prompt alone: too short",
        ),
        ("{{ raise_exception('never') }}", "4 x the chat template refuses it: never"),
        (OPEN.replace("m.content", "messages[0].content") + "<|im_end|>\n{% endfor %}" + PROMPT,
            "4 x chosen and rejected are the same"),
    ],
)  # fmt: skip
def test_templates_that_would_train_the_wrong_thing_stop_the_run(build, tokenizer, tmp_path, template, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        build(write(tmp_path / "a.jsonl", pairs(4)))


def test_a_token_over_the_boundary_belongs_to_the_completions(make, tokenizer):
    """Without a special token before the answer, the prompt's last space becomes a part of the answer's first word."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = make(pair(chosen="the fox", rejected="and the owl"))
    assert tokenizer.decode(row["prompt_ids"]) == "user: Who is it?\nassistant:"
    assert tokenizer.decode(row["chosen_ids"]) == " the fox<|im_end|>\n"
    assert tokenizer.decode(row["rejected_ids"]) == " and the owl<|im_end|>\n"


def test_no_chat_template(build, tokenizer, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="this tokenizer has no chat template"):
        build(write(tmp_path / "a.jsonl", pairs(4)))
