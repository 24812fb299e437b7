"""The `llmcache` command. This module alone turns errors into one line and an exit code."""

from __future__ import annotations

import sys

import typer
from typer.exceptions import TyperException

from llmcache.cli import (
    build,
    calibrate,
    compact,
    demo,
    evict,
    explain,
    gc,
    inspect,
    plan,
    purge,
    repair,
    report,
    run,
    sign,
    snapshot,
    stats,
    verify_model,
    warm,
)
from llmcache.cli.bench import app as bench
from llmcache.cli.shared import logs
from llmcache.errors import ConfigError, LLMCacheError

STOPPED = 130  # exit code of a program ended by Ctrl-C, as shells report it

app = typer.Typer(
    name="llmcache",
    help="Cache transformer activations of document corpora: repeats are looked up, new documents computed once.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.command()(plan.plan)
app.command()(build.build)
app.command()(warm.warm)
app.command()(run.run)
app.command()(calibrate.calibrate)
app.command()(explain.explain)
app.command()(stats.stats)
app.command()(report.report)
app.command()(inspect.inspect)
app.command()(evict.evict)
app.command()(compact.compact)
app.command()(gc.gc)
app.command()(purge.purge)
app.command()(sign.sign)
app.command()(demo.demo)
app.command()(repair.repair)
app.command(name="verify-model")(verify_model.verify_model)
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def options(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
    log_level: str | None = typer.Option(None, help="debug, info, warning (default) or error."),
    log_format: str | None = typer.Option(None, help="Format of lines on standard error: text, or json."),
) -> None:
    logs.choose(log_level, log_format)
    if version:
        from llmcache import __version__

        typer.echo(f"llmcache {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line and exit.

    Exit code 0: done; 1: failed; 2: wrong command line; 3: stopped by `run --max-seconds`, --resume continues;
    130: stopped with Ctrl-C.
    """
    with logs.logged():
        _main()


def _main() -> None:
    try:
        code = app(standalone_mode=False) or 0
        sys.exit(stopped() if code == STOPPED else code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(stopped())
    except ConfigError as error:
        sys.exit(print_error(error, 2))
    except LLMCacheError as error:
        sys.exit(print_error(error, 1))
    except TyperException as error:
        sys.exit(print_error(f"{error.format_message()} (see llmcache --help)", 2))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.exit(print_error(f"{error.strerror or error}{where}", 1))


def print_error(error: object, code: int) -> int:
    """Print an error as one line on standard error. Returns the exit code."""
    typer.echo(logs.error_line(" ".join(str(error).split()), code), err=True)
    return code


def stopped() -> int:
    return print_error("stopped; committed results are kept, and the same command continues from there", STOPPED)
