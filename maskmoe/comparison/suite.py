"""Suites: which variants of a model are compared and how they are trained, as a YAML file describes both.

The pydantic models say which keys a file may have. Values are words as they are written in the file. `Suite.read` then
merges the flags of the sections, so that each variant has all its flags.
"""

import itertools
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainValidator,
    PositiveInt,
    ValidationError,
    ValidationInfo,
)

from maskmoe.arguments import ranges
from maskmoe.arguments.flags import override
from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem
from maskmoe.files.yaml_files import read_words
from maskmoe.launch.model_file import Flags, ModelFile, parse_flags, parse_layouts
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers

# A preset decides all other flags of the mask.
_FLAGS_BESIDE_PRESET = {"seed", "shared-table", "expert-model-parallel-size"}
_MERGED_KEYS = {"flags", "expert-flags", "mask"}
_MASK_PREFIX = "mask."

# Names of the steps that make the data, and of texts.
_TAKEN_NAMES = {"count", "dataset", "held-out", "tokenizer", "training"}

PROGRAM = "program"
"""The key of a variant, and of its mask, that names a Python file."""

_DECIDED_FLAGS = {"seed", "save", "load", "routing-mask", "data-path", PROGRAM}


def _to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _check_text_name(name: str) -> str:
    """Return the name of a held-out text. Raises ValueError if another text or a step has the name."""
    if name in _TAKEN_NAMES:
        raise ValueError(f"the name {name} is taken: give the held-out text another name")
    return name


def _parse[T](parse: Callable[[object, str, Mapping[str, str]], T], content: object, info: ValidationInfo) -> T:
    """Parse a section of flags or layouts. The context is the name of the suite and the variables for `${NAME}`."""
    suite, variables = info.context or ("suite", {})
    return parse(content, suite, variables)


def _parse_mask(content: object, info: ValidationInfo) -> Flags | Literal["none"]:
    """Parse the mask of a variant, see `_parse`."""
    return "none" if content == "none" else _parse(parse_flags, content, info)


type Words = Annotated[tuple[str, ...], BeforeValidator(_to_list)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]  # names a folder
TextName = Annotated[Name, AfterValidator(_check_text_name)]
Seeds = Annotated[tuple[PositiveInt, ...], BeforeValidator(_to_list)]
FlagSection = Annotated[Flags, PlainValidator(partial(_parse, parse_flags))]
LayoutSection = Annotated[Mapping[int, Flags], PlainValidator(partial(_parse, parse_layouts))]


