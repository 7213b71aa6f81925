"""What a training step would allocate and compute, followed on tensors without memory (torch's FakeTensorMode).
Nothing here knows an architecture or a loss: whatever runs inside a `Ledger` is counted, operator by operator."""

import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llmlab.model.blocks import BLOCK, attention_cost
from llmlab.model.loss import loss_cost

aten = torch.ops.aten
OWN_OPERATORS = {  # name: FLOPs and bytes of scratch memory, given the operator's arguments
    "linear_cross_entropy": loss_cost,
    "block_attention": attention_cost,
    "block_attention_backward": attention_cost,
}
ACTIVATIONS = "activations"
LOGPROB_CHUNK = 32768  # logits of a token in the buffer of TRL's chunked losses, however small the vocabulary


class Ledger(TorchDispatchMode):
    """Counts the bytes of live tensors by part and phase, and FLOPs by phase; tensors inside have no memory, and what
    depends on their values gets 1, True or all positions. A part is `logits` where the last dimension is a
    vocabulary's, that of a weight which is cast, or `activations`. `lazy`: memory that is never written takes nothing,
    as on a CPU."""

    def __init__(self, vocabulary: Collection[int], lazy: bool = False):
        super().__init__()
        self.vocabulary = vocabulary
        self.lazy = lazy
        self.phase = "loading"
        self.parts: list[str] = []  # of each storage
        self.events: list[tuple[int, int, str]] = []  # storage, bytes more or less, phase
        self.flops: Counter[str] = Counter()  # by phase
        self.blocks = 0  # of the longest attention in bf16: each has its own compiled kernels on a CPU
        self.live: dict[int, int] = {}  # address of a storage object: its index in `parts`

    @contextmanager
    def follow(self) -> Iterator["Ledger"]:
        """Runs what is inside on tensors without memory."""
        original = nn.Module._apply
        nn.Module._apply = _convert  # type: ignore[method-assign]
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), self:
                yield self
        finally:
            nn.Module._apply = original  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            return args[0].new_zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        if func is aten.index.Tensor:  # by a mask: all positions
            args = (args[0], [index for mask in args[1] for index in _positions(mask)])
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops[self.phase] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif (name := func._schema.name.rpartition("::")[2]) in OWN_OPERATORS:
            flops, scratch = OWN_OPERATORS[name](*args)
            self.flops[self.phase] += flops
            if name == "block_attention" and args[0].dtype == torch.bfloat16:
                self.blocks = max(self.blocks, -(-args[0].shape[2] // BLOCK))
            self.parts.append(ACTIVATIONS)
            self.events += [(len(self.parts) - 1, size, self.phase) for size in (scratch, -scratch)]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, func, args)
        return out

    def _add(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self.live:
            return
        part, size = ACTIVATIONS, storage.nbytes()
        if tensor.ndim > 1 and tensor.shape[-1] in self.vocabulary:
            part = "logits"
        elif func is aten._to_copy.default and (known := self.live.get(args[0].untyped_storage()._cdata)) is not None:
            part = self.parts[known] if self.parts[known] in ("weights", "reference", "value model") else part
        elif func is aten.empty.memory_format and tensor.ndim == 2 and tensor.shape[1] == LOGPROB_CHUNK:
            part, written = "logits", min(max(self.vocabulary), LOGPROB_CHUNK)
            size = size * written // LOGPROB_CHUNK if self.lazy else size
        index = self.live[key] = len(self.parts)
        self.parts.append(part)
        self.events.append((index, size, self.phase))
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.events.append((self.live.pop(key), -size, self.phase))

    def assign(self, part: str, *tensors: Tensor | None) -> None:
        """Says what tensors are for."""
        for tensor in tensors:
            if tensor is not None and (index := self.live.get(tensor.untyped_storage()._cdata)) is not None:
                self.parts[index] = part

    @property
    def most(self) -> dict[str, int]:
        """The most bytes of each part that were live at once."""
        live, most = Counter[str](), Counter[str]()
        for index, size, _ in self.events:
            part = self.parts[index]
            live[part] += size
            most[part] = max(most[part], live[part])
        return dict(most)

    def peaks(self, shares: Mapping[str, float] | None = None) -> list[tuple[str, dict[str, float]]]:
        """Returns the most live bytes, by part and times its share, of each phase in turn, of backward each half: they
        lie at its ends or grow all along, so that each is linear in the number of layers where these are alike."""
        live, found = Counter[str](), []
        for phase, group in groupby(self.events, itemgetter(2)):
            events = [(self.parts[index], size) for index, size, _ in group]
            events = [(part, size * (shares or {}).get(part, 1)) for part, size in events]
            middle = len(events) // 2 if phase == "backward" else 0  # others grow, or repeat what layers do not change
            for half in (events[:middle], events[middle:]):
                total = [0.0, *accumulate(size for _, size in half)]
                last = total.index(max(total))
                most = live.copy()
                for number, (part, size) in enumerate(half):
                    live[part] += size  # type: ignore[assignment]
                    if number < last:
                        most[part] += size  # type: ignore[assignment]
                found.append((phase, dict(most)))
        return found


def _convert(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """Applies a conversion as `nn.Module._apply`, which cannot replace parameters without memory."""
    converted: dict[int, Any] = {}  # by the original: tied parameters stay tied
    for owner in module.modules() if recurse else (module,):
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in converted:
                    with torch.no_grad():
                        new = function(tensor)
                    if new.dtype == tensor.dtype:
                        new = tensor
                    elif isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    converted[id(tensor)] = new
                tensors[name] = converted[id(tensor)]
    return module


def _positions(mask: Tensor | None) -> list[Tensor | None]:
    """Returns the indices of all positions for a mask, one a dimension, and other indices as they are."""
    if mask is None or mask.dtype is not torch.bool:
        return [mask]
    return [mask.new_zeros(mask.numel(), dtype=torch.int64) for _ in range(mask.ndim)]
