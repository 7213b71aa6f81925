"""Train a small decoder on generated stories from Python, then let it write.

    python examples/pretrain.py

Needs the tokenizer of the quickstart: `make quickstart`, or `llmlab tokenizer train demo/stories --vocab-size 1024`.
"""

import llmlab
from llmlab.settings.generation import SamplingSettings

settings = llmlab.PretrainSettings(
    model={
        "tokenizer_name": "runs/quickstart/tokenizer",
        "positional_encoding": "alibi",
        "activation": "gelu",
        "d_model": 128,
        "n_layers": 4,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 512,
        "max_seq_len": 256,
    },
    datasets=["demo/stories"],
    optimizer="muon",
    lr=1e-2,
    max_steps=200,
    warmup_steps=20,
    batch_size=8,
    gradient_accumulation_steps=1,
    eval_every=100,
    output_dir="runs/example",
)
result = llmlab.pretrain(settings)
print(f"validation loss {result.metrics['eval_loss']:.3f}, against {result.metrics['unigram_entropy']:.3f}")

model, tokenizer = llmlab.load_for_inference(result.folder)
for completions in llmlab.generate_text(
    model, tokenizer, ["Once upon a time"], SamplingSettings(max_new_tokens=100), seed=1
):
    print("Once upon a time" + completions[0])