class _Section(BaseModel, frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-")):
    """A mapping with known keys."""


class Variant(_Section):
    """A model to be trained.

    Attributes:
        title: Name in the report.
        mask: Flags of `maskmoe mask`; `none` for a model without experts. The key `program` names a Python file that
            makes the mask instead of `maskmoe mask`, from the same flags and its own; its path is relative to the
            folder of the suite file that has the variants.
        model: Model file with the first flags and the layouts, instead of the suite's model file.
        flags: Flags of training, without the seed.
        layouts: Further flags by number of ranks, see `ModelFile`.
        program: Python file that trains and evaluates instead of MaskMoE's entry points, see `ModelFile.read`; the path
            is relative to the folder of the suite file that has the variants.
        program_sha256: SHA-256 of the files of both programs; empty without programs. `Suite.read` sets it, and ignores
            a value in the file.
        seeds: Seeds of the variant's runs; by default those of the suite.
        setting: The values of `vary` that the variant has, such as `lr-2e-2`; empty without `vary`. `Suite.read` sets
            it, and ignores a value in the file.
    """

    title: str = ""
    mask: Annotated[Flags | Literal["none"], PlainValidator(_parse_mask)]
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

    @property
    def mask_flags(self) -> Flags:
        """The flags of the mask; empty for a model without experts."""
        return {} if self.mask == "none" else {flag: words for flag, words in self.mask.items() if flag != PROGRAM}

    @property
    def mask_program(self) -> str:
        """The Python file that makes the mask; empty for `maskmoe mask`."""
        return "" if self.mask == "none" else " ".join(self.mask.get(PROGRAM, ()))


class DataSection(_Section):
    """The text of all runs. Paths of texts are relative to the folder of the suite file that has the section.

    Attributes:
        vocab_size: Number of ids of the tokenizer.
        input: Text files. Without files and without `flags`, the command line must name text files.
        held_out: Further text files that models are evaluated on, by name.
        flags: An existing dataset instead of text: Megatron's `data-path`, `split`, `tokenizer-type` and
            `tokenizer-model`.
    """

    vocab_size: Annotated[str, Field(pattern=r"^[1-9]\d*$")]
    input: Words = ()
    held_out: dict[TextName, str] = {}
    flags: FlagSection = {}


class Suite(_Section):
    """The variants that are compared, and how the variants are trained.

    Attributes:
        title: Title of the report.
        data: The text.
        model: Model file of all variants; the path is relative to the folder of the suite file that has the key.
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
    data: DataSection
    model: str = ""
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
            suite = cls.model_validate(content, context=(f"suite {path}", variables))
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
        if unknown := [name for name in self.baselines if name not in self.variants]:
            raise ValueError(f"baselines: {', '.join(unknown)} is not a variant of the suite")
        variants = {}
        for name, section in self.variants.items():
            model, key = (section.model, "variants") if section.model else (self.model, "model")
            model_file = ModelFile.read(folders[key] / model, variables) if model else ModelFile(path, {}, {})
            # Every combination of the values of `vary`.
            for values in itertools.product(*self.vary.values()):
                setting = dict(zip(self.vary, values, strict=True))
                label = ".".join(f"{flag.removeprefix(_MASK_PREFIX)}-{value}" for flag, value in setting.items())
                varied = parse_flags(setting, f"suite {path}: vary", variables)
                variant = section.model_copy(
                    update={
                        "title": section.title or name,
                        "seeds": section.seeds or self.seeds,
                        "setting": label,
                        "model": str(model_file.path.resolve()) if model else "",
                        "mask": self._mask_of(section, varied, folders["variants"]),
                        "program": _program(section.program, folders["variants"]),
                        **self._flags_of(name, section, varied, model_file),
                    }
                )
                _check_flags(name, variant)
                files = [Path(each) for each in (variant.program, variant.mask_program) if each]
                digest = sha256(b"".join(each.read_bytes() for each in files)).hexdigest() if files else ""
                variants[f"{name}.{label}" if setting else name] = variant.model_copy(update={"program_sha256": digest})
        folder = folders["data"].resolve()
        texts = {"input": tuple(str(folder / text) for text in self.data.input)}
        texts |= {"held_out": {name: str(folder / text) for name, text in self.data.held_out.items()}}
        update = {"title": self.title or path.stem, "variants": variants, "data": self.data.model_copy(update=texts)}
        return self.model_copy(update=update)

    def _flags_of(self, name: str, section: Variant, varied: Flags, model_file: ModelFile) -> dict[str, Any]:
        """Merge the flags of the model file, the suite, the variant and `vary`; later flags replace earlier ones.

        All but those of the model file also replace its layouts, as flags on a command line do. Flags of experts are
        only for variants that have experts.

        Returns:
            The values of `flags` and `layouts`.
        """
        varied = {flag: words for flag, words in varied.items() if not flag.startswith(_MASK_PREFIX)}
        of_experts = self.expert_flags
        if not section.has_experts:
            varied = {flag: words for flag, words in varied.items() if flag not in of_experts}
            of_experts = {}
        given = {**self.flags, **of_experts, **section.flags, **varied}
        flags = override(model_file.flags, given)
        if self.min_lr_ratio and "lr" in flags:
            rate = _number(name, "lr", flags, ranges.LEARNING_RATE)
            given["min-lr"] = (f"{float(self.min_lr_ratio) * rate:.6g}",)
            flags = override(flags, {"min-lr": given["min-lr"]})
        layouts = {
            ranks: {flag: words for flag, words in layout.items() if flag not in given}
            for ranks, layout in model_file.layouts.items()
        }
        return {"flags": flags, "layouts": {**layouts, **section.layouts}}

    def _mask_of(self, section: Variant, varied: Flags, folder: Path) -> Flags | Literal["none"]:
        """Merge the flags of the mask of the suite, the variant and `vary`; a preset decides most of them itself."""
        if section.mask == "none":
            return "none"
        varied = {flag.removeprefix(_MASK_PREFIX): varied[flag] for flag in varied if flag.startswith(_MASK_PREFIX)}
        own, common = override({}, section.mask), self.mask
        if "preset" in own:
            varied, common = {}, {flag: words for flag, words in common.items() if flag in _FLAGS_BESIDE_PRESET}
        mask = override(common, {**section.mask, **varied})
        program = _program(" ".join(own.get(PROGRAM, ())), folder)
        return {**mask, PROGRAM: (program,)} if program else mask


def _program(path: str, folder: Path) -> str:
    """Return the absolute path of a program, empty for none. Raises ValueError if it is no file."""
    program = folder.absolute() / path
    if path and not program.is_file():
        raise ValueError(f"the program {program} is not a file")
    return str(program) if path else ""


def _number(name: str, flag: str, flags: Flags, kind: Callable[[str], float]) -> float:
    """Return the number of a flag. Raises ValueError, naming the variant, if it has none or is out of range."""
    try:
        return kind(" ".join(flags[flag]))
    except ArgumentTypeError as error:
        raise ValueError(f"variant {name}: {flag} {error}") from error


def _check_flags(name: str, variant: Variant) -> None:
    """Raise ValueError if a variant lacks flags that the comparison reads, or has flags that it decides."""
    flags = variant.flags
    pattern = " ".join(flags.get("hybrid-layer-pattern", ()))
    needed = ["train-iters", "seq-length", "global-batch-size"]
    needed += (["num-experts"] if variant.has_experts else []) + ([] if pattern else ["num-layers"])
    for flag in needed:
        if flag not in flags:
            raise ValueError(f"variant {name} has no {flag} among its flags")
        _number(name, flag, flags, ranges.COUNT)
    if decided := sorted(_DECIDED_FLAGS & flags.keys()):
        raise ValueError(f"variant {name}: {', '.join(decided)} is decided by the comparison; leave the flag out")
    has_experts = FeedForwardLayers.of_pattern(pattern).num_moe_layers > 0 if pattern else "num-experts" in flags
    if has_experts != variant.has_experts and not variant.program:
        raise ValueError(f"variant {name}: a model has a mask if it has experts, and `mask: none` if it has none")


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
