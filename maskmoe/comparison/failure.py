"""Finds the line in the output of a failed command that states the reason."""

import re
from collections.abc import Sequence

from maskmoe.errors import RunFailure, UserError

_RANK = r"(?:\[rank\d+\]:? ?)?"
_REFUSAL = re.compile(rf"^{_RANK}(?:(?:\S+\.py|maskmoe)(?: [\w-]+)?: )?error: (?P<message>.+)")
_EXCEPTION = re.compile(rf"^{_RANK}(?P<message>(?:\w+\.)*\w*(?:Error|Exception|Killed)\b: .+)")
# The other ranks and torchrun report these errors when one rank has failed.
_CONSEQUENCE = re.compile(r"ChildFailedError|SignalException|Dist\w+Error|Connection \w+ by peer|Broken pipe")


def explain_failure(exit_code: int, lines: Sequence[str]) -> UserError | RunFailure:
    """Return the reason of a failure on one line: a UserError if the user's input is at fault, else a RunFailure.

    Args:
        exit_code: exit code of the command; negative for a signal.
        lines: lines of the command's output.
    """
    # A line `error: …` is a refusal of the input; such a line explains itself.
    if refusals := [match["message"] for match in map(_REFUSAL.match, lines) if match]:
        return UserError(refusals[0])
    # Else the last exception counts that is not merely the consequence of another rank's failure.
    exceptions = [match["message"] for match in map(_EXCEPTION.match, lines) if match]
    if reasons := [message for message in exceptions if not _CONSEQUENCE.search(message)]:
        return RunFailure(reasons[-1])
    if exit_code == -9 or any("SIGKILL" in line or "exitcode  : -9" in line for line in lines):
        return RunFailure("a process was killed, as the system does when memory runs out")
    written = [line.strip() for line in lines if line.strip()]
    return RunFailure(written[-1] if written else f"exit code {exit_code}, and no output")
