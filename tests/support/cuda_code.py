"""Generates the CUDA code of compiled functions on a machine without a GPU, and counts its kernels.

`torch.compile` traces on the CPU. The graphs are then moved to a GPU that does not exist, with the properties of an
H100, and inductor writes their code. The code is never loaded. Import this module in a process of its own, because it
replaces triton's driver for good.
"""

import contextlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.config
import torch._inductor.config
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.runtime import triton_helpers
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DEVICE = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
)


@dataclass(frozen=True)
class CudaCode:
    """The code of a forward or backward pass.

    Attributes:
        num_kernels: The launches, those of torch's own operators included.
        text: Python with Triton kernels.
    """

    num_kernels: int
    text: str

    def kernels(self) -> list[tuple[str, str]]:
        """Return name and source of each Triton kernel."""
        return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", self.text, re.DOTALL)


class GpuDriver:
    """Stands for triton's driver of an H100."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        values = {
            "get_current_target": GPUTarget("cuda", 90, 32),
            "get_current_device": 0,
            "get_current_stream": 0,
            "get_active_torch_device": DEVICE,
            "get_device_interface": torch.cuda,
            "is_active": True,
        }
        if name not in values:
            raise AttributeError(name)
        return lambda *_: values[name]


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Let torch find an H100."""
    functions = {
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        **dict.fromkeys(("set_rng_state", "synchronize", "_lazy_init")),
    }
    of_interface = {"is_available": True, "get_compute_capability": 90, "get_device_properties": H100}
    of_worker = {"get_device_properties": H100, "current_device": 0}
    with contextlib.ExitStack() as stack:
        for owner, values in (
            (torch.cuda, functions),
            (CudaInterface, of_interface | {"current_device": 0}),
            (CudaInterface.Worker, of_worker),
        ):
            for name, value in values.items():
                answer = staticmethod(lambda *_, value=value, **__: value)
                stack.enter_context(patch.object(owner, name, answer if owner is not torch.cuda else answer.__func__))
        yield


class _GeneratedError(Exception):
    """Ends the compilation of a graph whose code is there."""


def cuda_code(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[CudaCode]:
    """Return the code of the forward pass of a function, and of the backward pass if an argument needs a gradient."""
    found: list[CudaCode] = []

    def generate(graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        found.append(_generate(graph, inputs, options))

        def run(*_: Any) -> Any:
            raise _GeneratedError

        run._boxed_call = True
        return run

    torch.compiler.reset()
    backend = lambda graph, inputs: compile_fx(graph, inputs, inner_compile=generate)  # noqa: E731
    compiled = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
    with (
        contextlib.suppress(_GeneratedError),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
    ):
        compiled(*args, **kwargs)
    return found


def _generate(graph: GraphModule, inputs: list[Any], options: dict[str, Any]) -> CudaCode:
    """Move a graph to the GPU, and return its code."""
    mode = detect_fake_mode(inputs)
    for node in graph.graph.nodes:
        node.args = tuple(DEVICE if isinstance(arg, torch.device) else arg for arg in node.args)
        node.kwargs = {name: DEVICE if name == "device" and arg else arg for name, arg in node.kwargs.items()}
    graph.recompile()
    counts, texts = [], []

    def count(nodes: list[Any]) -> list[Any]:
        launched = [node for node in nodes if not isinstance(node, NopKernelSchedulerNode)]
        counts.append(sum(not isinstance(node.node, MultiOutput) for node in launched))
        return nodes

    def keep(lowering: GraphLowering) -> Any:
        code = lowering.codegen()[0]
        texts.append(getattr(code, "value", code))
        raise _GeneratedError

    with pretended_gpu(), mode:
        on_gpu = [
            torch.empty_strided(each.size(), each.stride(), dtype=each.dtype, device=DEVICE)
            if isinstance(each, Tensor)
            else each
            for each in inputs
        ]
        FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*on_gpu)
    with (
        pretended_gpu(),
        torch._inductor.config.patch(_post_fusion_custom_pass=count),
        patch.object(GraphLowering, "compile_to_module", keep),
    ):
        try:
            compile_fx_inner(graph, on_gpu, **options)
        except Exception:  # inductor wraps the exception that ends the compilation
            if not texts:
                raise
    return CudaCode(counts[0], texts[0])


def assemble(name: str, source: str) -> None:
    """Assemble a Triton kernel of generated code for an H100, in its first configuration.

    Raises:
        CalledProcessError: `ptxas` refuses the code.
    """
    with pretended_gpu(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.py")  # triton reads the source of a kernel from a file
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        with patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
            spec.loader.exec_module(module)
        kernel = getattr(module, name)
        (config, *_), signature = kernel.configs, dict(kernel.triton_meta["signature"])
        signature |= {name: "constexpr" for name in kernel.fn.arg_names if name not in signature}
        constants = {**kernel.triton_meta.get("constants", {}), **config.kwargs}
        constants |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constants}
        (attributes,) = kernel.triton_meta["configs"]
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        ast = ASTSource(kernel.fn, signature, constants, attributes)
        compiled = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options)
        assembly = Path(folder, "kernel.ptx")
        assembly.write_text(compiled.asm["ptx"])
        target = re.search(r"^\.target (\w+)", compiled.asm["ptx"], re.MULTILINE)[1]
        program = max(Path(nvidia.__file__).parent.glob("bin/ptxas*"))  # the newest
        command = [program, f"--gpu-name={target}", assembly, "-o", Path(folder, "kernel.cubin")]
        subprocess.run(command, check=True)


triton.runtime.driver.set_active(GpuDriver())
