"""The launcher every entry point shares: flags, quiet libraries, one-line errors.

Flags live here and nowhere else; a program's work is a function that tests can call.
"""

import errno
import itertools
import logging as standard_logging
import math
import os
import pathlib
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from expandr_jax.errors import UserError
from expandr_jax.runtime import processes
from expandr_jax.runtime.formats import RENAMED
from expandr_jax.runtime.progress import plain_console
from expandr_jax.runtime.stopping import Stopped, end_on_sigterm, ignore_sigterm, notice_again

EXIT_DOES_NOT_FIT = 1  # What a plan or a rehearsal says.
EXIT_USER_ERROR = 2
EXIT_TERMINATED = 143  # By SIGTERM, as shells have it, where there is nothing to go on from.
CPU_DEVICES = 2
FULL = (errno.ENOSPC, errno.EDQUOT)  # No space left on the disk, or of one's share of it.
# What decides, in every program of JAX, which numbers are drawn and of which types results are.
JAX_DEFAULTS = {
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
}
# What ml_collections says.
_IN_CONFIG = "Error whilst parsing config file:"
_NO_SETTING = re.compile(r"(?:'(\w+)'|Attribute <.*>\.(\w+) does not exist)")
_NO_SWITCH = re.compile(r"\('Non-boolean argument to boolean flag', '.*'\)$")
_NEAREST = re.compile(r'Did you mean "(\w+)"')
EXAMPLES = {"config": "--config=configs/quickstart.py", "workdir": "--workdir=runs/quickstart"}


def launch_training(train: Callable[[Any, str, Console], Any]) -> None:
    """Launches a program that trains, by several processes too, and goes on where it stopped.

    Args:
        train: Takes the config, the workdir and the console, on which process 0 alone shows.
    """

    def define() -> None:
        define_config()
        define_workdir()
        define_processes()

    def main(_: Any) -> None:
        quiet = not processes.current().is_main
        console = plain_console(soft_wrap=True, quiet=quiet)
        train(flags.FLAGS.config, flags.FLAGS.workdir, console)

    launch(main, define, resumes=True)


