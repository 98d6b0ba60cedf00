"""A gated delta net on Transformer Engine: `python … FOLDER PROVIDER`, with RANK and WORLD_SIZE set.

PROVIDER is `stub` or `installed`. The script loads the checkpoint of local modules FOLDER/local and saves the layer
again, to FOLDER/transformer_engine. The stub, which computes on the CPU, also writes the results of `run_layer` to
FOLDER/results.safetensors.
"""

import sys
from pathlib import Path

if __name__ == "__main__" and sys.argv[2] == "stub":
    from support import stub_transformer_engine

    stub_transformer_engine.install()
from maskmoe.megatron_compat import cpu, prepare_process

if __name__ == "__main__":
    cpu.install(hidden=())
prepare_process()
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from safetensors.torch import save_file
from support.gated_delta_net import make_gated_delta_net, run_layer
from support.ranks.gated_delta_net_ranks import whole_batch


def main() -> None:
    folder, provider = Path(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    layer = make_gated_delta_net(transformer_impl="transformer_engine")
    state = layer.sharded_state_dict()
    # Only Transformer Engine's norms have a state of FP8, which is empty.
    del state["self_attention.out_norm._extra_state"]
    loaded = dist_checkpointing.load(state, str(folder / "local"))
    layer.load_state_dict(loaded | {"self_attention.out_norm._extra_state": None})
    (folder / "transformer_engine").mkdir()
    dist_checkpointing.save(layer.sharded_state_dict(), str(folder / "transformer_engine"))
    if provider == "stub":
        save_file(run_layer(layer, *whole_batch()), folder / "results.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
