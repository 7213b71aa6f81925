"""Preference pairs from samples: the best against the worst, why a prompt gives none, and the file that results."""

import json
import random
from collections import Counter

import pytest

from llmlab.cli.app import main
from llmlab.data.chat.makers import PreferenceEncoder
from llmlab.data.chat.rows import build_rows
from llmlab.data.tokenizer import load_tokenizer
from llmlab.inference import load_for_inference
from llmlab.rewards.compose import compose
from llmlab.settings.data import DataSettings, DataSource
from llmlab.settings.errors import UserError
from llmlab.settings.generation import SamplingSettings
from llmlab.training.preference import pairs as pairs_module
from llmlab.training.preference.pairs import Prompt, load_prompts, sample_pairs, summarize

SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
ANSWERED = {"role": "assistant", "content": "Me."}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_reward(completions, **columns):
    """A word, a point; none at all for what says "no score"."""
    texts = [completion[0]["content"] for completion in completions]
    return [None if text == "no score" else float(len(text.split())) for text in texts]


@pytest.fixture
def model(base_folder):
    return load_for_inference(str(base_folder), dtype="fp32", device="cpu")


@pytest.fixture
def judge(model, monkeypatch):
    """Returns a function that judges completions as if the model had written them."""

    def judge(*completions, prompts=None, reward=words_reward, max_new_tokens=40, **options):
        def fill(samples, sample, tokenizer, ends):
            for each, text in zip(samples, list(completions) * 9, strict=False):
                each.completion = [{"role": "assistant", "content": text}]
                each.ended = len(tokenizer(text, add_special_tokens=False)["input_ids"]) < max_new_tokens

        monkeypatch.setattr(pairs_module, "complete", fill)
        sampling = SamplingSettings(max_new_tokens=max_new_tokens)
        options = {"num_samples": len(completions), **options}
        composed = compose([reward], normalize=False)
        return list(sample_pairs(*model, prompts or [Prompt([ASKED], {})], composed, sampling, **options))

    return judge


def test_the_best_against_the_worst(judge):
    (judged,) = judge("a cat", "a", "a cat sat down", "a cat sat")
    answers = [[{"role": "assistant", "content": text}] for text in ("a cat sat down", "a")]
    assert [sample.reward for sample in judged.samples] == [2, 1, 4, 3] and judged.reason == ""
    assert judged.pair == {"prompt": [ASKED], "chosen": answers[0], "rejected": answers[1], "scores": [4, 1]}


@pytest.mark.parametrize(
    ("completions", "options", "reason"),
    [
        (("a cat", "a dog"), {}, "scores differ by less than 0.1"),
        (("a cat", "a"), {"min_difference": 1.5}, "scores differ by less than 1.5"),
        (("no score", "no score"), {}, "no reward applies to it"),
        (("no score", "a cat"), {}, "fewer than two non-empty completions"),
        (("a cat", " \n"), {}, "fewer than two non-empty completions"),
        (("a cat sat", "a dog sat down"), {"max_new_tokens": 1}, "no completion ended before max_new_tokens"),
    ],
)
def test_a_prompt_without_a_pair_says_why(judge, completions, options, reason):
    (judged,) = judge(*completions, **options)
    assert judged.pair is None and judged.reason.startswith(reason)


def test_the_same_text_is_no_pair_whatever_it_scores(judge):
    (judged,) = judge("a cat", "a cat\n", reward=lambda completions, **columns: [1, 0])
    assert judged.reason == "chosen and rejected are the same"


def test_what_was_cut_off_is_never_chosen_but_may_be_rejected(judge, model):
    long = "a cat sat down on the mat"
    room = len(model[1](long, add_special_tokens=False)["input_ids"])
    (judged,) = judge(long, "a", "a cat", max_new_tokens=room)  # as many tokens as there was room for: no end
    assert judged.pair["chosen"][0]["content"] == "a cat" and judged.pair["scores"] == [2, 1]
    (judged,) = judge(long, "a", "a cat", max_new_tokens=room + 1)
    assert judged.pair["chosen"][0]["content"] == long
    fewer = lambda completions, **columns: [-float(len(each[0]["content"])) for each in completions]  # noqa: E731
    (judged,) = judge(long, "a", "a cat", max_new_tokens=room, reward=fewer)
    assert judged.pair["chosen"][0]["content"] == "a" and judged.pair["rejected"][0]["content"] == long


