"""Every data set that the seeds name loads as it is printed there.

The replicas have the columns, subsets, splits and file layout of the hub's, as their README.md files say them; each is
read as a local copy, by our own reader, and as the hub's, by `datasets`.
"""

import gzip
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from llmlab.data import sources
from llmlab.data.chat.conversations import load_conversations
from llmlab.data.chat.makers import PromptEncoder
from llmlab.data.sources import Tally, load_text
from llmlab.settings.data import DataSource
from llmlab.settings.errors import UserError


def turns(text, answer="Yes."):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def many(count, make):
    return [make(number) for number in range(count)]


def web_page(text):
    return {"text": text, "id": "<urn:1>", "url": "http://a", "language": "en", "language_score": 0.9}


def smoltalk(name):
    return lambda i: {
        "messages": turns(f"{name} {i}?"),
        "chat_template_kwargs": {"custom_instructions": "", "enable_thinking": False},
        "source": name,
    }


def chat_row(name):
    return lambda i: {"prompt": f"{name} {i}?", "prompt_id": str(i), "messages": turns(f"{name} {i}?")}


def message(name, parent, role, text, rank=None, **more):
    values = {"message_id": name, "parent_id": parent, "user_id": "u", "text": text, "role": role, "lang": "en"}
    tree = name.partition("-")[0]
    return values | {"rank": rank, "deleted": False, "message_tree_id": tree, "tree_state": "ready", **more}


OASST = [
    message("a", None, "prompter", "What is a monopsony?"),
    message("a-1", "a", "assistant", "A market.", 1.0),
    message("a-0", "a", "assistant", "A market with one buyer.", 0.0),
    message("b", None, "prompter", "And you?"),  # the trees' messages may be mixed
    message("a-0-x", "a-0", "prompter", "Thanks."),
    message("a-0-y", "a-0", "prompter", "Explain it to a dog."),
    message("a-0-y-1", "a-0-y", "assistant", "Woof.", 1.0),
    message("a-0-y-0", "a-0-y", "assistant", "Only one hand has treats.", 0.0),
    message("a-0-y-spam", "a-0-y", "assistant", "Buy now!", -1.0, deleted=True),
    message("b-0", "b", "assistant", "Me too."),
    message("b-0-x", "b-0", "prompter", "Fine."),  # nobody answered
]

PARQUET, LINES, GZIPPED = "parquet", "jsonl", "jsonl.gz"
REPLICAS = {  # name: (subsets: {split: rows}, the default subset, the files' format)
    "HuggingFaceFW/fineweb-edu": (
        {
            "default": {"train": many(30, lambda i: web_page(f"Dump {i}."))},
            "sample-10BT": {"train": many(5, lambda i: web_page(f"Sample {i}."))},
        },
        "default",
        PARQUET,
    ),
    "HuggingFaceFW/fineweb-2": (
        {
            "fra_Latn": {"train": [web_page("Bonjour.")], "test": [web_page("Test.")]},
            "spa_Latn": {"train": [web_page("Hola.")], "test": [web_page("Prueba.")]},
        },
        None,
        PARQUET,
    ),
    "HuggingFaceTB/smoltalk2": (
        {
            "Mid": {"Llama_Nemotron_r1": many(5, smoltalk("nemotron")), "OpenThoughts3_1.2M": many(5, smoltalk("o"))},
            "Preference": {
                "llama_3.1_tulu_3_8b_preference_mixture_no_think": many(
                    6, lambda i: {"prompt": f"P{i}?", "chosen": turns(f"P{i}?"), "rejected": turns(f"P{i}?", "No.")}
                )
            },
            "SFT": {
                "LongAlign_64k_Qwen3_32B_yarn_131k_think": many(20, smoltalk("long")),
                "OpenHermes_2.5_no_think": many(60, smoltalk("hermes")),
                "smoltalk_everyday_convs_reasoning_Qwen3_32B_think": many(40, smoltalk("everyday")),
            },
        },
        None,
        PARQUET,
    ),
    "OpenAssistant/oasst1": ({"default": {"train": OASST, "validation": OASST[-3:]}}, "default", PARQUET),
    "tatsu-lab/alpaca": (
        {"default": {"train": [{"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is ..."}]}},
        "default",
        PARQUET,
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"default": {split: many(4, chat_row(split)) for split in ("train_sft", "test_sft", "train_gen", "test_gen")}},
        "default",
        PARQUET,
    ),
    "Anthropic/hh-rlhf": (
        {
            "default": {
                split: [
                    {
                        "chosen": f"\n\nHuman: {split}?\n\nAssistant: Y.",
                        "rejected": f"\n\nHuman: {split}?\n\nAssistant: N.",
                    }
                ]
                for split in ("train", "test")
            }
        },
        "default",
        GZIPPED,
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        {
            "default": {
                "train": [
                    {
                        "source": "evol_instruct",
                        "instruction": "Why?",
                        "chosen_response": "Because.",
                        "rejected_response": "No.",
                        "chosen_avg_rating": 4.5,
                        "rejected_avg_rating": 2.0,
                        "chosen_model": "gpt-4",
                    }
                ]
            }
        },
        "default",
        PARQUET,
    ),
}


