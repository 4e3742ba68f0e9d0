"""What every command shares: errors as one line, sizes as options, the node's configuration and store.

Place      admin floor.
Exit       0 ok, 1 failed (one line on standard error), 2 usage (click's own).
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import click
import trio

from csvfs.admin.peers import Peers, open_peers
from csvfs.config import NodeConfig, load_config
from csvfs.errors import BadRequest, CsvfsError
from csvfs.net.tls import open_identity
from csvfs.store.interface import ClusterStore
from csvfs.store.opening import open_store
from csvfs.units import parse_size

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
yes_option = click.option("--yes", is_flag=True, help="Do it without asking, whatever is lost.")


class CommandFailed(click.ClickException):
    """One line `csvfs: message` on standard error, exit status 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"csvfs: {' '.join(self.message.split())}", err=True, file=file)


class OneLineErrors(click.Group):
    """A group whose commands may raise CsvfsError and OSError."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (CsvfsError, OSError, BaseExceptionGroup) as error:
            reason = expected_failure(error)
            if reason is None:
                raise
            raise CommandFailed(reason) from error


def expected_failure(error: BaseException) -> str | None:
    """The line to print for an error that is no bug; None: it is one, and wants its traceback."""
    if isinstance(error, BaseExceptionGroup):  # what a trio nursery makes of the errors in it
        reasons = [expected_failure(inner) for inner in error.exceptions]
        return next((reason for reason in reasons if reason), None) if all(reasons) else None
    if isinstance(error, BrokenPipeError):
        return None  # click ends quietly when nobody reads the output any more
    if isinstance(error, CsvfsError):
        return str(error) or type(error).__name__
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return None


def is_interrupt(error: BaseException) -> bool:
    """Whether somebody pressed Ctrl-C, also in the groups that nurseries make of it."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)


class SizeType(click.ParamType):
    """An option like `4G` or `512M`, as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except BadRequest as error:
            self.fail(str(error), param, ctx)


SIZE = SizeType()


@dataclass(slots=True)
class Here:
    """Where a command runs: this node's configuration and the open cluster store."""

    config: NodeConfig
    store: ClusterStore


def run_here(work: Callable[[Here], Awaitable[T]]) -> T:
    """Run `work` with this node's configuration and store. Raises what either raises."""
    config = load_config()

    async def with_store() -> T:
        store = open_store(config.store)
        try:
            return await work(Here(config, store))
        finally:
            with trio.CancelScope(shield=True):
                await store.close()

    return trio.run(with_store)


def run_with_peers(work: Callable[[Here, Peers], Awaitable[T]]) -> T:
    """As run_here, for commands that also call drive servers and coordinators."""

    async def with_peers(here: Here) -> T:
        async with open_peers(open_identity(here.config)) as peers:
            return await work(here, peers)

    return run_here(with_peers)
