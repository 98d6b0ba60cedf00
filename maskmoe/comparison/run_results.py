"""The measurements of one run: losses by iteration, losses of held-out text, and routing."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from maskmoe.files.json_files import read_json
from maskmoe.workflow.training_log import IterationRecord, ValidationRecord

_MAX_POINTS = 200


def _check_rectangular(rows: list[list[int]]) -> list[list[int]]:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("all layers must have the same number of experts")
    return rows


class Curve(BaseModel, frozen=True):
    """Losses by iteration, in nats per token. Iterations ascend."""

    iterations: list[int] = []
    losses: list[float] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.iterations) != len(self.losses) or self.iterations != sorted(set(self.iterations)):
            raise ValueError("a curve needs ascending iterations, and one loss for each iteration")
        return self

    @classmethod
    def of(cls, records: Mapping[int, IterationRecord] | Mapping[int, ValidationRecord]) -> "Curve":
        """Return the curve of the finite losses among the records of a training log."""
        points = {iteration: record.loss for iteration, record in sorted(records.items()) if record.loss is not None}
        return cls(iterations=list(points), losses=list(points.values()))

    def thinned(self) -> "Curve":
        """Return a curve of at most 200 points, which are means of neighbouring points of this curve.

        A point stands at the last iteration of its neighbours, as in Megatron's log, whose lines are means as well.
        """
        step = -(-len(self.losses) // _MAX_POINTS) or 1
        starts = range(0, len(self.losses), step)
        groups = [self.losses[start : start + step] for start in starts]
        last = len(self.losses) - 1
        return Curve(
            iterations=[self.iterations[min(start + step - 1, last)] for start in starts],
            losses=[math.fsum(group) / len(group) for group in groups],
        )

    @property
    def last_loss(self) -> float | None:
        """The loss of the last iteration; None if there is no iteration, or if the loss is not a finite number."""
        return self.losses[-1] if self.losses and math.isfinite(self.losses[-1]) else None


class RoutingHistory(BaseModel, frozen=True):
    """How the checkpoints of a run route a fixed text, as `maskmoe analyze` has written.

    A value that does not exist is None, for example the entropy of a layer in which no token has a choice.

    Attributes:
        layers: numbers of the layers with experts.
        iterations: iterations of the checkpoints.
        entropy: [checkpoints, layers], mean entropy of the router in nats, over tokens with a choice.
        first_weight: [checkpoints, layers], mean weight of a token's best expert, over tokens with a choice.
        fluctuation: [checkpoints - 1, layers], share of all tokens' experts that changed since the checkpoint before.
        routable_fluctuation: [checkpoints - 1, layers], the same share over tokens with a choice.
        single_expert_token_share: [layers], share of tokens without a choice.
        id_information: [layers], mutual information of expert and id at the last checkpoint, in nats.
        distinct_experts: by band, [layers], number of experts that process an id's occurrences at the last checkpoint.
    """

    layers: list[int]
    iterations: list[int]
    entropy: list[list[float | None]]
    first_weight: list[list[float | None]]
    fluctuation: list[list[float]]
    routable_fluctuation: list[list[float | None]]
    single_expert_token_share: list[float]
    id_information: list[float]
    distinct_experts: dict[str, list[float | None]]

    @model_validator(mode="after")
    def _check(self) -> Self:
        num_layers, num_checkpoints = len(self.layers), len(self.iterations)
        by_checkpoint = (
            (self.entropy, num_checkpoints),
            (self.first_weight, num_checkpoints),
            (self.fluctuation, num_checkpoints - 1),
            (self.routable_fluctuation, num_checkpoints - 1),
        )
        by_layer = [self.single_expert_token_share, self.id_information, *self.distinct_experts.values()]
        by_layer += [row for rows, _ in by_checkpoint for row in rows]
        if not num_layers or any(len(rows) != number for rows, number in by_checkpoint):
            raise ValueError("routing needs layers, and values of each checkpoint")
        if any(len(row) != num_layers for row in by_layer):
            raise ValueError("routing needs one value for each layer")
        return self

    @classmethod
    def read(cls, path: Path) -> "RoutingHistory":
        """Read routing.json. Raises UserError if the file cannot be read."""
        content = read_json(path)
        checkpoints, changes = content["checkpoints"], content["fluctuation"]
        last = checkpoints[-1]
        return cls(
            layers=content["layers"],
            iterations=[checkpoint["iteration"] for checkpoint in checkpoints],
            entropy=[checkpoint["entropy"] for checkpoint in checkpoints],
            first_weight=[checkpoint["first_weight"] for checkpoint in checkpoints],
            fluctuation=[change["by_layer"] for change in changes],
            routable_fluctuation=[change["routable_by_layer"] for change in changes],
            single_expert_token_share=last["single_expert_token_share"],
            id_information=last["id_expert_information"],
            distinct_experts={name: band["by_layer"] for name, band in last["distinct_experts"]["by_band"].items()},
        )

    @property
    def has_choice(self) -> bool:
        """Whether any token has a choice among experts."""
        return min(self.single_expert_token_share) < 1


class Band(BaseModel, frozen=True):
    """The loss of the held-out tokens whose ids belong to one frequency band.

    Attributes:
        name: name of the band.
        share: share of the band in all held-out tokens.
        loss: mean loss in nats per token; NaN, in the file null, if the text has no token of the band.
    """

    name: str
    share: float
    loss: Annotated[float, BeforeValidator(lambda loss: math.nan if loss is None else loss)]


class HeldOut(BaseModel, frozen=True):
    """The loss of one held-out text after training.

    Attributes:
        loss: mean loss of all tokens in nats per token.
        bands: the same loss by frequency band.
    """

    loss: float
    bands: Annotated[list[Band], Field(min_length=1)]

    def loss_of(self, band: str | None) -> float:
        """Return the loss of one band by its name, or of all tokens for None."""
        return next((each.loss for each in self.bands if each.name == band), self.loss)


class Evaluation(HeldOut, frozen=True):
    """The evaluation of a trained model on the suite's held-out text.

    Attributes:
        load: for each layer with experts, the number of held-out tokens that each expert got.
        routing: routing of each checkpoint; None for a model without experts.
        further: losses of further held-out texts by the names of the texts.
    """

    load: Annotated[list[list[int]], AfterValidator(_check_rectangular)]
    routing: RoutingHistory | None
    further: dict[str, HeldOut] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.routing and {band.name for band in self.bands} - self.routing.distinct_experts.keys():
            raise ValueError("routing.distinct_experts must name all bands")
        return self

    @classmethod
    def read(cls, evaluation: Path, further: Mapping[str, Path], routing: Path | None) -> Self:
        """Read the files that evaluation and analysis of a run have written.

        Args:
            evaluation: the evaluation on the suite's held-out text.
            further: the evaluations on further held-out texts, by the names of the texts.
            routing: `routing.json` of `maskmoe analyze`; None for a model without experts.

        Raises:
            UserError: a file cannot be read.
        """
        content = read_json(evaluation)
        own = {
            "load": [load["tokens_per_expert"] for load in content["expert_load"]],
            "routing": routing and RoutingHistory.read(routing),
            "further": {name: read_json(path) for name, path in sorted(further.items())},
        }
        return cls.model_validate(content | own)

    def held_out(self, name: str | None) -> HeldOut | None:
        """Return the loss on a further held-out text; None if the run lacks it. None names the suite's own text."""
        return self if name is None else self.further.get(name)


class RunResult(Evaluation, frozen=True):
    """A finished run that is compared.

    Attributes:
        variant: name of the variant.
        seed: seed of the run.
        seconds: duration of the training.
        training: losses of training.
        validation: losses of a part of the held-out text during training.
    """

    variant: str
    seed: int
    seconds: float
    training: Curve
    validation: Curve

    def held_out_loss(self, iteration: int) -> float:
        """Return the loss of a part of the held-out text after an iteration of `validation`."""
        return self.validation.losses[self.validation.iterations.index(iteration)]
