"""What goes wrong is told in one line, and a script ends with exit code 1."""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def is_first_process() -> bool:
    """False in the second and later processes that torchrun starts."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


class UserError(ValueError):
    """Bad input or surroundings: shown as one line, without a traceback."""


class WriteError(UserError):
    """A file that cannot be written. Where several processes run it may befall one alone, which then speaks."""


def run_main(main: Callable[[], None]) -> None:
    """Runs a script's main; a UserError becomes one line and exit code 1.

    Where torchrun started several processes, the first speaks for all.
    """
    if not is_first_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    try:
        main()
    except UserError as error:
        speaks = is_first_process() or isinstance(error, WriteError)
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}" if speaks else 1)
    except OSError as error:  # a folder that vanished: may be of one process, and needs no traceback
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        if not is_first_process():
            sys.exit(1)
        sys.exit("interrupted; training and sampling continue where they stopped when the command is given again")


def moved(command: str) -> None:
    """Ends a process that was started as `python -m common.<command>`, as the tools once were."""
    sys.exit(f"python -m common.{command.replace('-', '_')} is now: python -m common {command}")
