"""`doctor`: is this machine ready, are these ranks connected, and what mends what is not.

Each rank gathers its `RankFacts`; one gather brings them together; the checks are pure functions from all ranks' facts
to `Finding`s. Where the ranks do not connect, rank 0 speaks from its own facts.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Sequence

from hvdtrain.errors import ConfigError, reason_of
from hvdtrain.process.launch import detect_launch
from hvdtrain.process.output import tell
from hvdtrain.verbs.doctor import links, machine, software
from hvdtrain.verbs.doctor.facts import RankFacts, own_facts
from hvdtrain.verbs.doctor.findings import Finding, exit_code, table
from hvdtrain.verbs.doctor.network import Network, facts_of_the_group, measure
from hvdtrain.verbs.kit import write_json, write_line
from hvdtrain.verbs.options import DoctorOptions
from hvdtrain.world import World
from hvdtrain.world.inspect import choose_device, try_connect

# A launcher ends the job when rank 0 has left: a rank that is still here after this long has a fault of its own.
_SECONDS_FOR_RANK_0 = 10.0


def doctor(options: DoctorOptions) -> int:
    """Answer `doctor`: print what was found and return 1 where there is an error, else 0. Collective.

    Ends by itself, with an error line, where the ranks do not connect within `options.timeout` seconds.
    """
    own = own_facts(detect_launch(), options.run_dir)
    patience = _Patience(own, options)
    contact = try_connect()
    own = dataclasses.replace(own, horovod_size=contact.horovod_size, contact_problem=contact.problem)
    if contact.world is None:
        patience.end()
        return _speak_alone(own, options)
    try:
        return _speak_together(contact.world, own, options, patience)
    except Exception as error:
        if not contact.world.has_lost_contact(error):
            raise
        own = dataclasses.replace(own, contact_problem="a rank was lost during the measurements")
        return _speak_alone(own, options)
    finally:
        patience.end()


def diagnose(ranks: Sequence[RankFacts], network: Network) -> list[Finding]:
    """Return what all checks say of these facts, in the order in which a person should read it."""
    return [
        *software.check_launch(ranks),
        *software.check_host_names(ranks),
        *software.check_versions(ranks),
        *software.check_horovod(ranks),
        *software.check_mpi(ranks),
        *machine.check_cores(ranks),
        *machine.check_load(ranks),
        *machine.check_gpus(ranks),
        *machine.check_shared_memory(ranks),
        *machine.check_open_files(ranks),
        *machine.check_disk(ranks),
        *links.check_variables(ranks),
        *links.check_clocks(ranks),
        *links.check_interfaces(ranks),
        *links.check_all_reduce(ranks, network),
        *links.check_pairs(network),
    ]


def _speak_together(world: World, own: RankFacts, options: DoctorOptions, patience: _Patience) -> int:
    choose_device(world)
    ranks = world.all_gather_object(facts_of_the_group(world, own), "doctor.facts")
    patience.renew()
    network = measure(world, ranks)
    code = _report(ranks, network, options) if world.rank == 0 else None
    code = world.broadcast_object(code, "doctor.code")  # no rank leaves before rank 0 has spoken
    world.close()
    return code


def _speak_alone(own: RankFacts, options: DoctorOptions) -> int:
    if own.rank == 0:
        return _report([own], Network(), options)
    time.sleep(_SECONDS_FOR_RANK_0)
    errors = [finding for finding in diagnose([own], Network()) if finding.status == "error"]
    write_line(f"rank {own.rank} on {own.host} is not connected:\n{table(errors)}", sys.stderr)
    return 1


def _report(ranks: Sequence[RankFacts], network: Network, options: DoctorOptions) -> int:
    """Show and write what the checks found; returns the exit code. On rank 0."""
    findings = diagnose(ranks, network)
    write_line(table(findings), sys.stdout)
    report = {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ranks": [dataclasses.asdict(facts) for facts in ranks],
        "network": dataclasses.asdict(network),
        "exit_code": exit_code(findings),
    }
    try:
        write_json(options.json, report)
    except ConfigError as error:
        write_line(f"hvdtrain: {error}", sys.stderr)
        return error.exit_code
    return exit_code(findings)


class _Patience:
    """Ends the process where the ranks do not come together in time: Horovod and MPI wait for ever."""

    def __init__(self, own: RankFacts, options: DoctorOptions) -> None:
        self._own = own
        self._options = options
        self._timer = self._start()

    def renew(self) -> None:
        """Begin to wait anew."""
        self._timer.cancel()
        self._timer = self._start()

    def end(self) -> None:
        """Stop waiting: the ranks have come together, or the reason why not is known."""
        self._timer.cancel()

    def _start(self) -> threading.Timer:
        limit_s = self._options.timeout + (_SECONDS_FOR_RANK_0 if self._own.rank else 0.0)
        timer = threading.Timer(limit_s, self._give_up)
        timer.daemon = True
        timer.start()
        return timer

    def _give_up(self) -> None:
        limit_s = self._options.timeout
        own = dataclasses.replace(
            self._own, contact_problem=f"this rank waited {limit_s:g} s (--timeout) for the other ones"
        )
        try:
            if own.rank == 0:
                _report([own], Network(), self._options)
            else:
                write_line(f"rank {own.rank} on {own.host} waited {limit_s:g} s for the others", sys.stderr)
        except Exception as error:  # of any type: it would end with this thread, unheard
            tell(f"hvdtrain: doctor cannot show what it has found: {reason_of(error)}")
        finally:
            os._exit(1)
