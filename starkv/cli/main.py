# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command: its subcommands, and user errors as one line and exit code 2."""

import errno
import sys
from typing import Annotated

import typer

from starkv import __version__
from starkv.cli.agent import agent
from starkv.cli.bench import bench
from starkv.cli.build import build
from starkv.cli.chat import chat
from starkv.cli.console import fail
from starkv.cli.doctor import doctor
from starkv.cli.eval import evaluate
from starkv.cli.export import export
from starkv.cli.inspect import inspect
from starkv.cli.pack import pack
from starkv.cli.run import run
from starkv.cli.serve import serve
from starkv.cli.train_kv import train_kv
from starkv.cli.validate import app as validate_app
from starkv.errors import StarkvError

app = typer.Typer(
    name="starkv",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="Compile GUI vision-language models into quantized engines and run them offline.",
)
for command in (export, build, pack, run, chat, agent, serve, inspect, doctor, bench):
    app.command()(command)
app.command("eval")(evaluate)
app.command("train-kv")(train_kv)
app.add_typer(validate_app, name="validate")


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


_EXTRA_OF = {
    "fastapi": "serve",
    "huggingface_hub": "export",
    "matplotlib": "eval",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "trace",
    "prometheus_client": "serve",
    "torch": "trace",
    "transformers": "trace",
    "uvicorn": "serve",
}
"""Package that a subcommand imports when it needs it → our extra that brings it."""

_REFUSED_BY_THE_SYSTEM = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""What a path that the user chose can make the file system say."""


def _explain(error: Exception) -> str | None:
    """The one line that says what the user can do, or None if the error is a bug of ours."""
    if isinstance(error, StarkvError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in _EXTRA_OF:
            return f"this needs the package {package}; pip install 'starkv[{_EXTRA_OF[package]}]'"
    if isinstance(error, OSError) and error.errno in _REFUSED_BY_THE_SYSTEM:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return None


def main() -> None:
    """Run the command."""
    try:
        app()
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        fail(line)
        sys.exit(2)


if __name__ == "__main__":
    main()
