"""The command line: ``clipup COMMAND ...``, one small module a command, imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping

from clipup_kernels import __version__

COMMANDS = {
    "demo": "dense CLIP to CLIP-UP on real pictures, in minutes, with a report",
    "data": "build a data set as WebDataset shards",
    "upcycle": "make a dense model sparse, and check that it computes the same",
    "train": "train a dense or sparse model",
    "eval": "retrieval and zero-shot classification",
    "clip-benchmark": "CLIP_benchmark's command line, for models of clipup",
    "inspect": "what the experts of a sparse model do, as one HTML page",
    "flops": "FLOPs and parameters of a model, dense and sparse",
    "doctor": "the blocks of a model, and what upcycle would do with each",
}
DEBUG = "CLIPUP_DEBUG"
"""Environment variable; 1 shows the traceback of an error that is otherwise one line."""

_USER_ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
_BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for what the user can correct, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{usage('clipup', COMMANDS)}\nclipup --version prints the version.", flush=True)
        return 0 if argv else _BAD_INPUT
    if argv[0] == "--version":
        print(f"clipup {__version__}")
        return 0
    command, *options = argv
    if command not in COMMANDS:
        print(f"clipup: {_unknown('command', command, COMMANDS)}", file=sys.stderr)
        return _BAD_INPUT
    module = command.replace("-", "_")
    return reporting_errors(f"clipup {command}", lambda: importlib.import_module(f"{__name__}.{module}").main(options))


def reporting_errors(program: str, function: Callable[[], int]) -> int:
    """The function's exit code; what the user can correct becomes one line, and Ctrl-C no traceback.

    Args:
        program: what the line begins with.
    """
    try:
        code = function()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the program that read the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except _USER_ERRORS as error:
        return _report(program, str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _report(program, f"out of memory: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _report(program: str, message: str) -> int:
    """Prints the error that is being handled, in one line or with its traceback."""
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    else:
        print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return _BAD_INPUT


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on the CPU, of which torch says so in a RuntimeError, or on a GPU."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def run_one_of(commands: Mapping[str, type], program: str, kind: str, argv: list[str]) -> int:
    """Runs one of a command's own commands, dataclasses whose ``run`` returns the exit code.

    Args:
        program: what stands in front of them, "clipup data". kind: what they are called, "data set".

    Raises:
        ValueError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(program, {name: one.__doc__.strip().splitlines()[0] for name, one in commands.items()}, kind))
        return 0 if argv else _BAD_INPUT
    if argv[0] not in commands:
        raise ValueError(_unknown(kind, argv[0], commands))
    from .flags import parse

    return parse(commands[argv[0]], argv[1:], f"{program} {argv[0]}").run()


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? {kind.capitalize()}s" if close else f"{kind}s"
    return f"there is no {kind} {name!r}; {hint} are {', '.join(known)}"


def usage(program: str, commands: Mapping[str, str], kind: str = "command") -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in commands.items())
    word = kind.upper().replace(" ", "")
    return f"usage: {program} {word} [OPTIONS]\n\n{lines}\n\n{program} {word} --help explains a {kind}'s options."
