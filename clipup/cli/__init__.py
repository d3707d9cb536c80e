"""The command line, ``clipup COMMAND ...``: one module per command, imported when the command is run."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from .logs import in_one_line

COMMANDS = {
    "demo": "upcycle a small CLIP, train it on and compare, in minutes, with a report",
    "data": "build a data set as WebDataset shards",
    "upcycle": "make a dense model sparse, and check that its outputs are unchanged",
    "train": "train a dense or sparse model",
    "convert": "make a model directory of a training checkpoint",
    "export": "programs of a model's encoders, by torch.export or AOTInductor",
    "plan": "memory, traffic, time and price of a training run, before it is started",
    "eval": "retrieval and zero-shot classification",
    "index": "features of a directory of images, to search it",
    "search": "the images of an index that fit a text best",
    "inspect": "report on the experts of a sparse model, as one HTML page",
    "flops": "count FLOPs and parameters of a model, dense and sparse",
    "doctor": "list the blocks of a model and what upcycle would do with each",
}
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""Environment variables of OpenMP runtimes: how waiting threads wait. The first is how often they look for work."""
_SPINS = "20000"
"""Set before torch is loaded, unless the environment says how its threads wait: they sleep after a short spin. A thread
that has lost its core to another program makes all others wait, and those that spin keep it from one."""
DEBUG = "CLIPUP_DEBUG"
"""Environment variable: 1 shows full tracebacks instead of one-line errors."""

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
_BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for user errors, 130 after Ctrl-C, 141 for a closed pipe."""
    argv = sys.argv[1:] if argv is None else argv
    is_command = bool(argv) and argv[0] in COMMANDS
    return reporting_errors(f"clipup {argv[0]}" if is_command else "clipup", lambda: _run(argv))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{usage('clipup', COMMANDS)}\nclipup --version prints the version.")
        return 0 if argv else _BAD_INPUT
    command, *options = argv
    if command == "--version":
        from clipup_kernels import __version__  # imports torch

        print(f"clipup {__version__}")
        return 0
    if command not in COMMANDS:
        raise ValueError(_unknown("command", command, COMMANDS))
    if not any(name in os.environ for name in WAITING):
        os.environ[WAITING[0]] = _SPINS
    code: int = importlib.import_module(f"{__name__}.{command.replace('-', '_')}").main(options)
    return code


def reporting_errors(program: str, function: Callable[[], int]) -> int:
    """Runs a function and returns its exit code. User errors are printed as one line; Ctrl-C prints no traceback.

    Args:
        program: prefix of the line.
    """
    try:
        return _flushed(program, _exit_code(program, function))
    except SystemExit as stop:  # argparse's, after its help or its error
        stop.code = _flushed(program, stop.code)
        raise


def _exit_code(program: str, function: Callable[[], int]) -> int:
    try:
        return function()
    except BrokenPipeError:  # the reader of the output has exited
        return _BROKEN_PIPE
    except _USER_ERRORS as error:
        return _report(program, str(error))
    except (MemoryError, RuntimeError) as error:  # on a CPU torch raises a plain RuntimeError
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        return _report(program, f"out of memory: {error}")
    except KeyboardInterrupt:
        say(f"{program}: interrupted")
        return _INTERRUPTED


def _flushed(program: str, code: Any) -> Any:
    """The exit code of a program that has printed everything: not 0 if stdout could not take it."""
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        if not isinstance(error, BrokenPipeError):
            return code or _report(program, f"could not write to stdout: {error}")
        return code or _BROKEN_PIPE
    return code


def _report(program: str, message: str) -> int:
    """Prints the current exception, as one line or with its traceback."""
    say(traceback.format_exc() if os.environ.get(DEBUG) == "1" else f"{program}: {in_one_line(message)}")
    return _BAD_INPUT


def say(text: str) -> None:
    """Prints to stderr. If stderr cannot be written to, the exit code alone reports what happened."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def run_subcommand(commands: Mapping[str, type], program: str, kind: str, argv: list[str]) -> int:
    """Runs a subcommand: a dataclass of options whose ``run`` returns the exit code.

    Args:
        program: the command before it, such as "clipup data".
        kind: what the subcommands are, such as "data set".

    Raises:
        ValueError: no such subcommand.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(
            usage(program, {name: options.__doc__.strip().splitlines()[0] for name, options in commands.items()}, kind)
        )
        return 0 if argv else _BAD_INPUT
    if argv[0] not in commands:
        raise ValueError(_unknown(kind, argv[0], commands))
    from .flags import parse

    return parse(commands[argv[0]], argv[1:], f"{program} {argv[0]}").run()


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? {kind.capitalize()}s" if close else f"{kind}s"
    return f"there is no {kind} {name!r}; {hint} are {', '.join(names)}"


def usage(program: str, commands: Mapping[str, str], kind: str = "command") -> str:
    width = max(map(len, commands))
    columns, indent = shutil.get_terminal_size().columns, " " * (width + 4)
    lines = "\n".join(
        textwrap.fill(f"  {name:<{width}}  {text}", columns, subsequent_indent=indent)
        for name, text in commands.items()
    )
    word = kind.upper().replace(" ", "")
    return f"usage: {program} {word} [OPTIONS]\n\n{lines}\n\n{program} {word} --help explains a {kind}'s options."
