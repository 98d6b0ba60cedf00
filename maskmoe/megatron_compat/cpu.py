"""Runs Megatron-Core's training stack on a machine without CUDA, over gloo.

Megatron addresses its device as `torch.cuda` throughout. This module maps `torch.cuda` to the CPU, so that CPU and GPU
share one training path. `_REPLACEMENTS` declares the mapping, which replaces functions once, at installation. Nothing
intercepts single operations.
"""

import contextlib
import ctypes
import functools
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch.utils._device import _device_constructors

from maskmoe.megatron_compat import replace

_CPU = torch.device("cpu")

# The options of `mallopt` have these numbers in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# Freed memory at the top of the heap beyond this size returns to the kernel.
_KEPT_BYTES = 2**30


PACKAGES_FOR_GPUS = ("transformer_engine", "apex", "amp_C")
"""Packages from which Megatron would take optimizers and functions of many tensors, whose kernels need a GPU."""


def is_installed() -> bool:
    """Report whether `torch.cuda` is mapped to the CPU in this process."""
    return torch.cuda.current_device is _current_device


def install(hidden: Iterable[str] = PACKAGES_FOR_GPUS) -> None:
    """Map `torch.cuda` to the CPU and switch off what cannot run there; packages in `hidden` can no longer be imported.

    Raises:
        RuntimeError: CUDA is present, or megatron was imported already.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be installed where CUDA is present")
    if "megatron.core" in sys.modules:
        raise RuntimeError("the CPU adapter must be installed before megatron is imported")
    for owner, replacements in _REPLACEMENTS.items():
        for name, replacement in replacements.items():
            replace(owner, name, replacement)
    modules: dict[str, Any] = sys.modules
    for name in hidden:
        modules.setdefault(name, None)  # which makes the import fail
    _keep_freed_memory()
    _adapt_megatron()


def argument_defaults() -> dict[str, Any]:
    """Return defaults for the arguments of Megatron whose own defaults need CUDA, in the form of `args_defaults`."""
    fusions = (
        *("masked_softmax_fusion", "bias_gelu_fusion", "bias_dropout_fusion", "apply_rope_fusion"),
        *("gradient_accumulation_fusion", "cross_entropy_loss_fusion", "moe_permute_fusion"),
    )
    return {
        "distributed_backend": "gloo",
        "transformer_impl": "local",
        "no_persist_layer_norm": True,
        "use_cpu_initialization": True,
        **dict.fromkeys(fusions, False),
    }


def _keep_freed_memory() -> None:
    """Let the allocator reuse large blocks of memory, as torch's allocator for CUDA does.

    By default, glibc returns large blocks to the kernel, and each step pays for page faults. Other C libraries stay
    unchanged.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _adapt_megatron() -> None:
    """Change what the mapping of `torch.cuda` does not reach in megatron-core 0.19."""
    # Megatron checks this variable, which only matters if CUDA kernels of communication and computation overlap.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Megatron draws from the GPU's generator and warns each time if the draw has moved the CPU's generator.
    random_logger = logging.getLogger("megatron.core.tensor_parallel.random")
    random_logger.addFilter(lambda record: "CPU RNG state changed" not in record.msg)

    # Megatron warns that Transformer Engine and Apex are missing, which a machine without CUDA cannot have.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        import megatron.training.training

    # This function warms up the fusions on CUDA.
    replace(megatron.training.training, "set_jit_fusion_options", lambda tp_size=None: None)
    # Megatron would make this tensor on a device that it names by number.
    replace(megatron.training.training, "_seqlen_stats_in_iteration", torch.zeros(2, dtype=torch.float64))


# Devices


def _current_device() -> torch.device:
    return _CPU


def _on_cpu(device: Any) -> Any:
    """Return the CPU for every way to name a CUDA device, and any other device unchanged."""
    is_cuda = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return _CPU if is_cuda or isinstance(device, int) else device


def _with_cpu_device(function: Callable, position: int | None = None) -> Callable:
    """Let a function take the CPU for a CUDA device in `device` or at a position, and pin no memory."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if position is not None and len(args) > position:
            args = (*args[:position], _on_cpu(args[position]), *args[position + 1 :])
        return function(*args, **kwargs)

    return wrapper


def _factories() -> Iterator[str]:
    """Yield the names of torch's functions that take the device of a new tensor."""
    yield from ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")
    # `with torch.device(…)` looks for these functions. torch caches them, so this call must come before they are
    # replaced: the wrappers call the original functions.
    for factory in _device_constructors():
        if getattr(torch, factory.__name__, None) is factory:
            yield factory.__name__


# Streams and events


class _Stream(torch.cpu.Stream):
    """The one queue of work. Everything happens in program order, so there is nothing to wait for."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event(torch.cpu.Event):
    """A mark in the one queue of work; all work before the mark is done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


_ONLY_STREAM = _Stream()

# Functions of `torch.cuda` that have nothing to do on the CPU, where everything happens in program order.
_NO_OPERATION = (*("set_device", "set_stream", "synchronize", "_lazy_init", "empty_cache", "reset_peak_memory_stats"),)


# Random generators


