"""Suites: which variants of a model are compared and how they are trained, as a YAML file describes both.

The pydantic models say which keys a file may have. Values are words as they are written in the file. `Suite.read` then
merges the flags of the sections, so that each variant has all its flags.
"""

import itertools
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PlainValidator,
    PositiveInt,
    ValidationError,
    ValidationInfo,
)

from maskmoe.arguments import ranges
from maskmoe.arguments.flags import override
from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem
from maskmoe.files.untrusted import read_words
from maskmoe.launch.model_file import Flags, ModelFile, parse_flags, parse_layouts
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_NEEDED_FLAGS = ("train-iters", "seq-length", "global-batch-size")
_DECIDED_FLAGS = {"seed", "save", "load", "routing-mask", "data-path"}
# A preset decides all other flags of the mask.
_FLAGS_BESIDE_PRESET = {"seed", "shared-table", "expert-model-parallel-size"}
_MERGED_KEYS = {"flags", "expert-flags", "mask"}
_MASK_PREFIX = "mask."

_TAKEN_NAMES = {"corpus", "dataset", "frequency", "held-out", "tokenizer", "training"}

PATHS = ("input", "data_path", "tokenizer_model", "held_out")
"""The keys of the section `data` that hold paths."""

REQUIRED = "required"
"""The value of `input` in a suite that leaves the text to the command line."""


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a name consists of letters, digits and . _ + -, because it names a folder")
    return name


def check_text_name(name: str) -> str:
    """Return the name of a held-out text. Raises ValueError if it cannot name a folder, or another text has it."""
    if name in _TAKEN_NAMES:
        raise ValueError(f"the name {name} is taken: give the held-out text another name")
    return _check_name(name)


def _check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, not {', '.join(map(str, seeds))}")
    return seeds


def _parse[T](parse: Callable[[object, str, Mapping[str, str]], T], content: object, info: ValidationInfo) -> T:
    """Parse a section of flags or layouts. The context of the validation holds the variables for `${NAME}`."""
    try:
        return parse(content, "the section", info.context or {})
    except UserError as error:
        raise ValueError(str(error)) from error


def _parse_mask(content: object, info: ValidationInfo) -> Flags | Literal["none"]:
    """Parse the mask of a variant, see `_parse`."""
    if content == "none":
        return "none"
    if not isinstance(content, dict):
        raise ValueError("must be flags of `maskmoe mask`, such as {preset: hash}, or none")
    return _parse(parse_flags, content, info)


type Words = Annotated[tuple[str, ...], BeforeValidator(_to_list)]
Name = Annotated[str, AfterValidator(_check_name)]
TextName = Annotated[str, AfterValidator(check_text_name)]
Seeds = Annotated[tuple[PositiveInt, ...], BeforeValidator(_to_list), AfterValidator(_check_seeds)]
FlagSection = Annotated[Flags, PlainValidator(partial(_parse, parse_flags))]
LayoutSection = Annotated[Mapping[int, Flags], PlainValidator(partial(_parse, parse_layouts))]


