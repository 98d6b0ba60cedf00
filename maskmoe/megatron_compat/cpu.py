"""Runs Megatron-Core's training stack on a machine without CUDA, over gloo.

Megatron addresses its device as `torch.cuda` throughout. Makers of other accelerators map that name to their device;
this module maps it to the CPU, so that one training path serves both and CPU tests exercise the code that runs on
GPUs. `install()` must run before `megatron` is first imported, and never where CUDA is present.

The mapping is made of plain functions put in the place of others, once. Nothing is intercepted per operation.
"""

import contextlib
import functools
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

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

# What has no counterpart on the CPU where everything happens in program order.
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
    """Report whether `torch.cuda` stands for the CPU in this process."""
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
    """Values of Megatron's arguments where its defaults need CUDA, in the form of `args_defaults`."""
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
    """The CPU for any way to name a CUDA device, anything else as it is."""
    if isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda")):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


def _map_devices() -> None:
    def with_cpu_device(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def wrapper(*args, **kwargs):
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return wrapper

    # What `with torch.device(…)` looks for are the factories as they are now, which the wrappers call.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, with_cpu_device(getattr(torch, name)))

    def move_to(original: Callable) -> Callable:
        @functools.wraps(original)
        def wrapper(self, *args, **kwargs):
            args = (_on_cpu(args[0]), *args[1:]) if args else args
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            return original(self, *args, **kwargs)

        return wrapper

    torch.Tensor.to = move_to(torch.Tensor.to)
    torch.nn.Module.to = move_to(torch.nn.Module.to)
    torch.nn.Module.to_empty = move_to(torch.nn.Module.to_empty)
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False, memory_format=None: self
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.Tensor.pin_memory = lambda self, device=None: self


class _Stream:
    """The one queue of work that there is."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_event(self, event) -> None: ...

    def wait_stream(self, stream) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Event:
    """A mark in the one queue of work: everything before it is done."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _map_streams() -> None:
    only_stream = _Stream()
    torch.cuda.Stream = _Stream
    torch.cuda.Event = _Event
    torch.cuda.current_stream = lambda device=None: only_stream
    torch.cuda.default_stream = lambda device=None: only_stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.Tensor.record_stream = lambda self, stream: None
    for name in _NO_OPERATION:
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.nvtx = SimpleNamespace(
        range_push=lambda message: 0,
        range_pop=lambda: 0,
        range=lambda message, *args, **kwargs: contextlib.nullcontext(),
    )


class _OneGenerator(Sequence):
    """`torch.cuda.default_generators` where the CPU's generator stands for that of every device."""

    def __getitem__(self, index):
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def _map_generators() -> None:
    def get_rng_state(device=None) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device=None) -> None:
        torch.default_generator.set_state(new_state)

    def seed_generator(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state
        module.manual_seed = module.manual_seed_all = seed_generator
        module.initial_seed = lambda: torch.default_generator.initial_seed()
    torch.cuda.default_generators = _OneGenerator()
    torch.cuda._lazy_call = lambda callable, **kwargs: callable()

    # A data loader draws a seed from the CPU's generator, on a GPU no concern of dropout. Here it would shift the
    # dropout of a resumed run, which makes its data loaders after the checkpoint has restored the generator.
    make_iterator = torch.utils.data.DataLoader.__iter__

    @functools.wraps(make_iterator)
    def make_iterator_without_a_draw(self):
        state = torch.default_generator.get_state()
        iterator = make_iterator(self)
        torch.default_generator.set_state(state)
        return iterator

    torch.utils.data.DataLoader.__iter__ = make_iterator_without_a_draw
    # Megatron warns each time that it has drawn from the GPU's generator and the CPU's has moved.
    random_logger = logging.getLogger("megatron.core.tensor_parallel.random")
    random_logger.addFilter(lambda record: "CPU RNG state changed" not in record.msg)


def _current_device() -> torch.device:
    return _CPU


def _map_properties() -> None:
    def peak_resident_bytes(device=None) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def resident_bytes(device=None) -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def memory_stats(device=None) -> dict[str, int]:
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
    torch.cuda.is_available = lambda: True
    torch.cuda.is_initialized = lambda: True
    # torch itself asks here, and should hear the truth.
    torch.accelerator.is_available = lambda: False
    torch.accelerator.current_accelerator = lambda check_available=False: None
    # A rank has the CPU to itself: the index torchrun gave it names no device, but Megatron wants one for each.
    torch.cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.cuda.current_device = _current_device
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_name = lambda device=None: properties.name
    torch.cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
    torch.cuda.memory_stats = memory_stats
    torch.cuda.memory_allocated = torch.cuda.memory_reserved = resident_bytes
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = peak_resident_bytes
    torch.cuda.mem_get_info = lambda device=None: (total_memory - resident_bytes(), total_memory)


def _allow_uneven_collectives() -> None:
    """gloo gathers and scatters tensors of one size only, NCCL those of any."""
    all_gather = torch.distributed.all_gather
    reduce_scatter = torch.distributed.reduce_scatter

    def is_even(tensors: list[torch.Tensor]) -> bool:
        return all(tensor.shape == tensors[0].shape for tensor in tensors)

    @functools.wraps(all_gather)
    def all_gather_any(tensor_list, tensor, group=None, async_op=False):
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
    def reduce_scatter_any(output, input_list, op=torch.distributed.ReduceOp.SUM, group=None, async_op=False):
        if is_even(input_list):
            return reduce_scatter(output, input_list, op, group, async_op)
        total = torch.cat(input_list)
        torch.distributed.all_reduce(total, op, group)
        output.copy_(total.split([len(part) for part in input_list])[torch.distributed.get_rank(group)])
        return None

    torch.distributed.all_gather = all_gather_any
    torch.distributed.reduce_scatter = reduce_scatter_any


def _map_type_names() -> None:
    """Megatron compares `Tensor.type()` with names such as `torch.cuda.FloatTensor`."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_of(self, dtype=None, non_blocking=False, **kwargs):
        if dtype is None:
            # Inside a torch function mode, such as `with torch.device(…)`, what is called here is this wrapper again.
            return "torch.cuda." + original(self).rpartition(".")[2]
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, non_blocking, **kwargs)

    torch.Tensor.type = type_of


def _adapt_megatron() -> None:
    """Cures for what the mapping alone does not reach; for megatron-core 0.19."""
    # Megatron asks for it where CUDA kernels of communication and computation overlap.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    # Megatron compiles its fusions, made for GPUs, when it is imported. On a CPU that needs a compiler and minutes.
    torch.compile = lambda model=None, **kwargs: (lambda function: function) if model is None else model

    # They say that Transformer Engine and Apex are missing, which a machine without CUDA cannot have.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        import megatron.training.training

    # Warms up the fusions.
    megatron.training.training.set_jit_fusion_options = lambda tp_size=None: None

    # Where the dispatcher copies split sizes to the host, they become NumPy arrays for the collective to read.
    import megatron.core.transformer.moe.token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu = to_host
