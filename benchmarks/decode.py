"""How fast text is sampled: llmlab's decoding loop against Transformers' `generate`, turn by turn in one process.

    python benchmarks/decode.py [--model FOLDER] [--batches 1 8 32] [--tokens 128] [--turns 5] [--compiled]

Without a folder, a Llama of 7.7 M parameters with random weights.  Prompts are random tokens, all of one length, and
nothing ends early, so that both do the same work; greedy decoding, sampling from all tokens and top-p are timed.  With
new weights, as in each rollout of GRPO, these are arranged anew; chat, gates and data generation arrange them once.
`--compiled` adds `generate` with a static cache and torch.compile; its first call, the warm-up, has a line of its own.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, CompileConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llmlab.decoding import STEPS, decode

WAYS = {"greedy": {}, "sampled": {"do_sample": True, "top_k": 0}}
WAYS["top-p 0.9"] = WAYS["sampled"] | {"top_p": 0.9}


def make_model(folder, layers):
    if folder:
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        shape = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "vocab_size": 4096}
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers, tie_word_embeddings=True))
    model.generation_config = GenerationConfig()
    return model.to(torch.bfloat16).eval()


def contenders(model, compiled):
    def by_generate(rows, config, **options):
        ids = torch.tensor(rows)
        return model.generate(ids, config, attention_mask=torch.ones_like(ids), **options)

    def by_new_weights(rows, config):
        STEPS.clear()
        return decode(model, rows, config)

    found = {"generate": by_generate, "llmlab": lambda rows, config: decode(model, rows, config)}
    found["llmlab, new weights"] = by_new_weights
    if compiled:
        everywhere = CompileConfig()
        everywhere._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": everywhere}
        found["generate compiled"] = lambda rows, config: by_generate(rows, config, **options)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = make_model(options.model, options.layers)
    found = contenders(model, options.compiled)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    for batch in options.batches:
        rows = torch.randint(10, 4096, (batch, options.prompt)).tolist()
        for name, way in WAYS.items():
            if name not in options.ways:
                continue
            config = GenerationConfig(max_new_tokens=options.tokens, min_new_tokens=None, pad_token_id=0, **way)
            seconds = {contender: [] for contender in found}
            for turn in range(options.turns + 1):
                for contender, run in found.items():
                    began = time.perf_counter()
                    run(rows, config)
                    seconds[contender].append(time.perf_counter() - began)
                    if turn == 0 and contender == "generate compiled":
                        print(
                            f"batch {batch}, {name}: compiled generate's first call took {seconds[contender][0]:.1f} s"
                        )
            for contender, times in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(seconds["generate"][1:], times[1:], strict=True))
                speed = batch * options.tokens / statistics.median(times[1:])
                print(f"batch {batch:>2}  {name:<10} {contender:<19} {speed:>7,.0f} tokens/s  {ratio:.2f}x generate")


if __name__ == "__main__":
    main()
