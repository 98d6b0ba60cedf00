"""A stage for tests. The stage appends its name to the file `starts`, then copies its input to its output.

With `--steps N` the stage counts to N in its output and resumes from its output. A child does the counting, as the
workers of torchrun do, and notes in the file `ended-in-order` that it was asked to stop. While the file `hold` exists,
the counting stops half-way.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--folder", type=Path)
parser.add_argument("--input", type=Path)
parser.add_argument("--setting")
parser.add_argument("--steps", type=int, default=0)
parser.add_argument("--fail")
parser.add_argument("--worker", action="store_true")
arguments = parser.parse_args()
output = arguments.folder / f"{arguments.name}.out"

if arguments.steps and not arguments.worker:
    worker = subprocess.Popen([sys.executable, *sys.argv, "--worker"], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda number, frame: worker.terminate())
    sys.exit(worker.wait())

with open(arguments.folder / "starts", "a") as stream:
    print(arguments.name, file=stream)
print("output of", arguments.name, flush=True)
if arguments.fail:
    sys.exit(arguments.fail)
if not arguments.steps:
    output.write_text(arguments.input.read_text() if arguments.input else arguments.name)
    sys.exit()

stops = []
signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
step = int(output.read_text()) if output.exists() else 0
while step < arguments.steps and not stops:
    time.sleep(0.02)
    if not (arguments.folder / "hold").exists() or step < arguments.steps // 2:
        step += 1
        output.write_text(str(step))
if stops:
    (arguments.folder / "ended-in-order").touch()
    sys.exit(1)