def quiet_libraries() -> None:
    """Keeps libraries from printing over the progress display or reaching for the network."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # One that another process is just writing; the program is compiled once more.
    warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
    # What goes wrong in the threads and tasks that write a checkpoint is raised where it is waited
    # for, and said there in one line. These would print each of their tracebacks as well.
    logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    printed = sys.unraisablehook

    def hook(ignored: Any) -> None:
        if notice_again(ignored.exc_value):
            return
        if str(ignored.exc_value) != "Event loop is closed":  # Tensorstore tells a loop that ended.
            printed(ignored)

    sys.unraisablehook = hook


def split_processor(count: int = 1) -> None:
    """Has JAX take the processor for two devices, unless XLA_FLAGS says for how many.

    Each then does the whole of its half of a batch on a core of its own, where otherwise all cores
    would wait for each other after every operation. It is two on any machine, so that results do
    not depend on its cores. Must be called before JAX is used.

    Args:
        count: Processes of the run, which share the two; each has one at least.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(1, CPU_DEVICES // count))


def define_config(default: str | None = None) -> None:
    """Defines --config=FILE[:ARGUMENT] and its overrides, --config.a.b=value."""
    config_flags.DEFINE_config_file(
        "config", default, "A file of configs/, e.g. configs/quickstart.py.", lock_config=True
    )


def config_of(file: str, overrides: Mapping[str, Any]) -> Any:
    """The config of FILE[:ARGUMENT] as --config reads it, with other values of some settings.

    Raises:
        UserError: The file, or its argument, gives no config, or it has no such setting.
    """
    arguments = ["", f"--config={file}", *config_arguments(overrides)]
    read = flags.FlagValues()
    try:
        _check_config_exists(arguments)
        config_flags.DEFINE_config_file(
            "config", None, lock_config=True, flag_values=read, sys_argv=arguments
        )
        read(arguments)
        _ = read.config.seed
        unpin(read["config"])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = _one_line(error)
        raise UserError(_unknown_setting(text, arguments) or text) from None
    return read.config


def config_arguments(overrides: Mapping[str, Any]) -> list[str]:
    """The arguments that give settings these values: --config.a.b=value."""
    return [f"--config.{name}={value}" for name, value in overrides.items()]


def define_workdir() -> None:
    """Defines --workdir=DIR."""
    flags.DEFINE_string(
        "workdir", None, "Where everything the run writes goes; gs://BUCKET/DIRECTORY: in a bucket."
    )


def define_processes() -> None:
    """Defines the arguments of `processes.start`."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where a run has several; not on TPU pods."
    )
    flags.DEFINE_integer("processes", None, "How many processes the run has.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def launch(
    main: Callable[[Sequence[str]], None],
    define: Callable[[], None],
    *,
    resumes: bool = False,
    words: bool = False,
) -> None:
    """Parses flags, calls `main` with what is left of argv, and turns user errors into exit 2.

    Args:
        main: The program; reads `flags.FLAGS`.
        define: Defines the program's flags.
        resumes: Whether the same command goes on where one that was stopped has ended.
        words: Whether the program takes arguments that are no options.
    """
    for stream in (sys.stdout, sys.stderr):
        # Hours of work must not end at a character that a terminal lacks.
        if hasattr(stream, "reconfigure"):  # A closed one is None.
            stream.reconfigure(errors="backslashreplace")
    quiet_libraries()
    console = plain_console(stderr=True)
    others = set(flags.FLAGS)  # Those of libraries.
    try:
        define()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # A section's settings are looked up when they are defined; a misspelt one is not there.
        text = _one_line(error)
        _stop(console, _unknown_setting(text, sys.argv[1:]) or text)
    if not {"--help", "-help", "-h"}.isdisjoint(sys.argv[1:]):
        _help(set(flags.FLAGS) - others)
    try:
        _check_text(sys.argv[1:])
        _check_config_exists(sys.argv[1:])
        arguments = flags.FLAGS(sys.argv)
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            getattr(flags.FLAGS.config, "seed", None)  # Where it is broken, this says so.
            unpin(flags.FLAGS["config"])
        if str(getattr(flags.FLAGS, "workdir", "")).startswith("~"):  # Shells leave --workdir=~/x.
            flags.FLAGS.workdir = os.path.expanduser(flags.FLAGS.workdir)
        for name in set(flags.FLAGS) - others:  # Bounds let nan pass.
            value = flags.FLAGS[name].value
            if isinstance(value, float) and not math.isfinite(value) and "." not in name:
                raise UserError(f"--{name}={value}: expected a number")
        for name in ("config", "workdir"):
            if name in flags.FLAGS and flags.FLAGS[name].value in (None, ""):
                raise UserError(_missing(name))
        if len(arguments) > 1 and not words:  # A setting without its dashes would be forgotten.
            raise UserError(f"{arguments[1]!r} is no option; expected --NAME=VALUE")
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = _one_line(error)
        _stop(console, _unknown_setting(text, sys.argv[1:]) or text)
    except UserError as error:
        _stop(console, str(error))
    except SyntaxError as error:  # A config file's, as are others.
        _stop(console, f"{error.filename}:{error.lineno}: {error.msg}")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__
        _stop(console, f"{place.filename}:{place.lineno}: {kind}: {_one_line(error)}")
    address = None, 1, None
    if "coordinator" in flags.FLAGS:  # The program may have several processes.
        address = [flags.FLAGS[n].value for n in ("coordinator", "processes", "process")]
    try:
        _check_environment()
        split_processor(address[1] or 1)
        processes.start(*address)
    except UserError as error:
        _stop(console, str(error))

    end_on_sigterm()

    def guarded(rest: Sequence[str]) -> None:
        try:
            _run(main, rest)
        except UserError as error:
            _stop(console, str(error))
        except Stopped as stopped:
            try:  # Into the bucket, where the workdir is in one.
                processes.current().files.push()
            except UserError as error:
                _stop(console, str(error))
            if not resumes:
                console.print("stopped by SIGTERM")
                sys.exit(EXIT_TERMINATED)
            console.print(stopped.message, soft_wrap=True)
            processes.current().leave(0, stopped.message)
            raise
        except KeyboardInterrupt:
            message = "stopped; the same command goes on from here" if resumes else "stopped"
            console.print(message)
            processes.current().leave(130, message)
            sys.exit(130)
        except Exception as error:
            if not is_full(error):
                if processes.current().count > 1:  # It ends them all.
                    console.print_exception()
                    processes.current().leave(1, _one_line(error)[:500])
                raise
            name = f"{error.filename}: " if getattr(error, "filename", None) else ""
            _stop(
                console, f"{name}no space left on the disk; free some, and the same command goes on"
            )
        finally:
            ignore_sigterm()

    logging.set_verbosity(logging.WARNING)  # Orbax reports every step of every save otherwise.
    app.run(guarded, argv=arguments, flags_parser=lambda argv: argv)


def _run(main: Callable[[Sequence[str]], None], rest: Sequence[str]) -> None:
    """Calls the program; where there are several processes, all of them are done on return."""
    current = processes.current()
    try:
        main(rest)
        current.finish()
    except Exception:
        if current.count > 1:
            time.sleep(processes.SECONDS_FOR_NEWS)
        if current.stopped is not None:
            raise Stopped from None
        raise


def _help(names: Iterable[str]) -> None:
    """Prints what the program says of itself, and its options."""
    console = plain_console()
    console.print((sys.modules["__main__"].__doc__ or "").strip(), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in sorted(names):
        flag = flags.FLAGS[name]
        default = flag.default_as_str.strip("'") if flag.default else ""
        table.add_row(Text(f"--{name}"), Text(f"{flag.help}{default and f' Default: {default}'}"))
    if "config" in names:
        table.add_row("--config.NAME", "Another value of a setting; configs/base.py has them all.")
    console.print()
    console.print(table)
    sys.exit(0)


def output_file(value: str | None) -> pathlib.Path | None:
    """The file of --out, if one is asked for; refused before any work where it cannot be one."""
    out = pathlib.Path(value) if value else None
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}")
    if out is not None and out.is_dir():
        raise UserError(f"--out={out}: is a directory; expected the name of a file")
    return out


def end_by_misfits(problems: Sequence[str], console: Console) -> None:
    """Prints what does not fit, and exits with `EXIT_DOES_NOT_FIT` if there is anything."""
    for problem in problems:
        console.print(f"does not fit: {problem}", soft_wrap=True)
    if problems:
        sys.exit(EXIT_DOES_NOT_FIT)


def is_full(error: Exception) -> bool:
    """Whether there is no space left; libraries of Rust, C++ and NumPy say so in words alone."""
    words = [word for n in FULL for word in (f"os error {n})", os.strerror(n))]
    cut = isinstance(error, OSError) and re.fullmatch(r"\d+ requested and \d+ written", str(error))
    return bool(getattr(error, "errno", None) in FULL or cut or any(w in str(error) for w in words))


def _check_environment() -> None:
    """Refuses variables of JAX that change draws or types: results follow from the config alone."""
    for name, value in JAX_DEFAULTS.items():
        if (given := getattr(jax.config, name)) != value:
            raise UserError(
                f"{name.upper()} is set to {given}, and a run's results would follow from more "
                "than its config: unset it"
            )


def unpin(flag: flags.Flag) -> None:
    """A hash in a config file is of the weights that it names, not of those named instead."""
    given = config_flags.get_override_values(flag)
    for name in ("retriever", "generator"):
        if f"{name}.source" in given and f"{name}.sha256" not in given:
            flag.value[name].sha256 = None


def _check_text(arguments: Sequence[str]) -> None:
    """Refuses bytes that are no UTF-8, which Python lets stand in strings that nobody can write."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(argument)!r}: not UTF-8; write it so") from None