def test_rewards_are_given_the_prompt_and_its_columns(judge):
    seen = []

    def reward(completions, prompts, answer, **columns):
        seen.append((prompts, answer, sorted(columns)))
        return [each[0]["content"] == right for each, right in zip(completions, answer, strict=True)]

    prompts = [Prompt([ASKED], {"answer": "a", "id": 7}), Prompt([SYSTEM, ASKED], {"answer": "b", "id": 8})]
    first, second = judge("a", "b", prompts=prompts, reward=reward)
    assert first.pair["chosen"][0]["content"] == "a" and second.pair["chosen"][0]["content"] == "b"
    assert [(given, answer) for given, answer, _ in seen] == [
        ([[ASKED]] * 2, ["a", "a"]),
        ([[SYSTEM, ASKED]] * 2, ["b", "b"]),
    ]
    assert all("id" in names for _, _, names in seen)


def test_a_prompt_that_fills_the_context_is_counted(judge):
    long = Prompt([{"role": "user", "content": "word " * 200}], {})
    skipped, judged = judge("a cat", "a", prompts=[long, Prompt([ASKED], {})])
    assert skipped.reason == "longer than the model's context of 128 tokens" and judged.pair
    report = summarize([skipped, judged], Counter({"without 'prompt'": 2}))
    assert (report.prompts, report.completions, len(report.pairs)) == (4, 2, 1)
    assert (report.mean, report.best, report.worst) == (1.5, 2, 1)
    assert report.without == {skipped.reason: 1, "without 'prompt'": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_difference": 0}, "min_difference = 0: expected more than 0"),
        ({"min_difference": float("nan")}, "min_difference = nan"),
        ({"num_samples": 1}, "num_samples = 1: a pair takes"),
    ],
)
def test_no_pair_can_be_made_of_that(judge, options, message):
    with pytest.raises(UserError, match=message):
        judge("a", "b", **options)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Who?"}, [ASKED]),
        ({"prompt": "Who?", "system": "Be brief.", "answer": "x"}, [SYSTEM, ASKED]),
        ({"prompt": [SYSTEM, ASKED]}, [SYSTEM, ASKED]),
        ({"messages": [ASKED, ANSWERED, ASKED, ANSWERED]}, [ASKED, ANSWERED, ASKED]),
        ({"prompt": "Who?", "chosen": "Me.", "rejected": "You."}, [ASKED]),
        ({"messages": [SYSTEM, ASKED]}, [SYSTEM, ASKED]),
        ({"messages": [SYSTEM, ASKED, ANSWERED]}, [SYSTEM, ASKED]),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]}, [ASKED]),
        ({"question": "Who?", "answer": "Me."}, [ASKED]),
        ({"instruction": "Who?", "output": "Me."}, [ASKED]),
        ({"chosen": "\n\nHuman: Who?\n\nAssistant: Me.", "rejected": "\n\nHuman: Who?\n\nAssistant: I."}, [ASKED]),
        ({"text": "Who?"}, [ASKED]),
    ],
)
def test_prompts_of_any_format(tmp_path, row, prompt):
    path = write(tmp_path / "prompts.jsonl", [row])
    ((asked,), unusable) = load_prompts(DataSource(name=str(path)))
    assert asked.messages == prompt and not unusable
    assert asked.columns == {key: value for key, value in row.items() if key != "prompt"}


def test_rows_without_a_prompt_are_counted(tmp_path):
    rows = [{"prompt": "Who?"}, {"prompt": None}, {"prompt": " "}, {"prompt": 5}, {"prompt": [ANSWERED]}, {"x": 1}]
    path = write(tmp_path / "prompts.jsonl", [*rows, {"prompt": "Add.", "tools": [{"name": "add"}]}])
    prompts, unusable = load_prompts(DataSource(name=str(path)))
    assert len(prompts) == 1
    assert unusable == {
        "without 'prompt'": 2,
        "an empty prompt": 1,
        "a prompt that does not end with the user's turn": 1,
        "expected text, found int": 1,
        "prompts with tools are not supported here": 1,
    }
    assert len(load_prompts(DataSource(name=str(path)), limit=1)[1]) == 0
    with pytest.raises(UserError, match=r"no prompt in its 1 rows \(1 x an empty prompt\)"):
        load_prompts(DataSource(name=str(write(path, [{"prompt": ""}]))))
    with pytest.raises(UserError, match="no format of prompts has the columns quest; .*closest is question"):
        load_prompts(DataSource(name=str(write(path, [{"quest": "Who?"}]))))


