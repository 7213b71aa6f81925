"""Several GPUs from a notebook: `accelerate.notebook_launcher` runs a function in one process per GPU.

Paste the cells (`# %%`) into a notebook, or run the file. Nothing before the launch may touch a GPU: the processes
are forks of this one, and CUDA survives no fork. So training is imported inside the function, and what the function
gets is plain data.
"""

# %% What to train: settings need no torch
import os
import sys

from accelerate import notebook_launcher

OUTPUT = sys.argv[1] if __name__ == "__main__" and len(sys.argv) > 1 else "runs/notebook"
PROCESSES = int(os.environ.get("PROCESSES", "1"))  # one per GPU
VALUES = {
    "output_dir": OUTPUT,
    "datasets": ["demo/arithmetic | 200kB"],
    "model": {
        "tokenizer_name": f"{OUTPUT}-tokenizer",
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "d_ff": 128,
        "max_seq_len": 64,
    },
    "max_steps": 20,
    "warmup_steps": 2,
    "batch_size": 8,  # of each process
    "gradient_accumulation_steps": 1,
    "eval_every": 20,
    "eval_steps": 2,
    "num_proc": 1,  # so small a corpus needs no further processes
}


# %% What every process does
def train(values):
    import llmlab

    llmlab.pretrain(llmlab.PretrainSettings(**values))


# %% Once, before the launch: what all processes read
def make_tokenizer(values):
    import llmlab

    folder = values["model"]["tokenizer_name"]
    llmlab.train_tokenizer(llmlab.TokenizerSettings(datasets=values["datasets"], vocab_size=300, output_dir=folder))


# %% The launch
if __name__ == "__main__":
    make_tokenizer(VALUES)
    notebook_launcher(train, args=(VALUES,), num_processes=PROCESSES)