def _check_config_exists(arguments: Sequence[str]) -> None:
    """Names a --config=FILE that is not there; ml_collections would wait until it is used."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, joined, value = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        path = (value if joined else following).partition(":")[0]
        if not path:
            raise UserError(_missing("config"))
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such config file; configs/ has those of the project")


def _unknown_setting(text: str, arguments: Sequence[str]) -> str | None:
    """Which option is meant where ml_collections names the part of one that the config lacks."""
    missing, nearest = _NO_SETTING.match(text), _NEAREST.search(text)
    part = missing and (missing[1] or missing[2])
    for argument in arguments:
        path = argument.partition("=")[0].removeprefix("-").removeprefix("-")
        if part and part in path.split(".")[1:] and path.startswith("config."):
            if new := RENAMED.get(path.removeprefix("config.")):
                return f"--{path}: is --config.{new} now"
            hint = f"did you mean {nearest[1]!r}?" if nearest else "configs/base.py has them all"
            return f"--{path}: there is no setting {part!r}; {hint}"
    return None


def _missing(name: str) -> str:
    return f"--{name} is missing: add {EXAMPLES[name]}, for example"


def _one_line(error: BaseException) -> str:
    """What an error says, without the quotes that KeyError and its wrappers add."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if _IN_CONFIG in text:  # The last line of a traceback, which follows, says it.
        text = f"--config: {text.strip().splitlines()[-1]}"
        if "get_config() takes 0 positional arguments" in text:
            text = "--config: this config takes nothing after its name and ':'"
    text = _NO_SWITCH.sub("expected true or false", text)
    return " ".join(text.split()) or type(error).__name__


def _stop(console: Console, message: str) -> None:
    console.print("error: " + message, style="red", soft_wrap=True)
    processes.current().leave(EXIT_USER_ERROR, message)
    sys.exit(EXIT_USER_ERROR)
