"""The CPU adapter maps torch.cuda to the CPU."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from support.paths import python_path
from torch import distributed

from maskmoe.megatron_compat import cpu

IS_INSTALLED = torch.empty(0, device="cuda").device.type == "cpu"
pytestmark = pytest.mark.skipif(not IS_INSTALLED, reason="CUDA is present, so the CPU adapter is not installed")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_refuses_to_come_after_megatron() -> None:
    result = run_python("import megatron.core\nfrom maskmoe.megatron_compat import cpu\ncpu.install()")
    assert result.returncode != 0
    assert "RuntimeError: the CPU adapter must be installed before megatron is imported" in result.stderr


def test_packages_for_gpus_are_not_used(tmp_path: Path) -> None:
    """An image for GPUs may also run on a CPU. Packages that were imported before stay, as stubs in tests do."""
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("imported = True\n")
        (tmp_path / name / "optimizers.py").write_text("FusedAdam = FusedSGD = None\n")
    program = """
        import sys
        if len(sys.argv) > 1:
            import apex
        from maskmoe.megatron_compat import prepare_process
        prepare_process()
        import torch
        from megatron.core import optimizer
        print(optimizer.Adam is torch.optim.AdamW, "apex" in sys.modules and sys.modules["apex"] is not None)
    """
    environment = {**os.environ, "PYTHONPATH": python_path(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for arguments, printed in (((), "True False"), (("first",), "False True")):
        command = [sys.executable, "-c", dedent(program), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        assert result.stdout.split("\n")[-2] == printed


def test_gpus_that_torch_cannot_use_are_refused() -> None:
    """With a driver that is too old, the driver's library still counts the GPUs."""
    result = run_python(
        "import torch\n"
        "torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 4\n"
        "from maskmoe.processes.run_tool import run_tool\n"
        "from maskmoe.megatron_compat import prepare_process\n"
        "run_tool(prepare_process)"
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: torch ")
    assert "cannot use the 4 GPUs" in result.stderr
    assert "CUDA_VISIBLE_DEVICES" in result.stderr


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", 0, 1, torch.device("cuda", 0), torch.device("cpu"), None], ids=str
)
def test_tensors_are_made_and_stay_on_the_cpu(device: object) -> None:
    make = (torch.empty, torch.zeros, torch.ones, torch.arange, torch.randn, torch.randperm)
    tensors = [function(2, device=device) for function in make]
    tensors += [function([1.5], device=device) for function in (torch.tensor, torch.as_tensor)]
    tensors += [torch.full((2,), 7, device=device), torch.linspace(0, 1, 3, device=device)]
    tensors += [torch.ones_like(tensors[0], device=device), torch.tensor([1.5], device=device, pin_memory=True)]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    tensor, module = torch.ones(2), torch.nn.Linear(2, 2)
    if device is not None:
        assert tensor.to(device) is tensor
        assert tensor.to(device=device, dtype=torch.float64, non_blocking=True).dtype == torch.float64
        assert module.to(device) is module
    assert tensor.cuda(0, non_blocking=True) is tensor.cuda() is tensor.pin_memory() is tensor
    assert module.cuda() is module


def test_other_default_devices_hold() -> None:
    """The library transformers makes models on the meta device before it loads their weights."""
    with torch.device("meta"):
        tensors = [torch.empty(2), torch.arange(3), torch.ones(2), torch.tensor([1.0]), torch.nn.Linear(2, 2).weight]
    assert all(tensor.is_meta for tensor in tensors)


def test_other_conversions_are_untouched() -> None:
    tensor = torch.ones(2)
    assert tensor.to(torch.int32).dtype == torch.int32
    assert tensor.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert tensor.to("meta").device.type == "meta"
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.tensor(1, requires_grad=False, dtype=torch.float16).dtype == torch.float16


def test_type_names_are_those_of_cuda() -> None:
    tensor = torch.ones(2)
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.nn.Parameter(tensor).half().type() == "torch.cuda.HalfTensor"
    assert tensor.type("torch.cuda.IntTensor").dtype == torch.int32
    assert tensor.type("torch.DoubleTensor").dtype == torch.float64
    assert tensor.type(torch.float64).dtype == torch.float64
    assert tensor.type(torch.LongTensor).dtype == torch.int64
    assert tensor.type(tensor.type()) is tensor
    with torch.device("meta"):  # in a torch function mode, the original method calls its wrapper again
        assert tensor.type() == "torch.cuda.FloatTensor"


def test_generators_are_that_of_the_cpu() -> None:
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    torch.cuda.manual_seed(5)
    first = torch.rand(3, device="cuda")
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)
    assert torch.cuda.default_generators[torch.cuda.current_device()] is torch.default_generator
    assert len(torch.cuda.default_generators) == 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    """By default, glibc maps new pages for each tensor of 64 MiB: 16,384 page faults, or 32 of huge pages."""
    result = run_python(
        "from maskmoe.megatron_compat import prepare_process\n"
        "prepare_process()\n"
        "import resource, torch\n"
        "torch.ones(2**24)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "torch.ones(2**24)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    assert int(result.stdout) < 16


def test_command_line_defaults_are_flags_of_megatron() -> None:
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    assert cpu.argument_defaults().keys() <= known


def check_all_gather(sizes: list[int], columns: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [torch.arange(size * 3 + rank).to(dtype)[: size * 3] + rank for rank, size in enumerate(sizes)]
    parts = [part.view(size, 3) if columns else part[:size] for part, size in zip(parts, sizes, strict=True)]
    outputs = [torch.full_like(part, 99) for part in parts]
    distributed.all_gather(outputs, parts[distributed.get_rank()])
    assert all(torch.equal(output, part) for output, part in zip(outputs, parts, strict=True))


def check_reduce_scatter(sizes: list[int]) -> None:
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    inputs = [torch.arange(size, dtype=torch.float32) + 10 * index for index, size in enumerate(sizes)]
    kept = [part.clone() for part in inputs]
    output = torch.empty(sizes[rank])
    distributed.reduce_scatter(output, [(rank + 1) * part for part in inputs])
    assert torch.equal(output, sum(range(1, num_ranks + 1)) * inputs[rank])
    distributed.reduce_scatter(output, inputs, op=distributed.ReduceOp.MAX)
    assert torch.equal(output, inputs[rank])
    assert all(torch.equal(part, before) for part, before in zip(inputs, kept, strict=True))


def check_all_to_all(sizes: list[int]) -> None:
    """Rank r sends `sizes[q]` numbers, all of which are r, to each rank q; the sizes are in tensors."""
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    output, received = torch.empty(sizes[rank] * num_ranks), torch.full((num_ranks,), sizes[rank])
    distributed.all_to_all_single(output, torch.full((sum(sizes),), float(rank)), received, torch.tensor(sizes))
    assert torch.equal(output, torch.arange(float(num_ranks)).repeat_interleave(sizes[rank]))


def check_collectives() -> None:
    for sizes in ([2, 2], [1, 4], [5, 2], [0, 3], [3, 0]):
        for columns in ((), (3,)):
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                check_all_gather(sizes, columns, dtype)
        check_reduce_scatter(sizes)
        check_all_to_all(sizes)


def test_uneven_collectives_equal_the_reference(run_ranks, tmp_path: Path) -> None:
    run_ranks(check_collectives, tmp_path)
