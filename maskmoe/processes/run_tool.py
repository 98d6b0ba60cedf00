"""Runs the main function of a command-line tool and reports its errors."""

import errno
import os
import re
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from maskmoe.errors import RunFailure, UserError, one_line
from maskmoe.files.untrusted import has_surrogates

EXIT_RUN_FAILURE = 1
EXIT_BAD_INPUT = 2
_EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

# Errors of writing that another disk or limit cures.
_NO_SPACE = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "no space is left in the quota of the disk",
    errno.EFBIG: "the limit of file sizes (ulimit -f) is reached",
}
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
_NUMBER_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_NO_MEMORY = re.compile("failed to map segment|can't start new thread|can't allocate memory|[Cc]annot allocate memory")

# Seconds that all other ranks of a node wait before they report an error, so that only the first rank reports it.
_REPORT_DELAY = 10


def run_tool(main: Callable[[], None]) -> None:
    """Run `main`, and report its `UserError` or `RunFailure` in one line on stderr.

    Refusals of the operating system are reported in one line, too, see `_describing_refusals`. All other exceptions are
    errors of the program, and keep their traceback. The process exits with code 2 for bad input, as argparse does for
    bad flags, with 1 for a failed run, with 130 after Ctrl-C, and silently with 141 if nobody reads its output.
    """
    _print_every_character()
    _allow_open_files()
    try:
        with _describing_refusals():
            _check_working_folder()
            main()
            if sys.stdout is not None:  # it is None if the parent process has closed it
                sys.stdout.flush()
    except (UserError, RunFailure) as error:
        sys.unraisablehook = lambda _: None  # files of a failed command fail again when they are closed
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler may save, but no state is left to save
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The first rank of the node usually fails with the same error. Torchrun then ends this rank while it waits.
            time.sleep(_REPORT_DELAY)
        with suppress(OSError):
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
        code = EXIT_RUN_FAILURE if isinstance(error, RunFailure) else EXIT_BAD_INPUT
    except SystemExit as exit_request:
        code = exit_request.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        code = _EXIT_BROKEN_PIPE
    else:
        return
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            # The interpreter would try again when it exits, and replace the exit code.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _print_every_character() -> None:
    """Let the output replace characters that it cannot encode, such as bytes of a file's name that are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        # A closed stream is None. A rank's console replaces stdout by an object that has the stream's methods.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def _allow_open_files() -> None:
    """Allow this process as many open files as the system permits: Megatron keeps files of every dataset open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _describing_refusals() -> Iterator[None]:
    """Turn what the operating system refuses, and a lack of transformers, into an error of one line.

    Raises:
        UserError: A path of the command line cannot be used, or transformers is not installed.
        RunFailure: A disk is full, too many files are open, or there is not enough memory.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        # Python writes a byte that is no UTF-8 as a surrogate; text files and JSON cannot hold it.
        word = next(filter(has_surrogates, sys.argv[1:]), None)
        if word is None:
            raise
        raise UserError(f"{word!a} on the command line is not valid UTF-8: rename the file") from error
    except (UserError, RunFailure, BrokenPipeError):
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
            raise UserError("transformers is not installed: run pip install '.[hf]' in the repository") from error
        number, filename = _refusal_of_system(error)
        if number in _NO_SPACE:
            place = f" for {os.fsdecode(filename)}" if isinstance(filename, str | bytes) else ""
            raise RunFailure(f"{_NO_SPACE[number]}{place}") from error
        if number in _TOO_MANY_FILES:
            limit = "raise the limit (ulimit -Hn, or fs.file-max of the host)"
            raise RunFailure(f"{os.strerror(number)}; {limit}") from error
        if "LOCAL_RANK" in os.environ:
            raise  # the run may have begun: the place of the error helps, and the rank is restarted
        if isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(str(error)):
            raise RunFailure("there is not enough memory: raise the limit (ulimit -v), or use a larger host") from error
        path = _path_of_command_line(error, sys.argv[1:]) if isinstance(error, OSError) else None
        if path is None:
            raise
        raise UserError(f"cannot use {path}: {os.strerror(number or 0)}") from error


def _refusal_of_system(error: BaseException | None) -> tuple[int | None, object]:
    """Return the number of the operating system's error behind an exception, and the file; None without any."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno, error.filename
        # Libraries in Rust raise classes of their own.
        if number := _NUMBER_IN_TEXT.search(str(error)):
            return int(number[1]), None
        error = error.__cause__ or error.__context__
    return None, None


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the working folder was removed: change into a folder that exists") from error


def _path_of_command_line(error: OSError, words: Sequence[str]) -> str | None:
    """Return the path that an error is about; None unless a word of the command line is this path or its beginning."""
    if not isinstance(error.filename, str | bytes):
        return None
    path = os.fsdecode(error.filename)
    values = (word.partition("=")[2] if word.startswith("--") else word for word in words)
    if any(os.path.abspath(path).startswith(os.path.abspath(value)) for value in values if value):
        return path
    return None


def _is_output_closed() -> bool:
    """Return whether the reader of this process's output has closed it, as `head` does."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
