"""Training runs of a tiny model: their description, their folder, and what they leave."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from support.datasets import build_mask, count_ids, predictable_ids, write_character_tokenizer, write_documents
from support.launchers import TIMEOUT, Outcome, RankProcesses, Rendezvous, rank_environments, start_ranks
from support.runs import read_scalars

from maskmoe.data.dataset_writing import optimal_dtype
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.mask import HashLayers, RoutingMask

VOCAB_SIZE = 510
SETTINGS = f"""
    --num-layers 4 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32
    --position-embedding-type rope --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 8 --moe-ffn-hidden-size 32 --moe-router-topk 2
    --micro-batch-size 2 --global-batch-size 8 --train-iters 21
    --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 3
    --data-path data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --num-workers 0
    --eval-iters 1 --eval-interval 5 --save-interval 7 --log-interval 1 --tensorboard-log-interval 1
"""
"""Flags of every run, which the flags of a single run override."""

PRETRAIN = ("-m", "maskmoe.training.pretrain")

COMPARED_SCALARS = (
    "lm loss",
    "lm loss validation",
    "mtp_1 loss",
    "mtp_2 loss",
    "load_balancing_loss",
    "seq_load_balancing_loss",
    "global_load_balancing_loss",
    "z_loss",
    "grad-norm",
)
"""Scalars that are compared between runs: every loss that training logs, and the norm of all gradients."""


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        flags: Added to `SETTINGS`, which they override.
        ranks: Number of processes, which form one group.
        continues: Name of the run whose checkpoint is loaded.
        mask: File given as `--routing-mask`; None leaves the flag out.
        saves: Whether the run writes checkpoints: every 7 iterations and at its end.
        program: Python's arguments before the flags.
        torchrun: Start the ranks by torchrun, as users do. Starting them directly is faster by seconds.
        restarts: How often torchrun may restart the ranks.
        logs_scalars: Whether the run writes TensorBoard events.
        omits: Flags of `SETTINGS` that are left out, with their values.
        sees_gpus: Whether the processes see the GPUs of this machine.
        imports_first: Whether the program begins with the import of Megatron-Core. Then its processes may be preloaded,
            see `RankProcesses`.
    """

    flags: str = ""
    ranks: int = 1
    continues: str | None = None
    mask: str | None = "mask.safetensors"
    saves: bool = False
    program: Sequence[str] = PRETRAIN
    torchrun: bool = False
    restarts: int = 0
    logs_scalars: bool = True
    omits: str | None = None
    sees_gpus: bool = False
    imports_first: bool = True


@dataclass(frozen=True)
class TrainingOutcome(Outcome):
    """Exit codes, output and files of a training run that has ended.

    Its folder holds checkpoints in `save`, TensorBoard's events in `tensorboard` and the output in `*.log`.
    """

    @property
    def checkpoints(self) -> Path:
        return self.folder / "save"

    @property
    def saved(self) -> list[int]:
        """The iterations of the persistent checkpoints that all starts of the run have saved, as the log says."""
        log = (self.checkpoints / "logs" / "rank0.log").read_text()
        return [int(iteration) for iteration in re.findall(r"^checkpoint of iteration (\d+) saved", log, re.MULTILINE)]

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """Values of the logged `COMPARED_SCALARS` by name and iteration, with the precision of fp32."""
        logged = read_scalars(self.folder)
        return {
            name: {event.step: event.value for event in logged[name]} for name in COMPARED_SCALARS if name in logged
        }

    @property
    def iterations(self) -> list[int]:
        """The iterations that this run trained."""
        return list(self.curves["lm loss"])

    def difference(self, reference: "TrainingOutcome", scalars: Sequence[str] | None = None) -> float:
        """Return the largest relative difference to the reference over all iterations of this run.

        Args:
            reference: Has logged at least the iterations of this run.
            scalars: Names of the scalars to compare, by default all. Then both runs must have logged the same ones in
                the iterations of this run.
        """
        iterations = set(self.iterations)
        logged = {name for name, curve in reference.curves.items() if iterations & curve.keys()}
        assert scalars or self.curves.keys() == logged
        values = [
            (value, reference.curves[name][iteration])
            for name in scalars or self.curves
            for iteration, value in self.curves[name].items()
        ]
        ours, theirs = np.array(values).T
        return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


class TrainingProcesses(RankProcesses):
    """Running processes of one training run."""

    def outcome(self) -> TrainingOutcome:
        return TrainingOutcome(**vars(super().outcome()))


