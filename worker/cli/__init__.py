"""`backstop`: data on stdout, progress and words on stderr, `--json` everywhere, `-` is stdin.

Exit codes: 0 ok, 1 failed, 2 usage, 3 partly failed, 4 wait timed out, 5 not found, 69 a server is unreachable, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

import worker
from worker.errors import BackstopError

# Where each command is, read only when it is called, and its line in the list: `backstop --help` answers at once.
_COMMANDS = {
    "demo": ("demo", "Everything, on simulated providers; prints results and the bill."),
    "up": ("roles", "Servers (if none are given), workers, API and Flower, until Ctrl-C."),
    "worker": ("roles", "One worker process."),
    "api": ("roles", "The REST API."),
    "beat": ("roles", "Celery beat: slow housekeeping."),
    "flower": ("roles", "Flower, to watch the workers."),
    "simulate": ("roles", "The simulated providers."),
    "chat": ("produce", "One chat job, answered here."),
    "enqueue": ("produce", "A file of tickets, or of OpenAI batch lines."),
    "watch": ("look", "How far a batch or job is, live."),
    "results": ("look", "The results of a batch or job, as CSV or OpenAI batch output lines."),
    "jobs": ("look", "Jobs, newest first."),
    "job": ("look", "One job, with the timeline of its calls."),
    "costs": ("look", "What it cost, and how much of that is known."),
    "retry": ("operate", "Queues failed, cancelled and expired jobs once more."),
    "cancel": ("operate", "Cancels a batch or job."),
    "providers": ("operate", "The health of the providers; opens, closes or resets a breaker."),
    "lanes": ("operate", "The two lanes; pauses or resumes one."),
    "keys": ("operate", "API keys: creates, lists, revokes."),
    "webhooks": ("webhooks", "Who is told when jobs and batches end: creates, lists, deletes; what was sent."),
    "config": ("configure", "Checks or shows backstop.toml."),
    "db": ("setup", "Brings the schema up to date, or checks it."),
    "doctor": ("setup", "Says what does not work, and what to do."),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"worker.cli.{_COMMANDS[name][0]}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in _COMMANDS.items()])


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(worker.__version__, prog_name="backstop")
def cli() -> None:
    """Runs LLM chat jobs that must not fail: queued, answered through a chain of providers, every call on the books."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and ends the process with its exit code; a user's mistake is one line, never a trace."""
    try:
        # Not `cli.main`: it would end a broken pipe with 1, and other errors of writing with a trace.
        with cli.make_context("backstop", list(sys.argv[1:] if arguments is None else arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
        code = 0
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BackstopError as error:
        if str(error):
            click.echo(f"backstop: {error}", err=True)
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("backstop: interrupted", err=True)
        code = 130
    except BrokenPipeError:
        code = 0  # whoever read has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        click.echo(f"backstop: {error.strerror or error}", err=True)
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
