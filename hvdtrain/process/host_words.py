"""Hosts in sentences of the supervisor: names, verbs that fit, what has become of them. Standard library only."""

from __future__ import annotations

from collections.abc import Collection

from hvdtrain.process.lookout import Look

_MOST_SHOWN = 8


def names_of(hosts: Collection[str]) -> str:
    """Return the hosts' names, of many the first ones and how many more there are."""
    shown = [*hosts][:_MOST_SHOWN]
    return ", ".join(shown) + (f" and {len(hosts) - _MOST_SHOWN} more" if len(hosts) > _MOST_SHOWN else "")


def with_verb(hosts: Collection[str], one: str, several: str) -> str:
    """Return the hosts' names and the verb that fits their number."""
    return f"{names_of(hosts)} {one if len(hosts) == 1 else several}"


def leaving(hosts: Collection[str], look: Look) -> str:
    """Say of hosts in use that there are fewer slots on them, or none, and whether they answer."""
    gone = [host for host in hosts if host not in look.listed]
    fewer = [host for host in hosts if host in look.listed]
    parts = [f"{with_verb(gone, 'is', 'are')} not listed any more"] if gone else []
    parts += [f"{with_verb(fewer, 'is', 'are')} listed with fewer slots"] if fewer else []
    are_all_there = look.there.issuperset(hosts)
    if len(hosts) == 1:
        parts.append("and still answers" if are_all_there else "and does not answer")
    else:
        parts.append("and still answer" if are_all_there else "and do not all answer")
    return ", ".join(parts)
