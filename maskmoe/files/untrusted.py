"""Reads files that a stranger may have written: bounded in size and depth, and never from a device or a pipe."""

import base64
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from maskmoe.errors import UserError, reason_of

MAX_JSON_BYTES = 64 << 20
"""Upper bound of a JSON file and of a tokenizer. The largest known files, also indices of weights, have 35 MB."""

MAX_YAML_BYTES = 256 << 10
"""Upper bound of a YAML file. Parsing takes about 10 s for each MiB."""

MAX_GROWTH = 128
"""Upper bound of the characters that a tokenizer makes of one character; tokenizers in use have up to about 10."""

_GROWS = f"makes texts more than {MAX_GROWTH} times longer; use another tokenizer"
_MAX_TOKENIZER_VALUES = 10_000  # of all parts of a tokenizer but its vocabulary
_MAX_YAML_VALUES = 50_000  # with aliases counted as often as they occur
_HUB_BLOBS, _HUB_SNAPSHOTS = "blobs", "snapshots"


class UnusableFile(UserError):  # noqa: N818 (a finding about a file)
    """A file that cannot be used, with a reason that follows its path, such as "is not a regular file"."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.reason = reason


def open_regular(path: str | os.PathLike[str], takes_pipe: bool = False) -> BufferedReader:
    """Open a regular file for reading, without waiting for the writer of a pipe.

    Args:
        path: The file.
        takes_pipe: Whether the user named the file, which may be a pipe then.

    Raises:
        UnusableFile: The path is missing or cannot be read, or is a folder, a device, a pipe or a socket.
    """
    path = Path(path)
    try:
        _check_mode(path, os.stat(path).st_mode, takes_pipe)  # opening a device can change its state
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if takes_pipe else os.O_NONBLOCK))
    except FileNotFoundError as error:
        raise UnusableFile(path, "does not exist") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnusableFile(path, f"cannot be read: {reason}") from error
    try:
        _check_mode(path, os.fstat(descriptor).st_mode, takes_pipe)
    except UnusableFile:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def _check_mode(path: Path, mode: int, takes_pipe: bool) -> None:
    if not stat.S_ISREG(mode) and not (takes_pipe and stat.S_ISFIFO(mode)):
        raise UnusableFile(path, "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file")


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that a file that a library will open by its name is a regular file. Raises UnusableFile."""
    open_regular(path).close()


