"""What goes wrong is told in one line, and a script ends with exit code 1."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

GRACE_SECONDS = 2.0  # torchrun ends the other processes within a fraction of a second of the first one's end


class UserError(ValueError):
    """Bad input or surroundings: shown as one line, without a traceback."""


class WriteError(UserError):
    """A file that cannot be written."""


def is_first_process() -> bool:
    """False in the second and later processes that torchrun starts."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def run_main(main: Callable[[], None]) -> None:
    """Runs a script's main; a UserError or OSError becomes one line and exit code 1, after its traceback where --debug
    is given.

    Where torchrun started several processes, the first speaks for all; another waits, and speaks if it is still there.
    """
    if not is_first_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    try:
        main()
    except (UserError, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        if not is_first_process():
            time.sleep(GRACE_SECONDS)  # an error of all ends the first process, and then this one; it may be of one
        sys.exit(f"{Path(sys.argv[0]).name}: error: {describe(error)}")
    except KeyboardInterrupt:
        if not is_first_process():
            sys.exit(1)
        sys.exit("interrupted; training and sampling continue where they stopped when the command is given again")


def describe(error: Exception) -> str:
    """The error in one line; of the system's errors the file, the reason, and what may help."""
    if isinstance(error, UserError):
        return str(error)
    return f"{one_line(error)}; nothing was lost: mend that or name another file, then give the command again"


def one_line(error: Exception) -> str:
    """What an error of the system or of another package says, in a line: its file, if any, and the reason."""
    reason = getattr(error, "reason", error)  # of a URLError: often an OSError
    said = getattr(reason, "strerror", None) or str(reason).strip() or type(reason).__name__
    file = getattr(reason, "filename", None)
    said = re.sub(r"<urlopen error (.*)>", r"\1", said.splitlines()[-1])  # as torchvision quotes what urllib raised
    return (f"{file}: " if file else "") + re.sub(r"\[Errno -?\d+\] ", "", said)


def moved(command: str) -> None:
    """Ends a process that was started as `python -m common.<command>`, as the tools once were."""
    sys.exit(f"python -m common.{command.replace('-', '_')}: error: type instead: python -m common {command}")
