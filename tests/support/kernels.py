"""Runs Triton kernels on the CPU, in Triton's interpreter, or compiles them for GPUs that are not there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from maskmoe.transformer.kernels import launching

ARCHITECTURES = (90, 100)
"""Compute capabilities of Hopper and Blackwell GPUs, times 10."""


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Let kernels compute on CPU tensors; needs TRITON_INTERPRET=1, which tests/conftest.py sets."""
    from triton.runtime.interpreter import InterpreterBuilder

    dot = patch.object(InterpreterBuilder, "create_dot", _dot_of_bfloat16(InterpreterBuilder.create_dot))
    with patch.object(launching, "runs_kernels", lambda tensor: True), dot:
        yield


def _dot_of_bfloat16(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """Convert bf16 to fp32 before a product. The interpreter would multiply the bits of bf16 as integers."""
    import triton.language as tl

    def convert(builder: Any, operand: Any) -> Any:
        return builder.create_fp_ext(operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand

    def create_dot_of_fp32(builder: Any, left: Any, right: Any, *arguments: Any) -> Any:
        return create_dot(builder, convert(builder, left), convert(builder, right), *arguments)

    return create_dot_of_fp32


@contextmanager
def compiled_launches() -> Iterator[list[str]]:
    """Compile each launch for every architecture instead of running the kernel; yield the kernels' names.

    The process must not have TRITON_INTERPRET=1.
    """
    names: list[str] = []

    def compile_launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        options["debug"] = bool(kernel.debug)
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        signature = {name: _type_name(values[name], name in constants) for name in kernel.arg_names}
        constexprs = {name: value for name, value in values.items() if signature[name] == "constexpr"}
        source = triton.compiler.ASTSource(kernel, signature, constexprs)
        for architecture in ARCHITECTURES:
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            assert compiled.asm["cubin"]
        names.append(kernel.__name__)

    with kernels_on_cpu(), patch.object(launching, "launch", compile_launch):
        yield names


def _type_name(value: object, is_constant: bool) -> str:
    """Return the name of a launch argument's type in the signature of a kernel."""
    if is_constant or value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
        names |= {torch.uint8: "u8", torch.bool: "i1", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
        return "*" + names[value.dtype]
    return {bool: "i1", int: "i32", float: "fp32"}[type(value)]
