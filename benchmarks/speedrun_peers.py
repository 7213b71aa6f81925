"""The peers of `speedrun.py`, each trained in a process of its own: nanochat and LitGPT.

nanochat is rebuilt from its description (github.com/karpathy/nanochat: gpt.py, optim.py, base_train.py): its model,
its Muon and AdamW, its initialization and its schedules.  LitGPT is the package itself, with the optimizer that its
pretraining has by default.  This file needs torch alone: LitGPT's environment need not have llmlab.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from speedrun import EARLY
from torch import nn

POLAR_EXPRESS = (  # Amsel et al. 2025, arXiv 2505.16932, for five iterations
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def norm(x):
    return F.rms_norm(x, x.shape[-1:])


class Linear(nn.Linear):
    """A product in the input's dtype, with weights in fp32."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Block(nn.Module):
    """Attention with normalized queries and keys and gated value embeddings, then ReLU squared."""

    def __init__(self, width, heads, has_value_embedding):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.gate = Linear(12, heads) if has_value_embedding else None
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x, value_embedding, cos, sin):  # (batch, time, width)
        y = norm(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        if value_embedding is not None:
            gate = 3 * self.gate(y[..., :12]).sigmoid()
            v = v + gate[..., None] * value_embedding.unflatten(-1, (self.heads, -1))
        q, k = (1.2 * norm(_rotate(z, cos, sin)) for z in (q, k))
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


def _rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class Nanochat(nn.Module):
    """The decoder: untied, no norm has weights, every other layer has value embeddings, logits are capped at 15."""

    def __init__(self, vocabulary, layers, width, heads, sequence):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        has_values = [i % 2 == (layers - 1) % 2 for i in range(layers)]
        self.blocks = nn.ModuleList(Block(width, heads, has) for has in has_values)
        self.values = nn.ModuleDict({str(i): nn.Embedding(vocabulary, width) for i in range(layers) if has_values[i]})
        self.head = Linear(width, vocabulary)
        depth = torch.arange(layers) / max(layers - 1, 1)
        self.stream, self.skip = nn.Parameter(1.15 - 0.10 * depth), nn.Parameter(0.20 - 0.15 * depth)
        self.smear, self.smear_gate = nn.Parameter(torch.zeros(1)), Linear(24, 1)
        self.backout = nn.Parameter(torch.full((1,), 0.2))
        angles = torch.outer(torch.arange(sequence), 1e5 ** -(torch.arange(0, width // heads, 2) / (width // heads)))
        for name in ("cos", "sin"):
            self.register_buffer(name, getattr(angles, name)()[None, :, None].bfloat16(), persistent=False)
        bound = 3**0.5 * width**-0.5
        for block in self.blocks:
            for layer, scale in ((block.q, 1), (block.k, 1), (block.v, 1), (block.up, 0.4)):
                nn.init.uniform_(layer.weight, -scale * bound, scale * bound)
            nn.init.zeros_(block.o.weight), nn.init.zeros_(block.down.weight)
        for gate in (self.smear_gate, *(block.gate for block in self.blocks if block.gate)):
            nn.init.uniform_(gate.weight, 0, 0.02)
        for table in self.values.values():
            nn.init.uniform_(table.weight, -bound, bound)
        nn.init.normal_(self.embed.weight, std=0.8), nn.init.normal_(self.head.weight, std=0.001)

    def forward(self, ids):  # (batch, time) to (batch, time, vocabulary)
        x = norm(self.embed(ids).bfloat16())
        gate = self.smear.to(x.dtype) * self.smear_gate(x[:, 1:, :24]).sigmoid()
        x = first = middle = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1)
        time = ids.shape[1]
        for i, block in enumerate(self.blocks):
            values = self.values[str(i)](ids).bfloat16() if str(i) in self.values else None
            x = self.stream[i].to(x.dtype) * x + self.skip[i].to(x.dtype) * first
            x = block(x, values, self.cos[:, :time], self.sin[:, :time])
            middle = x if i == len(self.blocks) // 2 else middle
        logits = self.head(norm(x - self.backout.to(x.dtype) * middle)).float()
        return 15 * torch.tanh(logits / 15)


class NanochatOptimizer(torch.optim.Optimizer):
    """AdamW by kind of parameter, and Muon with normalized rows, Polar Express, a factored second moment and cautious
    weight decay.

    Its script scales rates by the root of the batch's share of 2^19 tokens, and Muon's decay by that root and by the
    horizon.  Here rates are not scaled, which learns faster, but decays are: rate times decay is the script's.
    """

    def __init__(self, model, batch_tokens):
        scale = (model.embed.embedding_dim / 768) ** -0.5
        share = batch_tokens / 2**19
        kinds = (  # parameters, rate, betas, weight decay
            (model.head.parameters(), 0.004 * scale, (0.8, 0.96), 0.01),
            (model.embed.parameters(), 0.2 * scale, (0.8, 0.995), 0.001),
            (model.values.parameters(), 0.1 * scale, (0.8, 0.995), 0.01),
            ([model.stream], 0.005, (0.8, 0.95), 0.05),
            ([model.skip], 0.5, (0.96, 0.95), 0.0),
            ([model.smear, model.smear_gate.weight, model.backout], 0.2, (0.8, 0.95), 0.0),
        )
        groups = [
            {"params": list(ps), "peak": rate, "betas": betas, "weight_decay": decay * share**0.5}
            for ps, rate, betas, decay in kinds
        ]
        scaling = sum(p.numel() for part in (model.blocks, model.head) for p in part.parameters())
        self.decay = 0.28 * share * (12 * 12 * 768**2 + 32768 * 768) / scaling  # by the reference model of 12 layers
        matrices = list(model.blocks.parameters())
        for shape in sorted({p.shape for p in matrices}):
            groups.append({"params": [p for p in matrices if p.shape == shape], "peak": 0.02, "momentum": 0.95})
        super().__init__(groups, {})
        adam = [{k: g[k] for k in ("params", "peak", "betas", "weight_decay")} for g in groups[: len(kinds)]]
        self.adamw = torch.optim.AdamW(adam, lr=0.0, eps=1e-10, fused=True)
        self.muon = self.param_groups[len(kinds) :]

    @torch.no_grad()
    def step(self, step, progress, rate):
        """Takes a step with rates at this factor of their peaks; momentum rises, then falls as they do."""
        falling = max(0.0, (progress - 0.35) / 0.65)
        momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.97 - 0.07 * falling
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * rate
        self.adamw.step()
        decay = self.decay * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.muon:
            self._orthogonalize(group, momentum, rate, decay)

    def _orthogonalize(self, group, momentum, rate, decay):
        grads, weights = (torch.stack(xs) for xs in ([p.grad for p in group["params"]], group["params"]))
        rows, columns = grads.shape[-2:]
        first, second = group.setdefault("buffers", (torch.zeros_like(grads), torch.zeros(())))
        first.lerp_(grads, 1 - momentum)
        x = grads.lerp_(first, momentum)
        x = x * (x.norm(dim=(-2, -1), keepdim=True) / rows**0.5 / x.norm(dim=-1, keepdim=True).clamp_min(1e-6))
        x = (x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)).bfloat16()
        x = x.mT if rows > columns else x
        for a, b, c in POLAR_EXPRESS:
            square = x @ x.mT
            x = a * x + (b * square + c * (square @ square)) @ x
        x = (x.mT if rows > columns else x).float()
        x = x * min(rows, columns) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-6)
        mean = x.square().mean(-1 if rows >= columns else -2, keepdim=True)
        second = second + 0.1 * (mean - second)
        group["buffers"] = (first, second)
        scaled = x * second.clamp_min(1e-10).rsqrt()
        x = scaled * x.norm(dim=(-2, -1), keepdim=True) / scaled.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
        x += decay * weights * (x * weights >= 0)
        weights -= group["peak"] * rate * max(1.0, rows / columns) ** 0.5 * x
        for parameter, weight in zip(group["params"], weights, strict=True):
            parameter.copy_(weight)


def make_nanochat(options, vocabulary):
    """Returns the model, its logits, and a function that takes a step: its number, the share of the run."""
    model = Nanochat(vocabulary, options.layers, options.width, options.width // 64, options.sequence)
    optimizer = NanochatOptimizer(model, options.batch * options.sequence)

    def update(step, progress):
        rate = min((step + 1) / 40, 1.0) * min(1.0, 0.05 + 0.95 * (1 - progress) / 0.65)
        optimizer.step(step, progress, rate)

    return model, model, update


def make_litgpt(options, vocabulary):
    """As above, for a Llama-like model of LitGPT with its pretraining's AdamW, warmup, cosine and clipping."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.pretrain import initialize_weights

    class Fabric:  # what `initialize_weights` asks of Lightning
        device, strategy = torch.device("cpu"), None

        def print(self, *_):
            pass

    heads, width = options.width // 64, options.width
    config = Config(
        name="speedrun", block_size=options.sequence, vocab_size=vocabulary, padded_vocab_size=vocabulary,
        n_layer=options.layers, n_head=heads, n_query_groups=heads, n_embd=width, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
        intermediate_size=int(2.75 * width),
    )  # fmt: skip
    model = GPT(config)
    initialize_weights(Fabric(), model, n_layer=config.n_layer, n_embd=config.n_embd)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def logits(ids):
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids).float()

    def update(step, progress):
        floor = 4e-5 / options.rate
        decay = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = options.rate * min((step + 1) / 50, 1.0) * decay
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, logits, update


def batches(tokens, options):
    """Yields batches of rows, (batch, sequence + 1), each epoch in an order and at an offset of its own."""
    generator = np.random.default_rng(options.seed)
    length, rows = options.sequence, []
    while True:
        starts = generator.integers(length) + length * np.arange(len(tokens) // length - 1)
        for start in generator.permutation(starts):
            rows.append(torch.from_numpy(tokens[start : start + length + 1].astype(np.int64)))
            if len(rows) == options.batch:
                yield torch.stack(rows)
                rows = []


@torch.no_grad()
def bits_per_byte(logits, tokens, sizes, sequence):
    """Returns the held-out loss: consecutive rows as long as in training; their first tokens are not predicted."""
    rows = torch.from_numpy(tokens[: len(tokens) // sequence * sequence].astype(np.int64)).view(-1, sequence)
    nats = sum(
        F.cross_entropy(logits(part)[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        for part in rows.split(16)
    )
    return nats / math.log(2) / sizes[rows[:, 1:]].sum().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=["nanochat", "litgpt"])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="over which the rates decay")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after the first step, when a trial ends"
    )
    parser.add_argument("--eager", action="store_true", help="not compiled")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1e-3, help="LitGPT's peak learning rate")
    parser.add_argument("--evaluations", type=int, default=10)
    for name, default in (("layers", 6), ("width", 256), ("batch", 16), ("sequence", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    train, held_out = (np.fromfile(options.data / f"{name}.bin", np.uint16) for name in ("train", "held_out"))
    sizes = torch.tensor(json.loads((options.data / "bytes.json").read_text()))
    torch.manual_seed(options.seed)
    curve, times = [], []
    data = batches(train, options)
    began = time.perf_counter()
    model, logits, update = (make_nanochat if options.peer == "nanochat" else make_litgpt)(options, len(sizes))
    if not options.eager:
        model.compile()
    while len(times) < options.steps and not (len(times) > EARLY and times[-1] - times[0] > options.limit):
        rows = next(data)
        F.cross_entropy(logits(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        update(len(times), len(times) / options.steps)
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
        if len(times) * options.evaluations // options.steps > len(curve):
            loss = bits_per_byte(logits, held_out, sizes, options.sequence)
            curve.append((len(times), loss))
            print(f"step {len(times)}: {loss:.4f}", flush=True)
            began = time.perf_counter() - times[-1]  # an evaluation takes no time
    parameters = sum(p.numel() for p in model.parameters())
    result = {"curve": curve, "times": times, "tokens": len(times) * options.batch * options.sequence}
    options.out.write_text(json.dumps(result | {"parameters": parameters}))


if __name__ == "__main__":
    main()
