"""Checks of launcher, versions and Horovod: pure functions from every rank's facts to findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hvdtrain.errors import counted
from hvdtrain.install.clone import setup_command
from hvdtrain.verbs.doctor.facts import RankFacts
from hvdtrain.verbs.doctor.findings import Finding, error, ok, warning
from hvdtrain.verbs.kit import ranks_text

_REBUILD = f"{setup_command()} (it builds Horovod for the torch and the MPI that come first on PATH)"


def check_launch(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Hold the launcher's number of ranks against Horovod's; name the cause where they are not connected."""
    first = ranks[0]
    if first.launcher == "none":
        yield ok("launcher", "none: one process")
        return
    hosts = len({facts.host for facts in ranks})
    started = f"{first.launcher} started {counted(first.size, 'rank')}"
    problem = _contact_problem(first, started)
    if problem:
        yield problem
    elif first.contact_problem:
        yield error("launcher", f"{started}, but they are not connected: {first.contact_problem}", _advice(first))
    elif first.size != len(ranks):
        yield error("launcher", f"{started}, but {len(ranks)} answered", _singleton_remedy(first))
    else:
        yield ok("launcher", f"{started} on {counted(hosts, 'host')}; Horovod sees all of them")


def check_host_names(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Each host must find itself where Gloo carries the tensors: it ends in a segmentation fault otherwise."""
    hosts = sorted({facts.host for facts in ranks if not facts.host_resolves})
    if hosts:
        status = error if ranks[0].launcher == "horovodrun --gloo" else warning
        yield status(
            "host name",
            f"{', '.join(hosts)} has no address for its own name: under horovodrun --gloo Horovod crashes at its start",
            f"on it: echo '127.0.1.1 {hosts[0]}' | sudo tee -a /etc/hosts",
        )


def check_versions(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Show the versions; other ones on some ranks are an error, except for the last digits of Python's."""
    first = ranks[0]
    shown = ", ".join(f"{name} {version}" for name, version in first.versions.items() if version and name != "MPI")
    different = list(_differences(ranks))
    if not different:
        more = f" on all {len(ranks)} ranks" if len(ranks) > 1 else ""
        yield ok("versions", shown + more)
    for name, theirs, who, version in different:
        minor = name in ("python", "numpy") and _minor(theirs) == _minor(version)
        yield (warning if minor else error)(
            "versions",
            f"{name} {theirs or 'missing'} on {who}, {version or 'missing'} on rank 0",
            "use one environment on all hosts: a shared directory or one image, with its bin first on PATH"
            " (mpirun: -x PATH -x PYTHONPATH)",
        )


def check_horovod(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Is Horovod there, does it load, and was it built against the torch that is running?"""
    needed = ranks[0].launcher != "none"
    for facts in _first_of_each_host(ranks):
        build, torch_version = facts.horovod, facts.versions["torch"]
        where = f" on {facts.host}" if len({item.host for item in ranks}) > 1 else ""
        status = error if needed else warning
        if build.version is None:
            yield status(
                "horovod", f"not installed{where}: one process trains without, several do not", setup_command()
            )
        elif build.problem:
            against = f"; it was built against torch {build.torch}, {torch_version} runs" if build.torch else ""
            yield status("horovod", f"{build.version} does not load{where} ({build.problem}){against}", _REBUILD)
        elif build.torch and build.torch != torch_version:
            yield status("horovod", f"built against torch {build.torch}, but {torch_version} runs{where}", _REBUILD)
        elif facts is ranks[0]:
            against = f" against torch {build.torch}" if build.torch else ""
            yield ok("horovod", f"{build.version} with {', '.join(build.features)}, built{against}")


def check_mpi(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Show the MPI library that mpi4py finds."""
    name = ranks[0].versions["MPI"]
    if name:
        yield ok("MPI", name)
    elif "MPI" in ranks[0].horovod.features:
        problem = ranks[0].mpi4py_problem
        if not problem:
            yield ok("MPI", "mpi4py is not installed, so plain MPI is not measured (pip install mpi4py)")
        else:
            yield warning(
                "MPI",
                f"mpi4py does not load ({problem}), so plain MPI is not measured",
                "put the MPI that Horovod was built for first on PATH and LD_LIBRARY_PATH, or for it anew:"
                " pip install --force-reinstall --no-binary mpi4py mpi4py",
            )


def _contact_problem(facts: RankFacts, started: str) -> Finding | None:
    """Return the finding for a cause that is known by name."""
    for name in ("HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
        if facts.launcher == "mpirun" and facts.variables.get(name, "").lower() == "gloo":
            return error(
                "launcher",
                f"{started}, but {name}=gloo: each would be alone",
                f"unset {name}, or start with horovodrun --gloo -np {facts.size}",
            )
    if facts.horovod_size is not None and facts.horovod_size != facts.size:
        return error(
            "launcher",
            f"{started}, but Horovod sees {facts.horovod_size}: each would train on its own",
            _singleton_remedy(facts),
        )
    return None


def _advice(facts: RankFacts) -> str:
    if not facts.horovod.version or facts.horovod.problem:
        return _REBUILD
    if not facts.host_resolves and facts.launcher == "horovodrun --gloo":
        return "give the host an address, see 'host name'"
    return "start the same command with fewer ranks, then on one host, to find the one that fails"


def _singleton_remedy(facts: RankFacts) -> str:
    if facts.launcher == "srun":
        return "srun --mpi=pmix ... (srun --mpi=list shows what there is), or mpirun inside the allocation"
    if facts.launcher == "horovodrun --gloo":
        return "unset HOROVOD_RANK HOROVOD_SIZE if they were left by hand, and start with horovodrun --gloo"
    build = "" if "MPI" in facts.horovod.features else "; this Horovod was built without MPI"
    stray = f"{facts.stray}; or " if facts.stray else ""
    return f"{stray}start with the mpirun of the MPI that Horovod was built with, or rebuild: {_REBUILD}{build}"


def _differences(ranks: Sequence[RankFacts]) -> Iterator[tuple[str, str | None, str, str | None]]:
    """Yield name, version, the ranks that have it, and rank 0's version, for each that is not rank 0's."""
    for name, version in ranks[0].versions.items():
        others: dict[str | None, list[int]] = {}
        for facts in ranks:
            if facts.versions.get(name) != version:
                others.setdefault(facts.versions.get(name), []).append(facts.rank)
        for theirs, who in others.items():
            hosts = sorted({facts.host for facts in ranks if facts.rank in who})
            yield name, theirs, f"{ranks_text(who)} ({', '.join(hosts[:4])})", version


def _minor(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _first_of_each_host(ranks: Sequence[RankFacts]) -> list[RankFacts]:
    seen: dict[tuple[str, str | None, str], RankFacts] = {}
    for facts in ranks:
        seen.setdefault((facts.host, facts.horovod.torch, facts.horovod.problem), facts)
    return list(seen.values())