@pytest.fixture(scope="module")
def chatty(base_folder, chat_file, tmp_path_factory):
    """A run folder with a model that answers and stops: forty steps of fine-tuning, none too many."""
    from rich.console import Console

    from llmlab.settings.training import SFTSettings
    from llmlab.training.sft import sft

    folder = tmp_path_factory.mktemp("chatty")
    settings = SFTSettings(
        policy_checkpoint=str(base_folder), datasets=[str(chat_file)], output_dir=str(folder / "run"),
        cache_dir=str(folder / "cache"), num_proc=1, max_steps=40, warmup_steps=2, learning_rate=1e-2, batch_size=8,
        gradient_accumulation_steps=1, max_seq_len=96, validation_fraction=0, dtype="fp32", eval_every=1000, seed=3,
    )  # fmt: skip
    sft(settings, console=Console(quiet=True))
    return folder / "run"


@pytest.fixture
def prompts(tmp_path):
    draw = random.Random(5)
    rows = [
        {"question": f"How loudly {k}: the {draw.choice(['cat', 'dog', 'cow'])}?", "answer": "The cat meows loudly."}
        for k in range(12)
    ]
    return write(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        with pytest.raises(SystemExit) as caught:
            main(["data", *(str(word) for word in words)])
        output = capsys.readouterr()
        return caught.value.code or 0, output.out, output.err

    return run


def test_the_command_writes_what_dpo_reads(cli, chatty, prompts, tmp_path):
    def sample(name, *words):
        options = ["--reward", "length | 1", "--max-new-tokens", 40, "--min-difference", 0.001, "--seed", 3]
        return cli("pairs", chatty, "-p", prompts, *options, "-o", tmp_path / name, *words)

    code, output, errors = sample("out/pairs.jsonl")
    assert code == 0, errors
    path = tmp_path / "out" / "pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert 6 <= len(rows) <= 12
    assert all(set(row) == {"prompt", "chosen", "rejected", "scores"} for row in rows)
    assert all(row["scores"][0] - row["scores"][1] >= 0.001 for row in rows)
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert f"pairs {len(rows)}" in lines and "prompts 12" in lines and "completions 48" in lines
    counted = sum(int(line.split()[-1]) for line in lines if line.startswith("no pair:"))
    assert counted == 12 - len(rows)
    assert max(map(len, [line for line in output.splitlines() if "Written to" not in line])) <= 80
    assert [entry.name for entry in path.parent.iterdir()] == ["pairs.jsonl"]

    tokenizer = load_tokenizer(str(chatty))
    settings = DataSettings(datasets=[str(path)], validation_fraction=0, cache_dir=str(tmp_path / "c"), num_proc=1)
    data = build_rows(settings, PreferenceEncoder(tokenizer, max_length=128), seed=3)
    assert len(data.train) == len(rows) and not data.reports[0].dropped
    code, output, errors = cli("check", path, "-t", chatty, "--json")
    assert code == 0, errors
    (report,) = json.loads(output)["sources"]
    assert (report["rows"], report["format"], report["dropped"]) == (len(rows), "preference", {})

    assert sample("again.jsonl")[0] == 0
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()  # the seed
    assert sample("other.jsonl", "--seed", 4, "-n", 2, "--limit", 5, "--top-p", 0.9)[0] == 0
    other = (tmp_path / "other.jsonl").read_text().splitlines()
    assert 1 <= len(other) <= 5 and other[0] != path.read_text().splitlines()[0]


def test_columns_reach_rewards_from_a_file_of_ones_own(cli, chatty, prompts, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def near(completions, answer, prompts, **columns):\n"
        "    texts = [c[0]['content'] for c in completions]\n"
        "    return [len(set(t.split()) & set(a.split())) / 4 for t, a in zip(texts, answer)]\n"
    )
    config = tmp_path / "rewards.yaml"
    config.write_text("rewards: [{name: 'mine.py:near', min: 0, max: 2}]\n")
    words = ["pairs", chatty, "-p", prompts, "-c", config, "-o", tmp_path / "pairs.jsonl", "--max-new-tokens", 40]
    code, _, errors = cli(*words)
    assert code == 2 and "--allow-code" in errors
    code, _, errors = cli(*words, "--allow-code", "--temperature", 1.5)
    assert code == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        found = len(set(row["chosen"][0]["content"].split()) & {"The", "cat", "meows", "loudly."})
        assert row["scores"][0] == pytest.approx(found / 4 / 2)  # normalized by max 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--reward": None}, "--rewards or --config is missing"),
        ({"--reward": "lenght"}, "did you mean 'length'"),
        ({"--reward": "numeric_match"}, "reward 'numeric_match': "),  # of an answer that there is not
        ({"--prompts": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"--prompts": "a|b|c|d|e"}, "--prompts a|b|c|d|e: expected 'name | subset"),
        (
            {"--prompts": "demo/stories | 5kB", "--limit": 1, "--max-new-tokens": 1},
            "none of the 1 prompts gave a pair",
        ),
        ({"--min-difference": 0}, "min_difference = 0: expected more than 0"),
        ({"--min-difference": 2}, "pairs.jsonl: not written, since none of the 12 prompts gave a pair ("),
        ({"--temperature": -1}, "temperature"),
        ({"--temperature": 0}, "with temperature 0 all samples are the same"),
        ({"-n": 1}, "greater than or"),
        ({"--output": "FOLDER"}, "expected a file whose name ends in .jsonl"),
        ({"--output": "PROMPTS"}, "these are the prompts"),
        ({"--output": "x.json"}, "expected a file whose name ends in .jsonl"),
        ({"--output": "PROMPTS/x.jsonl"}, "cannot be written"),
        ({"RUN": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_wrong_input_is_one_sentence_and_no_file(cli, base_folder, prompts, tmp_path, changes, message):
    given = {"RUN": base_folder, "--prompts": prompts, "--reward": "length", "--output": tmp_path / "pairs.jsonl"}
    given = {**given, "--max-new-tokens": 4, **changes}
    if changes.get("--reward") == "numeric_match":
        given["--prompts"] = write(tmp_path / "bare.jsonl", [{"prompt": "1 + 1?"}])
    places = {"FOLDER": str(tmp_path), "PROMPTS": str(prompts), "PROMPTS/x.jsonl": f"{prompts}/x.jsonl"}
    words = [given.pop("RUN")]
    for key, value in given.items():
        words += [] if value is None else [key, places.get(str(value), value)]
    code, output, errors = cli("pairs", *words)
    assert code == 2 and output == ""
    assert message in " ".join(errors.split())
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_model_that_only_continues_text_is_refused(cli, base_folder, prompts, tmp_path):
    import shutil

    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "llmlab.json").write_text('{"stage": "pretrain"}')
    code, _, errors = cli("pairs", folder, "-p", prompts, "-r", "length", "-o", tmp_path / "pairs.jsonl")
    assert code == 2 and "this model continues text and answers no prompts" in errors


def test_pairs_of_samples_that_a_run_drew(cli, tiny_settings, tmp_path, quiet):
    from llmlab.data.samples import group_samples, read_samples
    from llmlab.training.offline.awr import awr

    settings = tiny_settings("awr", tmp_path / "run", max_steps=1, max_new_tokens=40, validation_fraction=0.1)
    samples = awr(settings, console=quiet).folder / "samples.jsonl"
    code, output, errors = cli("pairs", "--samples", samples, "--min-difference", 0.01, "-o", tmp_path / "pairs.jsonl")
    assert code == 0, errors
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    trained = [each for each in read_samples(samples) if not each.validation]
    groups = {group[0].prompt[0]["content"]: group for group in group_samples(trained)}
    assert rows and f"completions {len(trained)}" in [" ".join(line.split()) for line in output.splitlines()]
    for row in rows:
        group = groups[row["prompt"][0]["content"]]
        best, worst = max(each.reward for each in group if each.ended), min(each.reward for each in group)
        assert row["scores"] == [best, worst]
    words = ["--samples", samples, "--reward", "length | 1", "--min-difference", 0.001, "-o", tmp_path / "again.jsonl"]
    code, _, errors = cli("pairs", *words)
    assert code == 0, errors
    assert (tmp_path / "again.jsonl").read_text() != (tmp_path / "pairs.jsonl").read_text()
    code, _, errors = cli("pairs", "x", "--samples", samples)
    assert code == 2 and "expected RUN and --prompts FILE, or --samples FILE alone" in errors