@pytest.fixture
def replica(tmp_path, monkeypatch):
    """Returns a function that writes a replica below the current folder, under the hub's name."""
    monkeypatch.chdir(tmp_path)

    def write(name):
        subsets, default, kind = REPLICAS[name]
        configs = []
        for subset, splits in subsets.items():
            files = []
            for split, rows in splits.items():
                path = tmp_path / name / subset / f"{split}-00000-of-00001.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == PARQUET:
                    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
                else:
                    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
                files.append({"split": split, "path": f"{subset}/{split}-*"})
            configs.append({"config_name": subset, "data_files": files})
            if subset == default and len(subsets) > 1:
                configs[-1]["default"] = True
        readme = f"---\nlicense: odc-by\n{yaml.safe_dump({'configs': configs})}---\n\n# {name}\n"
        (tmp_path / name / "README.md").write_text(readme)

    return write


@pytest.fixture(params=["local", "hub", "stream"])
def read_as(request, monkeypatch, tmp_path):
    """Makes sources be read by our own reader, by `datasets` from its cache, and by `datasets` as they come."""
    if request.param != "local":
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")

        def find(source, path, use):
            return sources._find_hub(source, use, request.param == "stream", None)

        monkeypatch.setattr(sources, "_find_local", find)
    return request.param


def texts(printed):
    return list(load_text(DataSource.model_validate(printed)).texts(Tally()))


def conversations(printed, **options):
    tally = Tally()
    found = load_conversations(DataSource.model_validate(printed), **options)
    read = list(found.conversations(tally))
    assert not tally.dropped
    return read, found


def test_pretraining_data(replica, read_as):
    replica("HuggingFaceFW/fineweb-edu")
    replica("HuggingFaceFW/fineweb-2")
    assert texts("HuggingFaceFW/fineweb-edu")[::29] == ["Dump 0.", "Dump 29."]
    assert texts("HuggingFaceFW/fineweb-edu | sample-10BT")[0] == "Sample 0."
    assert texts("HuggingFaceFW/fineweb-2 | fra_Latn | 1.0") == ["Bonjour."]
    assert texts("HuggingFaceFW/fineweb-2 | spa_Latn | 2.0 | test") == ["Prueba."]
    with pytest.raises(UserError, match=r"fineweb-2: it has several subsets \(fra_Latn, spa_Latn\); name the one"):
        texts("HuggingFaceFW/fineweb-2")
    with pytest.raises(UserError, match="fra_Latin"):
        texts("HuggingFaceFW/fineweb-2 | fra_Latin")


@pytest.mark.parametrize("printed", ["HuggingFaceTB/smoltalk2", "HuggingFaceTB/smoltalk2 | SFT"])
def test_smoltalk2_is_the_mixture_of_its_named_sets(replica, read_as, printed):
    replica("HuggingFaceTB/smoltalk2")
    read, found = conversations(printed)
    asked = [row["messages"][0]["content"] for row in read]
    assert len(set(asked)) == 120  # each row once
    assert Counter(text.split()[0] for text in asked) == {"long": 20, "hermes": 60, "everyday": 40}
    half = Counter(text.split()[0] for text in asked[:40])
    assert len(half) == 3  # any beginning is of all of them
    assert len(found.splits) == 3
    one, _ = conversations("HuggingFaceTB/smoltalk2 | SFT | 1 | OpenHermes_2.5_no_think")
    assert len(one) == 60
    two, _ = conversations("HuggingFaceTB/smoltalk2 | Mid | | Llama_Nemotron_r1 + OpenThoughts3_1.2M")
    assert len(two) == 10
    with pytest.raises(
        UserError, match="no split 'OpenHermes_2.5_think' here; did you mean 'OpenHermes_2.5_no_think'"
    ):
        conversations("HuggingFaceTB/smoltalk2 | SFT | 1 | OpenHermes_2.5_think")
    with pytest.raises(UserError, match=r"no split 'train' here.* \(found LongAlign_64k.*, OpenHermes"):
        conversations("HuggingFaceTB/smoltalk2 | SFT | 1 | train")
    pairs, _ = conversations(printed.partition(" |")[0], use="preferences")
    assert len(pairs) == 6


