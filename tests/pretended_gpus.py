"""GPUs that a machine without any pretends to have, so that tensors of different devices which meet are noticed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
CROSSING = {  # take tensors of two devices, or only look at a shape
    Tensor.copy_,
    Tensor.data.__set__,
    Tensor.view_as,
    torch._has_compatible_shallow_copy_type,
}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}  # indices may lie on the CPU
JOINING = {torch.stack, torch.cat}  # here, numbers on the CPU may not stand among tensors of a GPU
ON_CPU = {Tensor.numpy, Tensor.__array__}


class Mixed(RuntimeError):
    """Tensors of different devices met, as a GPU would not have let them."""


class PretendedGpus(TorchFunctionMode):
    """Inside, tensors that were moved to "cuda:N", or made there or of such tensors, say that they lie there. They are
    computed on the CPU; what a GPU would refuse raises Mixed."""

    def __init__(self) -> None:
        super().__init__()
        # a weak reference keeps a storage's address from being used again, so that nothing inherits its device
        self.places: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def of(self, tensor: Tensor) -> torch.device:
        if tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return tensor.device
        place = self.places.get(tensor.untyped_storage()._cdata)
        return CPU if place is None else place[1]

    def put(self, tensor: Tensor, device: torch.device) -> None:
        if not (tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor) or device == CPU):
            storage = tensor.untyped_storage()
            self.places[storage._cdata] = (StorageWeakRef(storage), device)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.of(args[0])
        if func == Tensor.is_cuda.__get__:
            return self.of(args[0]).type == "cuda"
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        if getattr(func, "__name__", "") == "__get__" and not isinstance(answer := func(*args, **kwargs), Tensor):
            return answer  # a shape, a type: nothing meets
        given = _tensors((args, kwargs))
        device = self._common(func, given)
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            device, kwargs["device"] = torch.device(wanted), CPU
        elif wanted is not None:
            device = torch.device(wanted)
        generator = kwargs.get("generator")
        if generator is not None and (place := getattr(generator, "place", CPU)) != device:
            raise Mixed(f"{func.__name__}: a generator of {place} draws on {device}")
        before = {t.untyped_storage()._cdata for t in given if not self._without_storage(t)}
        result = func(*args, **kwargs)
        if func is torch.autograd.grad:
            for gradient, by in zip(result, args[1] if isinstance(args[1], (list, tuple)) else [args[1]], strict=True):
                self.put(gradient, self.of(by))
            return result
        for tensor in _tensors((result,)):
            if not self._without_storage(tensor) and tensor.untyped_storage()._cdata not in before:
                self.put(tensor, device)
        return result

    @staticmethod
    def _without_storage(tensor: Tensor) -> bool:
        return tensor.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(tensor)

    def _common(self, func: Callable[..., Any], given: Sequence[Tensor]) -> torch.device:
        """The device that the tensors of a call have in common."""
        if func is torch.autograd.grad or func in CROSSING:
            return self.of(given[0])
        name, joining = getattr(func, "__name__", ""), func in JOINING
        held = given[0] if given and name.endswith("_") and not name.endswith("__") else None  # written to
        places = [(t, self.of(t)) for t in given]
        kept = [place for t, place in places if joining or place != CPU or t.dim() > 0 or t is held]
        if func in INDEXING:
            kept = [place for n, place in enumerate(kept) if n == 0 or place != CPU]
        devices = list(dict.fromkeys(kept))
        if func in ON_CPU and devices != [CPU]:
            raise Mixed(f"{name}: a tensor on {devices[0]} is no NumPy array")
        if len([d for d in devices if d.type != "meta"]) > 1:
            raise Mixed(f"{name}: tensors on {' and '.join(map(str, devices))}")
        return devices[0] if devices else CPU

    def _moved(self, func: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        where = list(args) + list(kwargs.values())
        device = self.of(tensor)
        for value in where:
            if isinstance(value, (str, torch.device)):
                device = torch.device(value)
            elif isinstance(value, Tensor):
                device = self.of(value)
        device = CPU if func is Tensor.cpu else torch.device("cuda", 0) if func is Tensor.cuda else device
        if device.type == "meta" or tensor.is_meta:
            return func(tensor, *args, **kwargs)
        here = [CPU if isinstance(each, (str, torch.device)) else each for each in args]
        named = {key: CPU if key == "device" else each for key, each in kwargs.items() if key != "non_blocking"}
        result = tensor if func is not Tensor.to else func(tensor, *here, **named)
        if device != self.of(tensor) and result.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            result = result.clone()
        self.put(result, device)
        return result


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among the values, and in them."""
    tensors = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += _tensors(value)
        elif isinstance(value, dict):
            tensors += _tensors(value.values())
    return tensors


class Generator(torch.Generator):
    """One of the CPU that says of which device it is."""

    place: torch.device

    def __new__(cls, device: Any = CPU) -> Generator:
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made


@contextmanager
def pretended_gpus(count: int = 2, free: Sequence[int] = (2**30, 2**30)) -> Iterator[PretendedGpus]:
    """PretendedGpus, and a machine that says it has `count` of them."""
    forked = torch.random.fork_rng
    answers = {
        "device_count": lambda: count,
        "mem_get_info": lambda device: (free[torch.device(device).index or 0], 2**30),
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: 2**20,
        "get_device_name": lambda device: "Pretended",
        "get_device_properties": lambda device: SimpleNamespace(uuid=f"pretended-{os.getpid()}-{device}"),
        "synchronize": lambda device=None: None,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", lambda devices: forked(devices=[])))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", lambda device=None: None))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
        yield stack.enter_context(PretendedGpus())


def _grouped(lists: Sequence[Sequence[Tensor | None]], with_indices: bool) -> dict[Any, Any]:
    """As optimisers ask for it, by the devices that tensors say they lie on; of each list the entries of a group."""
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(lists[0]):
        assert tensor is not None
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    return {
        key: ([[own[i] for i in indices] if own else [] for own in lists], indices) for key, indices in groups.items()
    }
