"""One rank of a group: `python -m support.rank_program FOLDER`, with the variables that torchrun sets.

The rank runs the function that `run_as_ranks` describes in FOLDER/work.pickle, and writes FOLDER/rankR.pt.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

import torch

from maskmoe.megatron_compat import cpu, prepare_process


def prepare_rank(uses_transformer_engine: bool, joins: bool) -> None:
    """Prepare this process for Megatron, and join the other ranks; arguments as of `run_as_ranks`."""
    if uses_transformer_engine:
        cpu.install(hidden=())
    prepare_process()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if joins:
        torch.distributed.init_process_group("gloo" if cpu.is_installed() else "nccl")


def load_function(file: str, name: str) -> Callable[..., Any]:
    """Import a file as a module, and return one of its functions."""
    spec = spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def run_as_rank(main: Callable[[], None]) -> NoReturn:
    """Run a program, and end its process with code 0, or with code 1 and a traceback.

    The process ends without destroying Python's objects. A process group that lives until then has threads that still
    finish a collective. If such a thread needs the interpreter while it is being destroyed, Python ends the thread in
    the middle of C++, which aborts the process: "terminate called without an active exception". Groups outlive
    `destroy_process_group` if a reference cycle holds them, and if a rank fails.
    """
    code = 0
    try:
        main()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    folder = Path(sys.argv[1])
    file, name, arguments, uses_transformer_engine, joins = pickle.loads((folder / "work.pickle").read_bytes())
    prepare_rank(uses_transformer_engine, joins)
    result = load_function(file, name)(*arguments)
    torch.save(result, folder / f"rank{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_as_rank(main)