def read_bounded(path: str | os.PathLike[str], max_bytes: int, takes_pipe: bool = False) -> bytes:
    """Read a file, see `open_regular`. Raises UnusableFile if it cannot be read, or has more than `max_bytes` bytes."""
    path = Path(path)
    with open_regular(path, takes_pipe) as stream:
        try:
            content = stream.read(max_bytes + 1)
        except OSError as error:
            raise UnusableFile(path, f"cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise UnusableFile(path, f"has more than the {max_bytes:,} bytes that such a file may have")
    return content


def read_json_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a JSON file and return its bytes, which every JSON parser can then handle.

    Raises:
        UnusableFile: The file cannot be read, is not JSON, is nested too deeply, or holds a number of thousands of
            digits.
    """
    content = read_bounded(path, MAX_JSON_BYTES)
    _parse_json(Path(path), content)
    return content


def _parse_json(path: Path, content: bytes) -> Any:
    try:
        value = from_json(content)  # reading limits the depth, printing the digits of a number
        repr(value)
    except ValueError as error:
        raise UnusableFile(path, f"is damaged (Invalid JSON: {' '.join(str(error).split())})") from error
    return value


def resolve_inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file that a file of the same folder names.

    A name must not be absolute or contain `..`. The file may be a link to another file of the folder, or to the `blobs`
    of a cache of the Hugging Face Hub if the folder is a snapshot of that cache or lies in one. The folder itself,
    which the user named, may be a link to anywhere.

    Raises:
        UnusableFile: The name leads outside the folder, or does not name a regular file.
    """
    check_name(folder, name)
    path = folder / name
    open_regular(path).close()
    found, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    snapshots = (place for place in root.parents if place.name == _HUB_SNAPSHOTS)
    allowed = [root, *(place.parent / _HUB_BLOBS for place in snapshots)]
    if not any(found.is_relative_to(place) for place in allowed):
        raise UnusableFile(path, "is a link to a file outside its folder; copy the file into the folder")
    return path


def check_model_folder(folder: Path) -> None:
    """Check the files of a model or a tokenizer that a library will open by their names.

    Raises:
        UnusableFile: A file is no regular file, or the tokenizer may make texts much longer.
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if path.is_dir():
            continue
        check_regular(path)
        if path.suffix in (".model", ".spm"):
            check_sentencepiece(path, read_bounded(path, MAX_JSON_BYTES))
    if os.path.lexists(folder / "tokenizer.json"):
        check_tokenizer(folder / "tokenizer.json")


def check_tokenizer(path: Path) -> None:
    """Check that the tokenizer in a `tokenizer.json` makes texts at most `MAX_GROWTH` times longer.

    Replacements multiply each other, and may insert text between all characters. The template for pairs of texts is not
    checked, because MaskMoE encodes single texts.

    Raises:
        UnusableFile: The file cannot be read, is not JSON, or its tokenizer may make texts longer.
    """
    content = _parse_json(path, read_bounded(path, MAX_JSON_BYTES))
    names = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    if not isinstance(content, dict):
        raise UnusableFile(path, "is not a tokenizer.json")
    parts: list[Any] = [[content.get(name) for name in names]]
    growth, found, pieces, ids = 1.0, 0, 0, 1
    while parts:
        part, found = parts.pop(), found + 1
        if isinstance(part, dict):
            if isinstance(template := part.get("single"), list):
                growth *= max(1, sum("Sequence" in piece for piece in template if isinstance(piece, dict)))
                pieces += len(template)
            if isinstance(of_special_token := part.get("ids"), list):
                ids = max(ids, len(of_special_token))
            if isinstance(charsmap := part.get("precompiled_charsmap"), str):
                with suppress(ValueError):  # tokenizers refuses wrong Base64
                    growth *= _longest_replacement(base64.b64decode(charsmap))
            if part.get("type") in ("ByteLevel", "BertNormalizer", "BPEDecoder", "CTC"):
                growth *= 2
            pattern = part.get("pattern")
            replaced = pattern.get("String") if isinstance(pattern, dict) else None
            length = len(replaced) if isinstance(replaced, str) else 0
            for text in (part.get("content"), part.get("prepend")):
                if isinstance(text, str):
                    growth *= max(1, len(text) / length if length else len(text) + 1)
            parts.extend(part.values())
        elif isinstance(part, list):
            if any(isinstance(inner, list) for inner in part):  # tokenizers takes a list for an object's values
                raise UnusableFile(path, "has a list where an object belongs; save the tokenizer again")
            parts.extend(part)
        if max(growth, pieces * ids) > MAX_GROWTH or found > _MAX_TOKENIZER_VALUES:
            raise UnusableFile(path, _GROWS)


def check_sentencepiece(path: Path, content: bytes) -> None:
    """Check that a SentencePiece model makes texts at most `MAX_GROWTH` times longer. Raises UnusableFile.

    Files of other kinds pass: tiktoken's may be named tokenizer.model, too.
    """
    from google.protobuf.message import DecodeError  # most commands read no tokenizer

    with suppress(DecodeError):
        normalizers = [*_fields(content, 3), *_fields(content, 5)]  # of encoding and of decoding
        charsmaps = [charsmap for normalizer in normalizers for charsmap in _fields(normalizer, 2)]
        if any(_longest_replacement(charsmap) > MAX_GROWTH for charsmap in charsmaps):
            raise UnusableFile(path, _GROWS)


def _fields(message: bytes, number: int) -> list[bytes]:
    """Return the fields of a protobuf message that have a number and hold bytes or a message."""
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.unknown_fields import UnknownFieldSet

    fields = UnknownFieldSet(Empty.FromString(message))
    return [field.data for field in fields if field.field_number == number and isinstance(field.data, bytes)]


def _longest_replacement(charsmap: bytes) -> int:
    """Return the length of the longest text that SentencePiece's map of characters makes of one character.

    The map is the size of a trie in 4 bytes, the trie, and the texts, each ended by a null character.
    """
    texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :]
    return max((len(text[0].decode(errors="replace")) for text in re.finditer(rb"[^\0]+", texts)), default=1)


def check_name(folder: Path, name: str) -> None:
    """Check that a name, which need not exist yet, stays inside a folder, see `resolve_inside`. Raises UnusableFile."""
    parts = name.split("/")
    if not name.isprintable() or any(part in ("", "..") for part in parts):
        raise UnusableFile(folder, f"names the file {name[:200]!r}, which does not lie inside the folder")


class _WordLoader(yaml.BaseLoader):
    """Loads all scalars as text, without octal numbers or `on` that becomes true, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
            if key_node.value in keys:
                problem = f"the key {key_node.value} is repeated"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_words(path: Path, kind: str) -> object:
    """Read a YAML file, with all scalars as text; errors call the file a `kind`, such as "model file".

    Raises:
        UserError: The file cannot be read, is not YAML, or is nested too deeply or too long with its aliases written
            out.
    """
    try:
        text = read_bounded(path, MAX_YAML_BYTES).decode()
        content = yaml.load(text, Loader=_WordLoader)
        _check_values(content)
    except UnusableFile as error:
        raise UserError(f"the {kind} {path} {error.reason}") from error
    except RecursionError as error:
        raise UserError(f"{kind} {path} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        hint = "; write quotes around a value that begins with *" if "alias" in reason else ""
        raise UserError(f"{kind} {path} is not valid YAML: {reason}{hint}") from error
    return content


def _check_values(content: object) -> None:
    """Check the values of a YAML file.

    Raises:
        ValueError: There are too many, for example by aliases of aliases, or one has a null character or half of a
            surrogate pair, which no word of a command line may have.
    """
    remaining, found = [content], 0
    while remaining:
        value = remaining.pop()
        found += 1
        if found > _MAX_YAML_VALUES:
            raise ValueError(f"it has more than {_MAX_YAML_VALUES:,} values once its anchors are written out")
        if isinstance(value, str) and ("\0" in value or has_surrogates(value)):
            raise ValueError(f"{value!a} has a null character or half of a surrogate pair")
        if isinstance(value, list | dict):
            remaining.extend([*value, *value.values()] if isinstance(value, dict) else value)


@contextmanager
def reading(what: str, advice: str = "replace it by an intact copy") -> Iterator[None]:
    """Turn every failure of the block into a `UserError` that names `what` was read and gives advice.

    A library in Rust may even panic, which Python sees as a BaseException.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = reason_of(error).removesuffix(f"; {advice}")
        raise UserError(f"{what} cannot be read; {advice}: {reason[:300]}") from error


_HALF_OF_PAIR = re.compile("[\ud800-\udfff]")


def has_surrogates(text: str) -> bool:
    """Return whether a text has half of a surrogate pair, which UTF-8 cannot encode."""
    return _HALF_OF_PAIR.search(text) is not None


def refuse_surrogates(text: str, what: str) -> None:
    """Check that UTF-8 can encode a text. Raises a UserError that names the source `what` of the text otherwise."""
    if found := _HALF_OF_PAIR.search(text):
        raise UserError(
            f"{what} has an invalid byte or half of a surrogate pair ({found[0]!a}), which is not text: correct it"
        )


def printable_name(path: str | os.PathLike[str]) -> str:
    r"""Return the last part of a path, with bytes that are not valid UTF-8 written as `\xff`, for records."""
    return os.fsencode(os.path.basename(path)).decode("utf-8", "backslashreplace")
