"""Loading whatever a run folder may hold, and generating from it: batched, streamed, stopped, within the context."""

import json
import shutil
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from llmlab.inference import (
    drop_oldest_turns,
    encode_prompt,
    generate_text,
    is_chat_model,
    load_for_inference,
    prompt_room,
    stream_reply,
)
from llmlab.settings.errors import UserError
from llmlab.settings.generation import SamplingSettings
from llmlab.settings.lora import MergeSettings
from llmlab.training.merge import merge

ALPHABET = dict(zip("abcdefgh", "bcdefgha", strict=True))
GREEDY = SamplingSettings(temperature=0, max_new_tokens=12)


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Loading ----------------------------------------------------------------------------------------------------------


def test_a_run_folder_loads_with_its_weights(run, random_llama, tokenizer):
    model, tokenizer = load_for_inference(run, dtype="fp32", device="cpu")
    expected = random_llama()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert not model.training and tokenizer.decode(tokenizer("tea")["input_ids"]) == "tea"


def test_an_adapter_loads_over_its_base(run, tmp_path, tokenizer):
    base, _ = load_for_inference(run, dtype="fp32", device="cpu")
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([tokenizer("some text")["input_ids"]])
    expected = adapted(input_ids=ids).logits
    model, loaded_tokenizer = load_for_inference(tmp_path / "adapter", dtype="fp32", device="cpu")
    assert isinstance(model, PeftModel) and len(loaded_tokenizer) == len(tokenizer)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    with adapted.disable_adapter():
        assert (adapted(input_ids=ids).logits - expected).abs().max() > 0.1

    shutil.rmtree(run)
    with pytest.raises(UserError, match="is an adapter of .*run, which does not load: .*there is no such folder"):
        load_for_inference(tmp_path / "adapter", dtype="fp32", device="cpu")


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_an_adapter_on_the_hub_loads_over_its_base_there(own_tokenizer, run, tmp_path, tokenizer, monkeypatch):
    """The hub's cache is laid out as downloads leave it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def publish(folder, name):
        snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0123abc"
        shutil.copytree(folder, snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0123abc")

    base, _ = load_for_inference(run, dtype="fp32", device="cpu")
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="maker/base")
    if own_tokenizer:
        tokenizer.save_pretrained(tmp_path / "adapter")
    publish(run, "maker/base")
    publish(tmp_path / "adapter", "maker/adapter")
    ids = torch.tensor([tokenizer("some text")["input_ids"]])
    model, found = load_for_inference("maker/adapter", dtype="fp32", device="cpu")
    torch.testing.assert_close(model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert found.get_vocab() == tokenizer.get_vocab()
    merged = merge(MergeSettings(adapter="maker/adapter", output_dir=str(tmp_path / "merged")))
    whole, _ = load_for_inference(merged.folder, dtype="fp32", device="cpu")
    torch.testing.assert_close(whole(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert not isinstance(load_for_inference("maker/base", dtype="fp32", device="cpu")[0], PeftModel)
    with pytest.raises(UserError, match="maker/nothing.*the hub gave none"):
        load_for_inference("maker/nothing")


def test_llmlabs_own_model_loads(tmp_path, tokenizer):
    from llmlab.model import build_config, new_model
    from llmlab.settings.model import ModelSettings

    small = ModelSettings(d_model=16, n_heads=2, n_kv_heads=1, d_ff=32, n_layers=2, vocab_size=258, max_seq_len=32)
    model = new_model(build_config(small, tokenizer))
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    loaded, _ = load_for_inference(tmp_path / "run", dtype="fp32", device="cpu")
    assert type(loaded).__name__ == "LLMLabForCausalLM"
    (completion,) = next(generate_text(loaded, tokenizer, ["tea"], SamplingSettings(temperature=0, max_new_tokens=5)))
    ids = tokenizer("tea")["input_ids"]
    for _ in range(5):
        ids.append(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
    assert completion == tokenizer.decode(ids[3:], skip_special_tokens=True)


def break_(run, how: str, random_llama, tokenizer) -> None:
    weights, config = run / "model.safetensors", run / "config.json"
    match how:
        case "no config":
            config.unlink()
        case "checkpoint":
            config.unlink()
            for step in (90, 100):
                (run / f"checkpoint-{step}").mkdir()
            (run / "checkpoint-best").mkdir()  # a copy that somebody keeps
        case "no weights":
            weights.unlink()
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "other shapes":
            edit(config, hidden_size=32)
        case "more layers":
            edit(config, num_hidden_layers=3)
        case "reward model":
            LlamaForSequenceClassification(random_llama().config).save_pretrained(run)
        case "unknown kind":
            edit(config, model_type="lama")
        case "no language":
            edit(config, model_type="vit")
        case "no JSON":
            config.write_text('{\n"a":')
        case "no tokenizer":
            for path in run.glob("*token*"):
                path.unlink()
        case "other tokenizer":
            tokenizer.add_tokens(["<new>", "<newer>"])
            tokenizer.save_pretrained(run)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "holds no model: it has neither config.json nor adapter_config.json"),
        ("checkpoint", "no finished model; try its last checkpoint, .*checkpoint-100$"),
        ("no weights", "no file named model.safetensors"),
        ("cut weights", "the weights are damaged or incomplete"),
        ("other shapes", "other shapes than its config.json says"),
        ("more layers", r"9 weights are missing, such as model\.layers\.2"),
        ("reward model", r"architectures = LlamaForSequenceClassification: this is a sequence-classification model"),
        ("unknown kind", "model_type = lama: no architecture of that name; did you mean 'llama'"),
        ("no language", "model_type = vit: this architecture is no language model"),
        ("no JSON", r"config\.json: cannot be read as JSON: .* line 2"),
        ("no tokenizer", "no tokenizer in this folder"),
        ("other tokenizer", "tokenizer has 260 tokens and the model embeds 258"),
    ],
)
def test_a_broken_folder_is_explained(run, how, message, random_llama, byte_tokenizer):
    break_(run, how, random_llama, byte_tokenizer())
    with pytest.raises(UserError, match=message) as caught:
        load_for_inference(run, dtype="fp32", device="cpu")
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_folder_is_explained(run, monkeypatch):
    with pytest.raises(UserError, match=r"there is no such folder; did you mean 'run'\?"):
        load_for_inference(run.with_name("rum"))
    with pytest.raises(UserError, match="this is a file"):
        load_for_inference(run / "config.json")
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=r"^rum: there is no such folder; did you mean 'run'\?, and the hub gave none"):
        load_for_inference("rum")


def test_only_chat_trained_models_answer(run, tokenizer, byte_tokenizer):
    assert is_chat_model(run, tokenizer)
    (run / "llmlab.json").write_text('{"stage": "sft"}')
    assert is_chat_model(run, tokenizer)
    (run / "llmlab.json").write_text('{"stage": "pretrain"}')
    assert not is_chat_model(run, tokenizer)
    assert not is_chat_model(run / "checkpoint-5", tokenizer)
    bare = byte_tokenizer()
    bare.chat_template = None
    assert not is_chat_model("org/name", bare)


# Generating -------------------------------------------------------------------------------------------------------


def test_greedy_text_follows_the_model(tokenizer, chain):
    model = chain({"x": "y", "y": "z"})
    assert list(generate_text(model, tokenizer, ["x", "qx", "z"], GREEDY)) == [["yz"], ["yz"], [""]]
    endless = chain(ALPHABET)
    assert list(generate_text(endless, tokenizer, ["a"], GREEDY)) == [["bcdefghabcde"]]


def test_a_batch_equals_single_prompts(tokenizer, random_llama):
    model = random_llama()
    prompts = ["a", "some longer text", "four", "[{}]!", "tea"]
    batched = list(generate_text(model, tokenizer, prompts, GREEDY, batch_size=3))
    single = [next(generate_text(model, tokenizer, [prompt], GREEDY)) for prompt in prompts]
    assert batched == single
    assert len({text for (text,) in single}) == len(prompts)


def test_sampling_repeats_with_its_seed(tokenizer, random_llama):
    model, sampling = random_llama(), SamplingSettings(temperature=1.0, max_new_tokens=10)
    first, again, other = (
        list(generate_text(model, tokenizer, ["a", "b"], sampling, num_samples=3, seed=seed, batch_size=4))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert [len(samples) for samples in first] == [3, 3]
    assert len(set(first[0])) == 3
    with pytest.raises(UserError, match="num_samples = 3: with temperature 0"):
        list(generate_text(model, tokenizer, ["a"], GREEDY, num_samples=3))


def test_sampling_follows_the_probabilities(tokenizer, chain):
    model = chain({})
    (a,), (b,), (c,) = (tokenizer(letter)["input_ids"] for letter in "abc")
    with torch.no_grad():
        model.lm_head.weight.fill_(-100.0)
        for token, probability in ((a, 0.6), (b, 0.3), (c, 0.1)):
            model.lm_head.weight[token] = torch.tensor(probability).log() / model.config.hidden_size**0.5

    def shares(**changes):
        sampling = SamplingSettings(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1, **changes})
        (texts,) = generate_text(model, tokenizer, ["a"], sampling, num_samples=2000, seed=0, batch_size=2000)
        return [texts.count(letter) / len(texts) for letter in "abc"]

    # the norm of a one-hot of size d is sqrt(d) after RMSNorm; five standard deviations of a share are below 0.055
    assert shares() == pytest.approx([0.6, 0.3, 0.1], abs=0.055)
    assert shares(top_p=0.8) == pytest.approx([2 / 3, 1 / 3, 0], abs=0.055)
    assert shares(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0], abs=0.055)
    cold = [p**2 / (0.6**2 + 0.3**2 + 0.1**2) for p in (0.6, 0.3, 0.1)]
    assert shares(temperature=0.5) == pytest.approx(cold, abs=0.055)


def test_a_completion_ends_where_the_context_does(tokenizer, chain):
    model = chain(ALPHABET, max_position_embeddings=16)
    long = SamplingSettings(temperature=0, max_new_tokens=100)
    prompts = ["a" * 10, "a" * 4, "a" * 15]
    lengths = [len(texts[0]) for texts in generate_text(model, tokenizer, prompts, long)]
    assert lengths == [6, 12, 1]
    assert len("".join(stream_reply(model, tokenizer, "a" * 10, long))) == 6
    with pytest.raises(UserError, match="prompt 2 has 16 tokens; the model's context is 16"):
        list(generate_text(model, tokenizer, ["a", "a" * 16], long))
    with pytest.raises(UserError, match="the prompt has 20 tokens; the model's context is 16"):
        next(stream_reply(model, tokenizer, "a" * 20, long))


def test_conversations_are_answered_through_the_template(tokenizer, chain):
    model = chain({":": "H", "H": "i"})
    conversation = [{"role": "user", "content": "hello"}]
    assert encode_prompt(tokenizer, conversation) == tokenizer("u:hello\na:")["input_ids"]
    assert list(generate_text(model, tokenizer, [conversation], GREEDY)) == [["Hi"]]


def test_templates_may_refuse(tokenizer, byte_tokenizer):
    strict = byte_tokenizer()
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="refuses this conversation: no system role"):
        encode_prompt(strict, [{"role": "system", "content": "x"}])
    strict.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(strict, [{"role": "user", "content": "x"}])


def test_an_empty_prompt_starts_a_document(tokenizer, chain):
    model = chain({tokenizer.eos_token: "o", "o": "k"})
    assert list(generate_text(model, tokenizer, [""], GREEDY)) == [["ok"]]


# Streaming --------------------------------------------------------------------------------------------------------


def test_a_stream_gives_whole_words_of_the_same_text(tokenizer, chain, random_llama):
    model = chain({"a": "b", "b": " ", " ": "c", "c": "d", "d": tokenizer.eos_token})
    pieces = list(stream_reply(model, tokenizer, "a", GREEDY))
    assert pieces == ["b ", "cd"]
    random = random_llama()
    (text,) = next(generate_text(random, tokenizer, ["some text"], GREEDY))
    assert "".join(stream_reply(random, tokenizer, "some text", GREEDY)) == text


def test_closing_a_stream_stops_the_generation(tokenizer, chain):
    model = chain({"a": " ", " ": "a"}, max_position_embeddings=10**6)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    threads = threading.active_count()
    stream = stream_reply(model, tokenizer, "a", SamplingSettings(temperature=0, max_new_tokens=10**5))
    assert next(stream) == " "
    assert threading.active_count() == threads + 1
    stream.close()
    assert threading.active_count() == threads
    made = len(passes)
    assert 0 < made < 5000
    threading.Event().wait(0.05)
    assert len(passes) == made


def test_a_failing_model_fails_its_stream(tokenizer, random_llama):
    model = random_llama()
    model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream_reply(model, tokenizer, "a", GREEDY))


# Long conversations -----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    has_system=st.booleans(),
    turns=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6),
    last=st.integers(0, 30),
    room=st.integers(8, 120),
)
def test_the_oldest_turns_are_dropped_and_no_more(tokenizer, has_system, turns, last, room):
    system = [{"role": "system", "content": "s" * 5}] if has_system else []
    history = [
        {"role": role, "content": role[0] * size}
        for pair in turns
        for role, size in zip(("user", "assistant"), pair, strict=True)
    ]
    messages = [*system, *history, {"role": "user", "content": "l" * last}]

    def length(dropped: int) -> int:
        kept = [*system, *messages[len(system) + dropped :]]
        return sum(len(f"{m['role'][0]}:{m['content']}\n") for m in kept) + len("a:")

    fitting = [dropped for dropped in range(0, len(history) + 1, 2) if length(dropped) <= room]
    if not fitting:
        with pytest.raises(UserError, match=f"the model has room for {room}"):
            drop_oldest_turns(tokenizer, messages, room)
        return
    kept, dropped = drop_oldest_turns(tokenizer, messages, room)
    assert dropped == fitting[0]
    assert kept == [*system, *messages[len(system) + dropped :]]


def test_prompts_get_at_least_half_of_the_context(random_llama):
    model = random_llama(max_position_embeddings=64)
    assert prompt_room(model, max_new_tokens=10) == 54
    assert prompt_room(model, max_new_tokens=500) == 32
