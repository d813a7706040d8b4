"""The documented format of traces ("Trace Event Format", JSON object), as strictly as a reader may take it."""

import math
from collections import defaultdict

KNOWN = {"X", "M", "s", "t", "f"}
METADATA = {"process_name": ("name", str), "thread_name": ("name", str), "process_sort_index": ("sort_index", int)}
# Times are written in microseconds with three digits behind the point.
ROUNDING = 0.0011


def faults_of(trace):
    """Return what of a trace breaks the format, in words, the first few of each kind."""
    found = defaultdict(list)
    if not isinstance(trace.get("traceEvents"), list):
        return ["traceEvents is no list"]
    if trace.get("displayTimeUnit") not in ("ms", "ns"):
        found["displayTimeUnit"].append(trace.get("displayTimeUnit"))
    for event in trace["traceEvents"]:
        for fault in _of_event(event):
            found[fault].append(event)
    for fault, event in [*_overlaps(trace["traceEvents"]), *_arrows(trace["traceEvents"])]:
        found[fault].append(event)
    return [f"{kind}: {len(events)}, such as {events[:2]}" for kind, events in found.items()]


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _of_event(event):
    if event.get("ph") not in KNOWN:
        yield "unknown ph"
    if not isinstance(event.get("name"), str) or not event["name"]:
        yield "no name"
    if type(event.get("pid")) is not int or type(event.get("tid")) is not int or event["pid"] < 0 or event["tid"] < 0:
        yield "pid and tid are no numbers"
    if not isinstance(event.get("args", {}), dict):
        yield "args are no object"
    if event.get("ph") == "M":
        field, kind = METADATA.get(event["name"], ("", object))
        if type(event.get("args", {}).get(field)) is not kind:
            yield "metadata of no known form"
    else:
        yield from _of_time(event)


def _of_time(event):
    if not _is_number(event.get("ts")) or event["ts"] < 0:
        yield "ts is no time"
    if not isinstance(event.get("cat"), str):
        yield "no cat"
    if event.get("ph") == "X" and not (_is_number(event.get("dur")) and event["dur"] >= 0):
        yield "dur is no length"
    if event.get("ph") in ("s", "t", "f") and not isinstance(event.get("id"), str | int):
        yield "an arrow without id"


def _overlaps(events):
    """Yield slices of a thread that neither lie within one another nor apart."""
    threads = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            threads[event["pid"], event["tid"]].append(event)
    for slices in threads.values():
        slices.sort(key=lambda event: (event["ts"], -event["dur"]))
        within = []
        for event in slices:
            while within and within[-1]["ts"] + within[-1]["dur"] <= event["ts"] + ROUNDING:
                within.pop()
            if within and event["ts"] + event["dur"] > within[-1]["ts"] + within[-1]["dur"] + ROUNDING:
                yield "slices that overlap", event
            within.append(event)


def _arrows(events):
    """Yield arrows without a beginning or an end, backwards, between ranks, or with their ends in no slice."""
    slices = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    ends = defaultdict(dict)
    for event in events:
        if event.get("ph") in ("s", "f"):
            ends[event.get("cat"), event.get("name"), event.get("id")][event["ph"]] = event
    for pair in ends.values():
        yield from _of_arrow(pair, slices)


def _of_arrow(pair, slices):
    if set(pair) != {"s", "f"}:
        yield "an arrow of one end", next(iter(pair.values()))
        return
    if pair["s"]["pid"] != pair["f"]["pid"]:
        yield "an arrow between ranks", pair["s"]
    if pair["s"]["ts"] > pair["f"]["ts"] + ROUNDING:
        yield "an arrow backwards", pair["s"]
    for event in pair.values():
        own = slices[event["pid"], event["tid"]]
        if not any(start - ROUNDING <= event["ts"] <= end + ROUNDING for start, end in own):
            yield "an arrow's end in no slice", event