class _Section(BaseModel, frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-")):
    """A mapping with known keys."""


class Variant(_Section):
    """A model to be trained.

    Attributes:
        title: Name in the report.
        mask: Flags of `maskmoe mask`; `none` for a model without experts.
        widen: Flags of `maskmoe mask widen`, which lets frequent ids of that mask see more experts; all other ids keep
            their expert, so that the variant shares the table of a variant with the same `mask`.
        model: Model file with the first flags and the layouts, instead of the suite's model file.
        flags: Flags of training, without the seed.
        layouts: Further flags by number of ranks, see `ModelFile`.
        program: Python file that trains and evaluates instead of MaskMoE's entry points, see `ModelFile.read`; the path
            is relative to the folder of the suite file that has the variants.
        program_sha256: SHA-256 of the program's file; empty without `program`. `Suite.read` sets it, and ignores a
            value in the file.
        seeds: Seeds of the variant's runs; by default those of the suite.
        setting: The values of `vary` that the variant has, such as `lr-2e-2`; empty without `vary`. `Suite.read` sets
            it, and ignores a value in the file.
    """

    title: str = ""
    mask: Annotated[Flags | Literal["none"], PlainValidator(_parse_mask)]
    widen: FlagSection = {}
    model: str = ""
    flags: FlagSection = {}
    layouts: LayoutSection = {}
    program: str = ""
    program_sha256: str = ""
    seeds: Seeds = ()
    setting: str = ""

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts."""
        return self.mask != "none"


class DataSection(_Section):
    """The text of all runs. Paths of files are relative to the folder of the suite file that has the section.

    Attributes:
        vocab_size: Number of ids of the tokenizer.
        input: Text files; `required` if the command line must name them. Without files and without `data_path`, the
            text is that of the installed Python.
        held_out: Further text files that models are evaluated on, by name.
        data_path: An existing dataset instead of text, as Megatron's `--data-path`; needs `split` and
            `tokenizer_model`.
        split: Megatron's `--split` of that dataset.
        tokenizer_type: Megatron's `--tokenizer-type` of that dataset.
        tokenizer_model: Megatron's `--tokenizer-model` of that dataset.
    """

    vocab_size: str = ""
    input: Words = ()
    held_out: dict[TextName, str] = {}
    data_path: Words = ()
    split: str = ""
    tokenizer_type: str = "SentencePieceTokenizer"
    tokenizer_model: str = ""


class Suite(_Section):
    """The variants that are compared, and how the variants are trained.

    Attributes:
        title: Title of the report.
        data: The text.
        model: Model file of all variants; the path is relative to the folder of the suite file that has the key.
        layers: Layers of all variants, each of attention and a feed-forward layer; 0 to leave the layers to the flags.
            The result is the flag `hybrid-layer-pattern`: `*E` for each layer with experts, `*-` without.
        flags: Flags of all variants.
        expert_flags: Flags of all variants with experts.
        mask: Flags of all masks that no preset makes.
        min_lr_ratio: Smallest learning rate of a run as a share of its largest; empty to leave `min-lr` to the flags.
        seeds: Seeds of the variants that name none.
        variants: Variants by name, in the order of the report.
        vary: Further values by flag. All variants are trained with every combination of the values. The name of a flag
            of masks begins with `mask.`.
        baselines: Names of the variants to which the others are compared, seed by seed.
    """

    title: str = ""
    data: DataSection = DataSection()
    model: str = ""
    layers: NonNegativeInt = 0
    flags: FlagSection = {}
    expert_flags: FlagSection = {}
    mask: FlagSection = {}
    min_lr_ratio: Annotated[str, Field(pattern=r"^(|0?\.\d+|[01])$")] = ""
    seeds: Seeds = (1,)
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]
    vary: dict[str, Annotated[Words, Field(min_length=1)]] = {}
    baselines: Words = ()

    @classmethod
    def read(cls, path: Path, variables: Mapping[str, str]) -> "Suite":
        """Read a suite file.

        Args:
            path: The file.
            variables: Values for `${NAME}` in the file.

        Raises:
            UserError: The file cannot be read or does not describe a suite.
        """
        try:
            content, folders = _read_with_base(path)
            suite = cls.model_validate(content, context=variables)
            return suite._complete(path, folders, variables)
        except ValueError as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise UserError(f"suite {path}: {problem}") from error

    @property
    def seq_length(self) -> int:
        """Tokens in a sample."""
        return int(next(iter(self.variants.values())).flags["seq-length"][0])

    def _complete(self, path: Path, folders: Mapping[str, Path], variables: Mapping[str, str]) -> "Suite":
        """Return the suite with complete variants. Raises ValueError if something does not fit together.

        Args:
            path: The file of the suite.
            folders: For each key, the folder of the file that has the key: its relative paths start there.
            variables: Values for `${NAME}`.
        """
        variants = {}
        for name, section in self.variants.items():
            model, key = (section.model, "variants") if section.model else (self.model, "model")
            model_file = ModelFile.read(folders[key] / model, variables) if model else ModelFile(path, {}, {})
            # Every combination of the values of `vary`.
            for values in itertools.product(*self.vary.values()):
                setting = dict(zip(self.vary, values, strict=True))
                own = parse_flags(setting, f"suite {path}: vary", variables)
                label = ".".join(f"{flag.removeprefix(_MASK_PREFIX)}-{value}" for flag, value in setting.items())
                varied = section.model_copy(update={"setting": label})
                variant = self._complete_variant(name, varied, model_file, folders["variants"], own)
                variants[f"{name}.{label}" if setting else name] = variant
        if unknown := [name for name in self.baselines if name not in self.variants]:
            raise ValueError(f"baselines: {', '.join(unknown)} is not a variant of the suite")
        data = self.data.model_dump()
        for key in PATHS:
            data[key] = absolute(data[key], folders.get("data", path.parent).resolve())
        update = {"title": self.title or path.stem, "variants": variants, "data": DataSection.model_construct(**data)}
        return self.model_copy(update=update)

    def _complete_variant(
        self, name: str, section: Variant, model_file: ModelFile, folder: Path, of_setting: Flags
    ) -> Variant:
        """Merge the flags of the model file, the suite, the variant and the setting; later flags replace earlier ones.

        All but those of the model file also replace its layouts, as flags on a command line do.
        A setting changes flags of experts and masks only of variants that have them.
        """
        own = dict(of_setting)
        of_mask = {flag.removeprefix(_MASK_PREFIX): own.pop(flag) for flag in [*own] if flag.startswith(_MASK_PREFIX)}
        if not section.has_experts:
            own = {flag: words for flag, words in own.items() if flag not in self.expert_flags}
        pattern = FeedForwardLayers((section.has_experts,) * self.layers).pattern("*")
        of_layers = {"hybrid-layer-pattern": (pattern,)} if self.layers else {}
        of_experts = self.expert_flags if section.has_experts else {}
        given = {**of_layers, **self.flags, **of_experts, **section.flags, **own}
        flags = dict(override(model_file.flags, given))
        needed = (*_NEEDED_FLAGS, "num-experts") if section.has_experts else _NEEDED_FLAGS
        if missing := [flag for flag in needed if flag not in flags]:
            raise ValueError(f"variant {name} has no {missing[0]} among its flags")
        counts = dict.fromkeys((*needed, "micro-batch-size"), ranges.COUNT)
        for flag, kind in {**counts, "lr": ranges.LEARNING_RATE}.items():
            try:
                if flag in flags:
                    kind(" ".join(flags[flag]))
            except ArgumentTypeError as error:
                raise ValueError(f"variant {name}: {flag} {error}") from error
        if not {"hybrid-layer-pattern", "num-layers"} & flags.keys():
            raise ValueError(
                f"variant {name} has no layers: write `layers: 2`, or hybrid-layer-pattern among its flags"
            )
        pattern = " ".join(flags.get("hybrid-layer-pattern", ()))
        has_experts = FeedForwardLayers.of_pattern(pattern).num_moe_layers > 0 if pattern else "num-experts" in flags
        if has_experts != section.has_experts and not section.program:
            needs = f"a pattern without E, not {pattern}" if pattern else "a model without num-experts"
            raise ValueError(f"variant {name}: a mask needs an E in hybrid-layer-pattern, and `mask: none` {needs}")
        if decided := sorted(_DECIDED_FLAGS & flags.keys()):
            raise ValueError(f"variant {name}: {', '.join(decided)} is decided by the comparison; leave the flag out")
        if "program" in flags:
            raise ValueError(
                f"variant {name}: write `program` as a key of the variant, not among flags or in a model file"
            )
        if self.min_lr_ratio and flags.get("lr"):
            given["min-lr"] = flags["min-lr"] = (f"{float(self.min_lr_ratio) * float(flags['lr'][0]):.6g}",)
        layouts = {
            ranks: {flag: words for flag, words in layout.items() if flag not in given}
            for ranks, layout in model_file.layouts.items()
        }
        program = folder.absolute() / section.program if section.program else None
        if program and not program.is_file():
            raise ValueError(f"variant {name}: the program {program} is not a file")
        mask = section.mask
        if mask != "none":
            is_preset = "preset" in override({}, mask)
            common = {flag: words for flag, words in self.mask.items() if not is_preset or flag in _FLAGS_BESIDE_PRESET}
            mask = override(override(common, mask), {} if is_preset else of_mask)
        update = {
            "title": section.title or name,
            "mask": mask,
            "widen": override({}, section.widen),
            "flags": flags,
            "model": str(model_file.path.resolve()) if section.model or self.model else "",
            "layouts": {**layouts, **section.layouts},
            "program": str(program or ""),
            "program_sha256": sha256(program.read_bytes()).hexdigest() if program else "",
            "seeds": section.seeds or self.seeds,
        }
        return section.model_copy(update=update)


def absolute(paths: object, folder: Path) -> object:
    """Return the paths of a key of `PATHS` as absolute paths. Words that are no paths, such as weights, are kept."""
    if isinstance(paths, dict):
        return {name: absolute(path, folder) for name, path in paths.items()}
    if isinstance(paths, tuple):
        return tuple(absolute(path, folder) for path in paths)
    with suppress(ValueError):
        float(str(paths))
        return paths  # a weight
    return str((folder / str(paths)).absolute()) if paths and paths != REQUIRED else paths


def _read_with_base(path: Path) -> tuple[object, dict[str, Path]]:
    """Read a suite file. The suite that its key `extends` names provides the keys that the file lacks.

    Flags of both are merged.

    Returns:
        The content, and for each key the folder of the file that has the key.

    Raises:
        UserError: A file cannot be read, or the other suite extends a further one.
    """
    content = read_words(path, "suite")
    if not isinstance(content, dict):
        return content, {}
    folders = dict.fromkeys(content, path.parent)
    if "extends" not in content:
        return content, folders
    base_path = path.parent / str(content.pop("extends"))
    base = read_words(base_path, "suite")
    if not isinstance(base, dict) or "extends" in base:
        raise UserError(f"suite {path}: `extends` must name a suite that extends no other")
    for key in _MERGED_KEYS & base.keys() & content.keys():
        if isinstance(content[key], dict) and isinstance(base[key], dict):
            content[key] = {**base[key], **content[key]}
    return {**base, **content}, {**dict.fromkeys(base, base_path.parent), **folders}
