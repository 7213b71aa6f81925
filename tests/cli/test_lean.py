"""Chat imports Transformers without what it needs for training, and still compiles where something asks for it."""

import subprocess
import sys

SCRIPT = """
import sys
from llmlab.cli.app import main
sys.argv = ["llmlab", "chat", sys.argv[1], "--complete", "--temperature", "0", "--max-new-tokens", "4"]
try: main(sys.argv[1:] + ["--device", "cpu", "--dtype", "fp32"])
except SystemExit as end: assert not end.code, end.code
loaded = {"scipy", "torch.distributed.tensor", "torch._inductor", "trl", "datasets"} & set(sys.modules)
assert not loaded, loaded
import torch
from transformers import masking_utils, utils
assert utils.is_torch_distributed_available() == torch.distributed.is_available()
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo.utils.counters["frames"]["ok"] == 1 and torch._dynamo.__file__
with masking_utils.TransformGetItemToIndex(): assert torch.arange(3)[torch.tensor(2)] == 2
"""


def test_chat_imports_neither_sharding_nor_compiler_until_needed(base_folder, tmp_path):
    from llmlab.inference import generate_text, load_for_inference
    from llmlab.settings.generation import SamplingSettings

    model, tokenizer = load_for_inference(base_folder, device="cpu", dtype="fp32")
    ((expected,),) = generate_text(model, tokenizer, ["the"], SamplingSettings(temperature=0, max_new_tokens=4))
    command = [sys.executable, "-c", SCRIPT, str(base_folder)]
    result = subprocess.run(command, input="the\n", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"the{expected}\n"