class _OneGenerator:
    """`torch.cuda.default_generators`, in which the CPU's generator stands for the generator of every device."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


_GENERATOR_FUNCTIONS = {
    "get_rng_state": lambda device=None: torch.default_generator.get_state(),
    "set_rng_state": lambda new_state, device=None: torch.default_generator.set_state(new_state),
    "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    "manual_seed_all": lambda seed: torch.default_generator.manual_seed(seed),
}

_make_iterator = torch.utils.data.DataLoader.__iter__


@functools.wraps(_make_iterator)
def _make_iterator_without_a_draw(self: torch.utils.data.DataLoader) -> Any:
    """Make the iterator of a data loader without the draw of a seed from the CPU's generator.

    Here the draw would shift the dropout of a resumed run, which makes its data loaders after it has restored the
    generator.
    """
    with torch.random.fork_rng(devices=()):
        return _make_iterator(self)


# Properties of the device


_PROPERTIES = SimpleNamespace(
    name="CPU", major=0, minor=0, total_memory=psutil.virtual_memory().total, multi_processor_count=1
)


def _peak_resident_bytes(device: Any = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident_bytes(device: Any = None) -> int:
    return psutil.Process().memory_info().rss


def _memory_stats(device: Any = None) -> dict[str, int]:
    resident, peak = _resident_bytes(), _peak_resident_bytes()
    return {
        "allocated_bytes.all.current": resident,
        "allocated_bytes.all.peak": peak,
        "reserved_bytes.all.current": resident,
        "allocation.all.current": 0,
    }


# Names of types


_type: Callable = torch.Tensor.type


@functools.wraps(_type)
def _type_of_cuda(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
    """Return names such as `torch.cuda.FloatTensor`, with which Megatron compares; convert as `Tensor.type` does."""
    if dtype is None:
        # Inside a torch function mode, such as `with torch.device(…)`, `_type` calls this wrapper again. So the name
        # may begin with `torch.cuda.` already.
        return "torch.cuda." + _type(self).rpartition(".")[2]
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.", 1)
    return _type(self, dtype, non_blocking, **kwargs)


# Collectives: gathering tensors of different sizes, which NCCL has and gloo lacks, and sizes in tensors on the CPU


_all_gather: Callable = torch.distributed.all_gather
_all_to_all_single: Callable = torch.distributed.all_to_all_single


@functools.wraps(_all_gather)
def _all_gather_any(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    if len({output.shape for output in tensor_list}) == 1:
        return _all_gather(tensor_list, tensor, group, async_op)
    tensor_list[torch.distributed.get_rank(group)].copy_(tensor)
    for rank, output in enumerate(tensor_list):
        torch.distributed.broadcast(output, group=group, group_src=rank)
    return None


@functools.wraps(_all_to_all_single)
def _all_to_all_of_tensor_sizes(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    *args: Any,
    **options: Any,
) -> Any:
    """Take the sizes also as tensors: Megatron's dispatcher makes NumPy arrays only of tensors on a GPU."""
    sizes = (
        each.tolist() if isinstance(each, torch.Tensor) else each for each in (output_split_sizes, input_split_sizes)
    )
    return _all_to_all_single(output, input, *sizes, *args, **options)


# Everything that `install` replaces, by its owner.
_REPLACEMENTS: dict[Any, dict[str, Any]] = {
    torch: {
        **{name: _with_cpu_device(getattr(torch, name)) for name in _factories()},
        # Megatron compiles its fusions for GPUs when it is imported. On a CPU, that needs a compiler and minutes.
        "compile": lambda model=None, **kwargs: (lambda function: function) if model is None else model,
    },
    torch.Tensor: {
        "to": _with_cpu_device(torch.Tensor.to, position=1),
        "cuda": lambda self, device=None, non_blocking=False, memory_format=None: self,
        "pin_memory": lambda self, device=None: self,
        "record_stream": lambda self, stream: None,
        "type": _type_of_cuda,
    },
    torch.nn.Module: {
        "to": _with_cpu_device(torch.nn.Module.to, position=1),
        "cuda": lambda self, device=None: self,
    },
    torch.cuda: {
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _ONLY_STREAM,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "nvtx": SimpleNamespace(
            range_push=lambda message: 0,
            range_pop=lambda: 0,
            range=lambda message, *args, **kwargs: contextlib.nullcontext(),
        ),
        # torch.compile has a rule for each function of torch, so no function may have two names.
        **{name: lambda *args, **kwargs: None for name in _NO_OPERATION},
        "_lazy_call": lambda callable, **kwargs: callable(),
        **_GENERATOR_FUNCTIONS,
        "default_generators": _OneGenerator(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        # Megatron wants one device for each local rank.
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": _current_device,
        "get_device_properties": lambda device=None: _PROPERTIES,
        # Megatron takes grouped experts from this capability on. MaskMoE's experts are grouped on every device.
        "get_device_capability": lambda device=None: (8, 0),
        "memory_stats": _memory_stats,
        **dict.fromkeys(("memory_allocated", "memory_reserved"), _resident_bytes),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), _peak_resident_bytes),
    },
    torch.cuda.random: _GENERATOR_FUNCTIONS,
    # torch itself asks `torch.accelerator`, and must learn that there is no accelerator.
    torch.accelerator: {
        "is_available": lambda: False,
        "current_accelerator": lambda check_available=False: None,
    },
    torch.utils.data.DataLoader: {"__iter__": _make_iterator_without_a_draw},
    torch.distributed: {
        "all_gather": _all_gather_any,
        "all_to_all_single": _all_to_all_of_tensor_sizes,
    },
}
