"""Runs Megatron-Core's training stack on a machine without CUDA, over gloo.

Megatron addresses its device as `torch.cuda` throughout. Vendors of other accelerators map `torch.cuda` to their
device. This module maps `torch.cuda` to the CPU, so that CPU and GPU share one training path and CPU tests exercise the
code that runs on GPUs. `install()` must run before `megatron` is first imported, and never where CUDA is present.

The mapping replaces functions once, at installation. Nothing intercepts single operations.
"""

import contextlib
import functools
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from maskmoe.megatron_compat.replacing import replace

_CPU = torch.device("cpu")

_FACTORIES = [
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
]

# Functions of `torch.cuda` that have nothing to do on the CPU, where everything happens in program order.
_NO_OPERATION = [
    "empty_cache",
    "set_device",
    "set_stream",
    "synchronize",
    "reset_peak_memory_stats",
    "reset_max_memory_allocated",
    "ipc_collect",
    "init",
    "_lazy_init",
]


def is_installed() -> bool:
    """Report whether `torch.cuda` is mapped to the CPU in this process."""
    return torch.cuda.current_device is _current_device


def install() -> None:
    """Map `torch.cuda` to the CPU and switch off what cannot run there.

    Raises:
        RuntimeError: CUDA is present, or megatron was imported already.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be installed where CUDA is present")
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU adapter must be installed before megatron is imported")
    _map_devices()
    _map_streams()
    _map_generators()
    _map_properties()
    _map_type_names()
    _allow_uneven_collectives()
    _adapt_megatron()


def argument_defaults() -> dict[str, Any]:
    """Return defaults for the arguments of Megatron whose own defaults need CUDA, in the form of `args_defaults`."""
    return {
        "distributed_backend": "gloo",
        "transformer_impl": "local",
        "no_persist_layer_norm": True,
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
    }


def _on_cpu(device: Any) -> Any:
    """Return the CPU for every way to name a CUDA device, and any other device unchanged."""
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


def _map_devices() -> None:
    def with_cpu_device(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return wrapper

    # `with torch.device(…)` looks for these factories. torch caches them, so let it do so before they are replaced: the
    # wrappers call the original functions.
    _device_constructors()
    for name in _FACTORIES:
        replace(torch, name, with_cpu_device(getattr(torch, name)))

    def move_to(original: Callable) -> Callable:
        @functools.wraps(original)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = (_on_cpu(args[0]), *args[1:]) if args else args
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            return original(self, *args, **kwargs)

        return wrapper

    replace(torch.Tensor, "to", move_to(torch.Tensor.to))
    replace(torch.nn.Module, "to", move_to(torch.nn.Module.to))
    replace(torch.nn.Module, "to_empty", move_to(torch.nn.Module.to_empty))
    replace(torch.Tensor, "cuda", lambda self, device=None, non_blocking=False, memory_format=None: self)
    replace(torch.nn.Module, "cuda", lambda self, device=None: self)
    replace(torch.Tensor, "pin_memory", lambda self, device=None: self)


class _Stream:
    """The one queue of work."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_event(self, event: "_Event") -> None: ...

    def wait_stream(self, stream: "_Stream") -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """A mark in the one queue of work; all work before the mark is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _map_streams() -> None:
    only_stream = _Stream()
    replace(torch.cuda, "Stream", _Stream)
    replace(torch.cuda, "Event", _Event)
    replace(torch.cuda, "current_stream", lambda device=None: only_stream)
    replace(torch.cuda, "default_stream", lambda device=None: only_stream)
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    replace(torch.cuda, "device", lambda device: contextlib.nullcontext())
    replace(torch.cuda, "is_current_stream_capturing", lambda: False)
    replace(torch.Tensor, "record_stream", lambda self, stream: None)
    for name in _NO_OPERATION:
        replace(torch.cuda, name, lambda *args, **kwargs: None)
    nvtx = SimpleNamespace(
        range_push=lambda message: 0,
        range_pop=lambda: 0,
        range=lambda message, *args, **kwargs: contextlib.nullcontext(),
    )
    replace(torch.cuda, "nvtx", nvtx)


class _OneGenerator:
    """`torch.cuda.default_generators`, in which the CPU's generator stands for the generator of every device."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _map_generators() -> None:
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        torch.default_generator.set_state(new_state)

    def seed_generator(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    for module in (torch.cuda, torch.cuda.random):
        replace(module, "get_rng_state", get_rng_state)
        replace(module, "set_rng_state", set_rng_state)
        replace(module, "manual_seed", seed_generator)
        replace(module, "manual_seed_all", seed_generator)
        replace(module, "initial_seed", lambda: torch.default_generator.initial_seed())
    replace(torch.cuda, "default_generators", _OneGenerator())
    replace(torch.cuda, "_lazy_call", lambda callable, **kwargs: callable())

    # A data loader draws a seed from the CPU's generator. On a GPU this does not concern dropout, but here it would
    # shift the dropout of a resumed run, which makes its data loaders after the checkpoint has restored the generator.
    make_iterator = torch.utils.data.DataLoader.__iter__

    @functools.wraps(make_iterator)
    def make_iterator_without_a_draw(self: torch.utils.data.DataLoader) -> Any:
        state = torch.default_generator.get_state()
        iterator = make_iterator(self)
        torch.default_generator.set_state(state)
        return iterator

    replace(torch.utils.data.DataLoader, "__iter__", make_iterator_without_a_draw)
    # Megatron draws from the GPU's generator and warns each time if the draw has moved the CPU's generator.
    random_logger = logging.getLogger("megatron.core.tensor_parallel.random")
    random_logger.addFilter(lambda record: "CPU RNG state changed" not in record.msg)


def _current_device() -> torch.device:
    return _CPU


def _map_properties() -> None:
    def peak_resident_bytes(device: Any = None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def resident_bytes(device: Any = None) -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def memory_stats(device: Any = None) -> dict[str, int]:
        resident, peak = resident_bytes(), peak_resident_bytes()
        return {
            "allocated_bytes.all.current": resident,
            "allocated_bytes.all.peak": peak,
            "reserved_bytes.all.current": resident,
            "reserved_bytes.all.peak": peak,
            "allocation.all.current": 0,
            "num_alloc_retries": 0,
        }

    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = SimpleNamespace(name="CPU", major=0, minor=0, total_memory=total_memory, multi_processor_count=1)
    replace(torch.cuda, "is_available", lambda: True)
    replace(torch.cuda, "is_initialized", lambda: True)
    # torch itself asks `torch.accelerator`, and must learn that there is no accelerator.
    replace(torch.accelerator, "is_available", lambda: False)
    replace(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    # Megatron wants one device for each local rank.
    replace(torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    replace(torch.cuda, "current_device", _current_device)
    replace(torch.cuda, "get_device_properties", lambda device=None: properties)
    replace(torch.cuda, "get_device_name", lambda device=None: properties.name)
    replace(torch.cuda, "get_device_capability", lambda device=None: (properties.major, properties.minor))
    replace(torch.cuda, "memory_stats", memory_stats)
    for name in ("memory_allocated", "memory_reserved"):
        replace(torch.cuda, name, resident_bytes)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        replace(torch.cuda, name, peak_resident_bytes)
    replace(torch.cuda, "mem_get_info", lambda device=None: (total_memory - resident_bytes(), total_memory))


def _allow_uneven_collectives() -> None:
    """Let gloo gather and scatter tensors of different sizes, as NCCL does."""
    all_gather: Callable = torch.distributed.all_gather
    reduce_scatter: Callable = torch.distributed.reduce_scatter

    def is_even(tensors: list[torch.Tensor]) -> bool:
        return all(tensor.shape == tensors[0].shape for tensor in tensors)

    @functools.wraps(all_gather)
    def all_gather_any(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if is_even(tensor_list):
            return all_gather(tensor_list, tensor, group, async_op)
        rows = max(len(output) for output in tensor_list)
        padded = tensor.new_zeros(rows, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in tensor_list]
        all_gather(gathered, padded, group)
        for output, source in zip(tensor_list, gathered, strict=True):
            output.copy_(source[: len(output)])
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_any(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if is_even(input_list):
            return reduce_scatter(output, input_list, op, group, async_op)
        total = torch.cat(input_list)
        torch.distributed.all_reduce(total, op, group)
        output.copy_(total.split([len(part) for part in input_list])[torch.distributed.get_rank(group)])
        return None

    replace(torch.distributed, "all_gather", all_gather_any)
    replace(torch.distributed, "reduce_scatter", reduce_scatter_any)


def _map_type_names() -> None:
    """Let `Tensor.type()` return names such as `torch.cuda.FloatTensor`, with which Megatron compares."""
    original: Callable = torch.Tensor.type

    @functools.wraps(original)
    def type_of(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is None:
            # Inside a torch function mode, such as `with torch.device(…)`, `original` calls this wrapper again. So the
            # name may begin with `torch.cuda.` already.
            return "torch.cuda." + original(self).rpartition(".")[2]
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, non_blocking, **kwargs)

    replace(torch.Tensor, "type", type_of)


def _adapt_megatron() -> None:
    """Change what the mapping of `torch.cuda` does not reach in megatron-core 0.19."""
    # Megatron checks this variable, which only matters if CUDA kernels of communication and computation overlap.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Megatron compiles its fusions for GPUs when it is imported. On a CPU, that needs a compiler and minutes.
    replace(
        torch,
        "compile",
        lambda model=None, **kwargs: (lambda function: function) if model is None else model,
    )

    # Megatron warns that Transformer Engine and Apex are missing, which a machine without CUDA cannot have.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        import megatron.training.training

    # This function warms up the fusions on CUDA.
    replace(megatron.training.training, "set_jit_fusion_options", lambda tp_size=None: None)

    # The dispatcher copies split sizes from a CUDA tensor to NumPy arrays on the host, but leaves CPU tensors as
    # tensors, which the collective cannot read.
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)
