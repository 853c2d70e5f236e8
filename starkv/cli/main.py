# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command: its subcommands, and user errors as one line and exit code 2."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from starkv import __version__
from starkv.cli.bench import bench
from starkv.cli.build import build
from starkv.cli.console import errors
from starkv.cli.doctor import doctor
from starkv.cli.export import export
from starkv.cli.inspect import inspect
from starkv.cli.run import run
from starkv.errors import StarkvError

app = typer.Typer(
    name="starkv",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="Compile GUI vision-language models into quantized engines and run them offline.",
)
for command in (export, build, run, inspect, doctor, bench):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"starkv {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run the command."""
    try:
        app()
    except StarkvError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
