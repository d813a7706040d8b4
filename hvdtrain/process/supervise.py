"""Keep a run alive, on whichever hosts there are: `python -m hvdtrain supervise`. Standard library only.

    launch/supervise.sh --max-restarts 10 -- horovodrun -np 4 python -m hvdtrain train lm --run-dir runs/mine
    hvdtrain supervise --hosts-script ./hosts.sh --min-ranks 2 -- python -m hvdtrain train lm --run-dir runs/mine

The command is started again after a failure, from the last good checkpoint. Exit code 0 and 2 end it; 75 (stopped on
request after saving) starts it again at once; anything else after a pause that grows. Whatever an attempt leaves behind
is ended before the next one begins; so is a launcher that does not return although its ranks are gone. Where the
supervisor itself is killed, the ranks save and end.

Where hosts are listed (`discovery.py`), or the command names them, those that are lost are left out, and new ones are
taken in (`members.py`). The number of ranks follows, the global batch stays.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.process.discovery import HostsFile, HostSource, HostsScript, NamedHosts, scheduler_hosts
from hvdtrain.process.hosts import named_hosts, run_directory
from hvdtrain.process.job import refuse_as_rank
from hvdtrain.process.lookout import Lookout
from hvdtrain.process.members import NEVER, REQUEST, SAVE, Members, Rules
from hvdtrain.process.placement import Placement, is_placeable, placed
from hvdtrain.process.supervisor import Supervisor, say

# Where the command names its hosts and nothing says that the run may wait for them.
_LONGEST_WAIT_FOR_NAMED_S = 1800.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("give the command after --")
    try:
        refuse_as_rank()
        members = _members(given, command)
        supervisor = Supervisor(
            command,
            max_restarts=given.max_restarts,
            pause_s=given.pause,
            restarts_after_stop=not given.no_restart_after_stop,
            patience_s=given.patience,
            grace_s=given.grace,
            members=members,
        )
        return supervisor.run()
    except HvdtrainError as error:
        say(str(error))
        return error.exit_code
    except TimeoutError as error:
        say(str(error))
        return 1


def _members(given: argparse.Namespace, command: list[str]) -> Members | None:
    """Return who chooses the hosts; None where that is left to the command.

    Raises:
        ConfigError: options, command and lists do not fit together.
    """
    run_dir = run_directory(command)
    source = _source(given, command)
    if source is None:
        return None
    if given.max_ranks is not None and given.max_ranks < given.min_ranks:
        raise ConfigError(f"--max-ranks {given.max_ranks} is less than --min-ranks {given.min_ranks}")
    placed(command, Placement({"host": 1}, 1))  # refused now, not when there are hosts at last
    wait = given.longest_wait
    if wait is None and isinstance(source, NamedHosts) and not _is_elastic(given):
        wait = _LONGEST_WAIT_FOR_NAMED_S
    rules = Rules(given.min_ranks, given.max_ranks, given.grow or SAVE, given.lost_after, given.put_aside, wait)
    return Members(command, run_dir, Lookout(source, given.ssh, given.look_every), rules, say)


def _source(given: argparse.Namespace, command: list[str]) -> HostSource | None:
    if given.hosts_script is not None and given.hosts_file is not None:
        raise ConfigError("hosts are listed by --hosts-script or by --hosts-file: leave one of them out")
    if given.hosts_script is not None:
        return HostsScript(given.hosts_script, given.slots, timeout_s=given.hosts_timeout)
    if given.hosts_file is not None:
        return HostsFile(given.hosts_file, given.slots)
    named = named_hosts(command)
    if named:
        return NamedHosts(named)
    if not (_is_elastic(given) or is_placeable(command)):
        return None
    source = scheduler_hosts()
    if source is None:
        raise ConfigError(
            "nothing lists the hosts, neither the command nor Slurm or PBS: give --hosts-script PROGRAM or"
            " --hosts-file FILE, with a line host:slots each"
        )
    return source


def _is_elastic(given: argparse.Namespace) -> bool:
    return given.min_ranks > 1 or given.max_ranks is not None or given.grow is not None


def _count(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 10**6:
        raise ValueError(text)
    return number


def _positive(text: str) -> int:
    number = _count(text)
    if not number:
        raise ValueError(text)
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and 0 <= number <= 10**6):
        raise ValueError(text)
    return number


def _interval(text: str) -> float:
    number = _seconds(text)
    if number < 0.1:
        raise ValueError(text)
    return number


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a quote is not closed in {text!r}: it is read as a shell reads a command; put a path that has a quote"
            " into other quotes, or a backslash before it"
        ) from None
    if not words:
        raise ValueError(text)
    return words


_count.__name__, _positive.__name__ = "count (0 to 1,000,000)", "count (1 to 1,000,000)"
_seconds.__name__, _interval.__name__ = "number of seconds", "number of seconds (0.1 at least)"
_words.__name__ = "command"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="hvdtrain supervise",
        description="Start a run again whenever it ends before it has finished, on the hosts that there are.",
        allow_abbrev=False,
    )
    hosts = parser.add_argument_group(
        "hosts", "without these it runs where its command says, or inside a Slurm or PBS job on the job's hosts"
    )
    hosts.add_argument("--hosts-script", type=_words, metavar="PROGRAM", help="prints host:slots, one a line")
    hosts.add_argument("--hosts-file", type=Path, metavar="FILE", help="has such lines, and is read again and again")
    hosts.add_argument("--slots", type=_positive, default=1, help="of a host that is listed without a number (1)")
    hosts.add_argument("--min-ranks", type=_positive, default=1, help="wait where there would be fewer (1)")
    hosts.add_argument("--max-ranks", type=_positive, help="use no more")
    hosts.add_argument(
        "--grow",
        choices=(SAVE, REQUEST, NEVER),
        help="take new hosts in after the next save (the default), on SIGUSR2 alone, or only when it starts anyway",
    )
    hosts.add_argument("--look-every", type=_interval, default=10.0, help="seconds between two looks at the hosts (10)")
    hosts.add_argument("--hosts-timeout", type=_interval, default=20.0, help="seconds that the script may take (20)")
    hosts.add_argument(
        "--lost-after",
        type=_seconds,
        default=30.0,
        help="seconds after which a host that is silent is lost (30; 0: never)",
    )
    hosts.add_argument(
        "--grace", type=_seconds, default=60.0, help="seconds to save and stop where a host is not listed any more (60)"
    )
    hosts.add_argument(
        "--put-aside", type=_seconds, default=300.0, help="seconds without a host that fails repeatedly (300; 0: none)"
    )
    hosts.add_argument("--longest-wait", type=_seconds, help="seconds to wait for enough hosts (for ever)")
    hosts.add_argument(
        "--ssh", type=_words, default=["ssh"], help="command by which hosts are asked whether they answer"
    )
    parser.add_argument(
        "--max-restarts", type=_count, default=10, help="in a row without a new checkpoint (default 10)"
    )
    parser.add_argument(
        "--pause", type=_seconds, default=5.0, help="seconds before the first restart; doubles up to 300"
    )
    parser.add_argument("--no-restart-after-stop", action="store_true", help="let exit code 75 end it as well")
    parser.add_argument(
        "--patience",
        type=_seconds,
        default=60.0,
        help="seconds that a launcher may outlive the ranks on this host (60)",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="-- LAUNCHER ... python -m hvdtrain ... --run-dir DIR"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