class Workplace:
    """A folder with a dataset, token counts and routing masks, where training processes run.

    Attributes:
        folder: Holds the datasets `data` and `ended`, whose documents end with the tokenizer's end-of-document id, a
            tokenizer of characters in `tokenizer`, `counts.safetensors`, and the routing masks `mask.safetensors`,
            `three_layers.safetensors`, `five_layers.safetensors`, `six_layers.safetensors`,
            `starving.safetensors` (all tokens go to the first 4 experts), `rank_local.safetensors` (for two expert-
            parallel ranks), `wider.safetensors` (`mask.safetensors`, widened), `hash_layers.safetensors` (two hash
            layers with V = 2 below layers with all experts) and `megatrons.safetensors` (the hash layers if
            Megatron-Core has hash layers, else all experts in all layers).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        documents = predictable_ids(np.random.default_rng(0), VOCAB_SIZE)
        write_documents(folder / "data", documents, optimal_dtype(VOCAB_SIZE))
        ended = [np.append(document, VOCAB_SIZE - 1) for document in documents]
        write_documents(folder / "ended", ended, optimal_dtype(VOCAB_SIZE))
        write_character_tokenizer(folder / "tokenizer", VOCAB_SIZE)
        frequency = count_ids(folder / "data", VOCAB_SIZE)
        frequency.save(folder / "counts.safetensors")
        layers = {"mask": 4, "three_layers": 3, "five_layers": 5, "six_layers": 6}
        for name, num_layers in layers.items():
            build_mask(frequency, 8, num_layers, "uniform", seed=1).save(folder / f"{name}.safetensors")
        mask = RoutingMask.load(folder / "mask.safetensors")
        starving = replace(mask, row_of_id=mask.row_of_id % 4)
        starving.save(folder / "starving.safetensors")
        rank_local = build_mask(frequency, 8, 4, "rank-local", expert_model_parallel_size=2)
        # Ranks, which also import this module, do not find the programs in tools/studies.
        from widen_routing_mask import widen_routing_mask

        wider = widen_routing_mask(mask, frequency=frequency, frequent_mass=0.6, frequent_visible_experts=6)
        wider.save(folder / "wider.safetensors")
        hash_layers = MaskRecipe.from_preset("smoe", 8, 4, hash_layers=HashLayers(2, 2, "balanced"))
        build_routing_mask(hash_layers, frequency=frequency, workers=1).save(folder / "hash_layers.safetensors")
        from megatron.core.transformer.transformer_config import TransformerConfig  # after the CPU adapter

        has_hash_layers = hasattr(TransformerConfig, "moe_n_hash_layers")
        megatrons = hash_layers if has_hash_layers else MaskRecipe.from_preset("smoe", 8, 4)
        build_routing_mask(megatrons, frequency=frequency, workers=1).save(folder / "megatrons.safetensors")
        # The provenance of a uniform mask: the check of the expert-parallel size does not apply, as for a mask that
        # happens to be rank-local.
        replace(rank_local, provenance=mask.provenance).save(folder / "rank_local.safetensors")

    def run(self, run: Run, folder: Path, load: Path | None = None, timeout: float = TIMEOUT) -> TrainingOutcome:
        """Run a training run to its end; if a process fails or the run hangs, all its processes are killed."""
        with self.start(run, folder, load, are_preloaded=run.imports_first) as processes:
            processes.wait(timeout=timeout)
            return processes.outcome()

    def start(
        self,
        run: Run,
        folder: Path,
        load: Path | None = None,
        environment: Mapping[str, str] | None = None,
        are_preloaded: bool = False,
    ) -> TrainingProcesses:
        """Start the processes of a run; use the result as a context manager, which kills them at its end.

        Args:
            run: The run.
            folder: Is made, and takes everything that the run writes.
            load: Folder of the checkpoints to load.
            environment: Further variables of all processes.
            are_preloaded: See `RankProcesses`. Has no effect under torchrun.
        """
        program = [*run.program, *self.flags(run, folder, load)]
        folder.mkdir()
        if run.torchrun:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(run.ranks)]
            launcher += ["--monitor-interval", "0.1", "--max-restarts", str(run.restarts)]
            environments, program = [{}], [*launcher, *program]
            return TrainingProcesses(program, environments, folder, self.folder, environment, sees_gpus=run.sees_gpus)
        rendezvous = Rendezvous() if run.ranks > 1 else None
        environments = rank_environments(run.ranks, rendezvous and rendezvous.environment)
        return TrainingProcesses(
            program, environments, folder, self.folder, environment, rendezvous, run.sees_gpus, are_preloaded
        )

    def execute(self, program: Sequence[str], folder: Path, ranks: int = 1) -> Outcome:
        """Run Python on `program` as one group of ranks to its end; the existing `folder` takes their output."""
        with start_ranks(program, folder, ranks=ranks, working_folder=self.folder, are_preloaded=True) as processes:
            return processes.wait()

    @staticmethod
    def flags(run: Run, folder: Path, load: Path | None = None) -> list[str]:
        """Return the command line arguments of a run that writes to `folder`."""
        flags = [*shlex.split(SETTINGS), "--data-cache-path", str(folder / "cache")]
        flags += ["--tensorboard-dir", str(folder / "tensorboard")] if run.logs_scalars else []
        flags += ["--routing-mask", run.mask] if run.mask else []
        flags += ["--load", str(load)] if load else []
        flags += ["--save", str(folder / "save")] if run.saves else []
        return [*without_flags(flags, run.omits or ""), *shlex.split(run.flags)]


def without_flags(words: Sequence[str], omitted: str) -> list[str]:
    """Return the words of a command line without the flags in `omitted`, and without their values."""
    kept, is_kept = [], True
    for word in words:
        is_kept = word not in omitted.split() if word.startswith("--") else is_kept
        kept += [word] if is_kept else []
    return kept