def test_oasst1_is_conversations_of_the_best_ranked_replies(replica, read_as):
    replica("OpenAssistant/oasst1")
    read, found = conversations("OpenAssistant/oasst1")
    said = [[(turn["role"], turn["content"]) for turn in row["messages"]] for row in read]
    assert said == [
        [
            ("user", "What is a monopsony?"),
            ("assistant", "A market with one buyer."),
            ("user", "Explain it to a dog."),
            ("assistant", "Only one hand has treats."),
        ],
        [("user", "And you?"), ("assistant", "Me too.")],
    ]
    assert found.splits == ("train", "validation")
    assert len(texts("OpenAssistant/oasst1")) == len(OASST)  # as plain text each message stands alone


def test_alpaca(replica, read_as):
    replica("tatsu-lab/alpaca")
    read, _ = conversations("tatsu-lab/alpaca")
    assert read[0]["messages"] == turns("Add.\n\n1 2", "3")


def test_ultrachat_is_read_from_train_sft(replica, read_as):
    replica("HuggingFaceH4/ultrachat_200k")
    read, _ = conversations("HuggingFaceH4/ultrachat_200k")
    assert [row["messages"][0]["content"] for row in read] == [f"train_sft {i}?" for i in range(4)]
    read, _ = conversations("HuggingFaceH4/ultrachat_200k | | | test_gen")
    assert read[0]["messages"][0]["content"] == "test_gen 0?"
    with pytest.raises(UserError, match=r"no split 'train' here \(found test_gen, .*name the one to read: Hugging"):
        conversations("HuggingFaceH4/ultrachat_200k", use="preferences")


def test_hh_rlhf_gives_pairs_and_prompts(replica, read_as):
    replica("Anthropic/hh-rlhf")
    read, _ = conversations("Anthropic/hh-rlhf", use="preferences")
    assert [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in read] == [("train?", "Y.")]
    prompts = PromptEncoder(None, max_prompt_length=None).open(DataSource(name="Anthropic/hh-rlhf"))
    assert [prompts.read(row)["prompt"][0]["content"] for row in prompts.rows] == ["train?"]


def test_ultrafeedback_gives_pairs_answers_and_prompts(replica, read_as):
    name = "argilla/ultrafeedback-binarized-preferences"
    replica(name)
    read, _ = conversations(name, use="preferences")
    assert read[0]["prompt"] == [{"role": "user", "content": "Why?"}]
    assert [read[0][side][0]["content"] for side in ("chosen", "rejected")] == ["Because.", "No."]
    assert conversations(name)[0][0]["messages"] == turns("Why?", "Because.")
    prompts = PromptEncoder(None, max_prompt_length=None).open(DataSource(name=name))
    assert [prompts.read(row)["prompt"] for row in prompts.rows] == [turns("Why?")[:1]]


def test_a_hub_data_set_larger_than_the_need_is_not_downloaded(replica, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    replica("HuggingFaceH4/ultrachat_200k")

    def find(at_most):
        return sources._find_hub(DataSource(name="HuggingFaceH4/ultrachat_200k"), "instructions", False, at_most)

    few = find(2)  # how many there are is not known before
    assert few.count is None and len(list(few.rows)) == 4
    assert not list(tmp_path.glob("hf/**/*.arrow"))
    every = find(None)
    assert every.count == 4
    assert list(tmp_path.glob("hf/**/*.arrow"))
    assert every.identity != few.identity
    monkeypatch.setattr(sources, "_fits_disk", lambda info: False)
    assert find(None).identity == few.identity


def test_a_folder_without_training_data_says_so(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"no split 'train' here \(found test\); name the one to read: .* test$"):
        load_text(DataSource(name=str(tmp_path)))
    assert texts(f"{tmp_path} | | | test") == ["a"]
