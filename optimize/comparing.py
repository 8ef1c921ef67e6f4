"""Two candidates, recorded runs or live endpoints held against each other: a word, its interval, and what differs."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from numpy.typing import NDArray

from optimize.across_hosts import names_campaign
from optimize.endpoints import check_amounts, check_seed, endpoint, make_folder
from optimize.reporting import read_campaign
from optimize.samples import load_samples
from profiles.load.ceiling import Ceilings
from profiles.load.engine import LoadGenerator
from profiles.load.payloads import encode_payloads
from profiles.measure.compare import turned
from profiles.measure.host import fingerprint_host, split_cpus
from profiles.measure.levels import Level, find_level, load_levels
from profiles.measure.recorded import FILE, Recorded, read_recorded, recorded_of, write_recorded
from profiles.measure.rounds import compare_apart, compare_rounds, reduce_rounds
from profiles.measure.turns import JUDGED, Side, Turns, measure_in_turns
from registry.codec import digest, to_jsonable
from registry.errors import InputError
from registry.policy import METRICS
from registry.records import Campaign, Candidate, Capacity, Comparison, Estimate, Host, Measurement, Round, Variant
from registry.report import numbers
from registry.selection import metric_table

Kind = Literal["campaign", "campaigns", "recorded", "live"]
Key = tuple[str, str | None]

_ENDPOINT = re.compile(r"(?:(?P<scheme>grpcs?|https?)://)?(?P<address>[^/\s]+:\d+)/(?P<model>[^/\s]+)")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MAXIMUM: Key = ("max_throughput_rps", None)
_SAID = {"faster": "is faster than", "slower": "is slower than", "equivalent": "is as fast as"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two things and what is known of them, the second held against the first.

    Attributes:
        names: of both.
        facts: what each is: files, engine, serving profile, versions, host.
        metrics: of both, (metric, load) -> estimate.
        comparisons: of what was measured of both; empty where ratios are refused.
        first_of_all: what the verdict's word is about, where it was compared.
        refused: why there are no ratios; empty where there are.
        notes: what else there is to know.
    """

    kind: Kind
    names: tuple[str, str]
    facts: tuple[Mapping[str, str], Mapping[str, str]]
    metrics: tuple[Mapping[Key, Estimate], Mapping[Key, Estimate]]
    comparisons: tuple[Comparison, ...]
    first_of_all: Key
    refused: str = ""
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Comparison | None:
        """The comparison that the verdict is about; None where there is none."""
        by_key = {(one.metric, one.load): one for one in self.comparisons}
        tails = (one for one in self.comparisons if one.metric == f"latency_p{JUDGED}_ms")
        return by_key.get(self.first_of_all) or by_key.get(_MAXIMUM) or next(iter((*tails, *self.comparisons)), None)

    @property
    def differences(self) -> list[tuple[str, str, str]]:
        """(what, of the first, of the second) where they differ."""
        first, second = self.facts
        names = dict.fromkeys((*first, *second))
        told = ((name, first.get(name, "none"), second.get(name, "none")) for name in names)
        return [(name, one, other) for name, one, other in told if one != other]

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        first, second = self.names
        chosen = self.chosen
        if chosen is None:
            return f"{second} and {first} stand side by side: {self.refused or 'nothing was measured of both.'}"
        said = f"{label(chosen.metric, chosen.load)} {ratio_text(chosen)} that of {first}"
        if chosen.word == "undecided":
            floor = f"differences up to {chosen.noise_floor:.0%} are noise here"
            return f"It is undecided whether {second} differs from {first}: {said}; {floor}."
        return f"{second} {_SAID[chosen.word]} {first}: {said}."


def label(metric: str, load: str | None) -> str:
    """A metric as people read it."""
    known = METRICS.get(metric)
    name = known.label if known else metric
    return f"{name} at {load}" if load else name


def ratio_text(comparison: Comparison) -> str:
    """A ratio with its interval: ``1.52× [1.47, 1.58]``."""
    parts = (numbers.times(comparison.ratio), numbers.times_interval(comparison.ratio))
    return " ".join(part for part in parts if part)


# --- what is asked for -----------------------------------------------------------------------------------------


def kind_of(*words: str) -> Kind:
    """What words name: folders of recorded runs, live endpoints, several campaigns, or else candidates of one campaign.

    Raises:
        InputError: each names something else, or there are more than two of what is compared in pairs.
    """
    kinds = {_kind(word) for word in words}
    if len(kinds) > 1:
        raise InputError(
            f"{' and '.join(map(repr, words))} are of two kinds",
            hint="Give two candidates of a campaign, the working folders of several campaigns, two folders that "
            "`burnish bench --out` wrote, or two endpoints host:port/model.",
        )
    kind = kinds.pop()
    if len(words) > 2 and kind != "campaigns":
        raise InputError(
            f"{len(words)} are named, and these are compared in pairs",
            hint="Only campaigns, by their working folders, stand side by side in any number.",
        )
    return kind


def _kind(word: str) -> Kind:
    if names_campaign(word):
        return "campaigns"
    if Path(word, FILE).is_file() or ("/" in word and Path(word).is_dir()):
        return "recorded"
    return "live" if _ENDPOINT.fullmatch(word) else "campaign"


# --- candidates of a campaign ----------------------------------------------------------------------------------


def compare_candidates(work: Path, first: str, second: str) -> list[Pair]:
    """Candidates of a campaign; a variant stands for its candidates, each held against that served the same way.

    Args:
        work: the campaign's working folder.
        first: name or id of a candidate or variant.
        second: the one held against it.

    Raises:
        InputError: there is no such campaign or candidate, or one was not measured.
    """
    campaign = read_campaign(work)
    ones, others = (_named(campaign, word) for word in (first, second))
    if len(ones) == len(others) == 1:
        return [_candidates_pair(campaign, ones[0], others[0], work)]
    pairs = [(one, other) for one in ones for other in others if one.serving == other.serving]
    if not pairs or len({one.serving for one, _ in pairs}) < len(pairs):
        listed = ", ".join(repr(one.name) for one in (*ones, *others))
        raise InputError(f"{first!r} and {second!r} may be several candidates: {listed}", hint="Name one of each.")
    return [_candidates_pair(campaign, one, other, work) for one, other in pairs]


def _named(campaign: Campaign, word: str) -> list[Candidate]:
    found = [one for one in campaign.candidates if word in (one.id, one.name)]
    found = found or [one for one in campaign.candidates if word in (one.variant_id, one.variant_name)]
    if not found:
        import difflib

        names = [name for one in campaign.candidates for name in (one.variant_name, one.name)]
        near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
        failed = next((failure for failure in campaign.failures if failure.subject == word), None)
        if failed is not None:
            raise InputError(f"{word!r} was not measured: {failed.reason}")
        raise InputError(
            f"{word!r} is no candidate of the campaign {campaign.name!r}",
            hint=f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(set(names)))}.",
        )
    measured = {one.candidate_id for one in campaign.rounds}
    if not (known := [one for one in found if one.id in measured]):
        reasons = {failure.subject: failure.reason for failure in campaign.failures}
        raise InputError(f"{found[0].name!r} was not measured: {reasons.get(found[0].name, 'it has no rounds')}")
    return known


def _candidates_pair(campaign: Campaign, first: Candidate, second: Candidate, work: Path) -> Pair:
    if first.id == second.id:
        raise InputError(f"{first.name!r} is compared with itself")
    level = _level_of(campaign)
    # Whoever had two slots tells how much like differs from like.
    twice = {one.candidate_id for one in campaign.rounds for run in one.runs if run.load.name.endswith("(A/A)")}
    a_a = next((one.id for one in campaign.candidates if one.id in twice and one.serving == first.serving), None)
    rounds = [one for one in campaign.rounds if one.candidate_id in {first.id, second.id, a_a}]
    comparisons = compare_rounds(first.id, rounds, raw_root=work, level=level, a_a_id=a_a)
    if a_a == second.id:  # the noise floor is the second's own
        seen = compare_rounds(second.id, rounds, raw_root=work, level=level)
        comparisons = tuple(turned(one) for one in seen if one.candidate_id == first.id)
    variants = {one.id: one for one in campaign.variants}
    table = metric_table(campaign.candidates, campaign.measurements, campaign.fidelities, campaign.variants)
    objective = campaign.verdict.policy.objectives[0]
    notes = [] if level.name != "quick" else ["The level quick gives a hint, no proof."]
    if any(one.load and "saturation" in one.load for one in comparisons):
        notes.append("Latency at a share of saturation is at another rate for each: the share of its own.")
    notes += _invalid(rounds, {first.id: first.name, second.id: second.name})
    return Pair(
        kind="campaign",
        names=(first.name, second.name),
        facts=(_facts(first, variants[first.variant_id]), _facts(second, variants[second.variant_id])),
        metrics=(table[first.id], table[second.id]),
        comparisons=tuple(one for one in comparisons if one.candidate_id == second.id),
        first_of_all=(objective.metric, objective.load),
        notes=tuple(notes),
    )


def _level_of(campaign: Campaign) -> Level:
    """The campaign's level; one that did not ship looked at its rounds once, as far as is known here."""
    shipped = load_levels()
    if campaign.level in shipped:
        return shipped[campaign.level]
    rounds = len({one.number for one in campaign.rounds})
    return replace(shipped["standard"], name=campaign.level, rounds=rounds, most_rounds=rounds)


def _facts(candidate: Candidate, variant: Variant) -> dict[str, str]:
    serving = to_jsonable(candidate.serving)
    stages = ", ".join(
        f"{call.name} {dict(call.params)}" if call.params else call.name for call in variant.recipe.stages
    )
    files = {f"file {one.path}": f"{one.size_bytes:,} bytes, {one.sha256[:12]}" for one in variant.artifact.files}
    return {
        "variant": f"{variant.name} ({variant.id})",
        "source": variant.source,
        "stages": stages or "none",
        "engine": candidate.engine.key,
        "engine version": candidate.engine_version,
        **{name.replace("_", " "): str(value) for name, value in serving.items()},
        "server version": candidate.server_version,
        "served by": candidate.cluster or "this campaign's machine",
        **{f"version of {name}": number for name, number in sorted(variant.tool_versions.items())},
        **files,
    }


# --- recorded runs ---------------------------------------------------------------------------------------------


def compare_recorded(first: Path, second: Path) -> Pair:
    """Runs that were recorded, in turns or at two times.

    Raises:
        InputError: a folder holds none, or its arrays are missing or damaged.
    """
    one, other = read_recorded(first), read_recorded(second)
    settings = one.settings
    level = replace(
        find_level("standard"),
        rounds=int(settings.get("rounds", 1)),
        most_rounds=max(int(settings.get("most_rounds", 1)), int(settings.get("rounds", 1))),
    )
    rounds = [*_relabelled(one.rounds, "A"), *_relabelled(other.rounds, "B")]
    metrics = tuple(
        _keyed(reduce_rounds(name, rounds, _known(recorded, name), raw_root=Path(), level=level))
        for name, recorded in (("A", one), ("B", other))
    )
    refused = _unlike(_hosts(one), _hosts(other))
    notes: list[str] = []
    if refused:
        comparisons: tuple[Comparison, ...] = ()
    elif one.session == other.session:
        comparisons = compare_rounds("A", rounds, raw_root=Path(), level=level)
    else:
        comparisons = compare_apart("A", rounds, raw_root=Path(), level=level)
        notes.append(
            "They were not measured in turns, so that only differences beyond 40 % are told from the machine's drift: "
            "`burnish compare` on the live endpoints tells more."
        )
    if one.samples_digest != other.samples_digest:
        notes.append("They were asked with different samples.")
    notes += _invalid(rounds, {"A": str(first), "B": str(second)})
    return Pair(
        kind="recorded",
        names=(str(first), str(second)),
        facts=(_recorded_facts(one), _recorded_facts(other)),
        metrics=(metrics[0], metrics[1]),
        comparisons=comparisons,
        first_of_all=_MAXIMUM,
        refused=refused,
        notes=tuple(notes),
    )


def _invalid(rounds: Sequence[Round], names: Mapping[str, str]) -> list[str]:
    """How many runs of each candidate were left out, and by which gates; nothing where none was."""
    told = []
    for identity, name in names.items():
        runs = [run for one in rounds if one.candidate_id == identity for run in one.runs]
        gates = Counter(finding.gate for run in runs for finding in run.findings)
        if gates:
            left_out = sum(not run.valid for run in runs)
            why = ", ".join(f"{gate} {count}" for gate, count in gates.most_common())
            told.append(f"{name}: {left_out} of {len(runs)} runs were invalid and are left out ({why}).")
    return told


def _relabelled(rounds: Sequence[Round], name: str) -> list[Round]:
    return [replace(one, candidate_id=name) for one in rounds]


def _known(recorded: Recorded, name: str) -> Capacity:
    if recorded.capacity is not None:
        return recorded.capacity
    return Capacity(candidate_id=name, concurrency=1, ladder=(), stages=(), saturation_rps=None)


def _keyed(measurements: Sequence[Measurement]) -> dict[Key, Estimate]:
    return {(name, one.load): estimate for one in measurements for name, estimate in one.metrics.items()}


def _hosts(recorded: Recorded) -> tuple[str, str]:
    return _server_of(str(recorded.endpoint.get("url", ""))), recorded.client.fingerprint


def _server_of(url: str) -> str:
    host = url.rpartition(":")[0]
    return "localhost" if host in _LOOPBACK else host


def _unlike(first: tuple[str, str], second: tuple[str, str]) -> str:
    """Why ratios of two (server's host, fingerprint of the client's) would say nothing; empty where they do."""
    if first[0] != second[0]:
        return f"the servers are on different hosts ({first[0]} and {second[0]}), and ratios hold within one."
    if first[1] != second[1]:
        return "the machines that measured them differ, and ratios hold within one."
    return ""


def _recorded_facts(recorded: Recorded) -> dict[str, str]:
    client = recorded.client
    return {
        **{name: str(value) for name, value in recorded.endpoint.items()},
        "samples": recorded.samples_digest[:12],
        **{name.replace("_", " "): str(value) for name, value in recorded.settings.items()},
        "client": f"{client.cpu_model}, {client.cores} cores ({client.fingerprint})",
        "client's CPUs": client.pinning,
        **{f"version of {name}": number for name, number in sorted(recorded.versions.items())},
    }


# --- live endpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How live endpoints are to be measured.

    Attributes:
        samples: an ``.npz`` with one array per input.
        concurrency: closed loop with so many outstanding, or None.
        rate_rps: open loop at this rate, or None; with neither, where both saturate is looked for first.
        rounds: instead of the level's; more are played, up to twice as many, while it is undecided.
        duration_s: of one window, instead of the level's.
        headers: name=value; ``{model}`` in one stands for each endpoint's own model, as a mesh needs it.
        out: folder to keep the records in, one for each endpoint below it; or None.
    """

    samples: Path
    protocol: str = "grpc"
    concurrency: int | None = None
    rate_rps: float | None = None
    level: str = "standard"
    rounds: int | None = None
    duration_s: float | None = None
    headers: Sequence[str] = ()
    tls: bool = False
    seed: int = 0
    out: Path | None = None


def compare_live(first: str, second: str, asked: Asked, *, told: Callable[[str], None] = lambda _: None) -> Pair:
    """Measures two endpoints in interleaved rounds, and holds the second against the first.

    Args:
        first: ``host:port/model``.
        second: likewise.
        asked: how.
        told: takes a line on each thing that is done.

    Raises:
        InputError: an option or the samples do not fit.
        UnreachableError: an endpoint does not answer, or refuses.
        StorageError: the folder for records cannot be written.
    """
    level = _level(asked)
    loads = [f"concurrency {asked.concurrency}"] if asked.concurrency is not None else []
    loads += [f"{asked.rate_rps:g} rps"] if asked.rate_rps is not None else []
    samples = load_samples(asked.samples)
    sides = [_side(name, word, samples.inputs, asked) for name, word in (("A", first), ("B", second))]
    server_cpus, client_cpus, pinning = split_cpus()
    client = fingerprint_host(pinning)
    played: list[Round] = []
    capacities: tuple[Capacity, ...] = ()
    with TemporaryDirectory(prefix="burnish-compare-") as scratch:
        root = asked.out or Path(scratch)
        make_folder(root, "--out")
        # As in a campaign: a hint is not worth the seconds.
        ceiling = None if level.provisional else Ceilings(root, server_cpus, client.fingerprint)
        how: dict[str, Any] = {"seed": asked.seed, "raw_root": root, "told": told, "on_round": played.append}
        try:
            with LoadGenerator(cpus=client_cpus, work=Path(scratch), ceiling=ceiling) as generator:
                turns = measure_in_turns(generator, sides, loads=loads, level=level, **how)
            capacities = turns.capacities
        finally:  # what was measured stays, whatever ended it
            settings = {
                "seed": asked.seed,
                "level": level.name,
                "rounds": level.rounds,
                "most_rounds": level.most_rounds,
            }
            records = [
                _record(side, played, capacities, client=client, samples_digest=samples.digest, settings=settings)
                for side in sides
            ]
            if asked.out is not None:
                for side, recorded in zip(sides, records, strict=True):
                    if recorded.rounds:
                        write_recorded(recorded, asked.out / side.id)
    refused = _unlike(*((_server_of(side.target.url), client.fingerprint) for side in sides))
    notes = [] if first != second else ["Both are the same endpoint: what differs is noise."]
    notes += _invalid(turns.rounds, {"A": first, "B": second})
    return Pair(
        kind="live",
        names=(first, second),
        facts=(_recorded_facts(records[0]), _recorded_facts(records[1])),
        metrics=(_of_side(turns, "A"), _of_side(turns, "B")),
        comparisons=() if refused else turns.comparisons,
        first_of_all=_MAXIMUM,
        refused=refused,
        notes=tuple(notes),
    )


def _level(asked: Asked) -> Level:
    check_seed(asked.seed)
    check_amounts(concurrency=asked.concurrency, rate=asked.rate_rps, rounds=asked.rounds, duration_s=asked.duration_s)
    level = find_level(asked.level)
    if asked.rounds is not None:
        level = replace(level, rounds=asked.rounds, most_rounds=2 * asked.rounds)
    if asked.duration_s is not None:
        level = replace(level, closed_s=asked.duration_s, open_s=asked.duration_s)
    return level


def _side(name: str, word: str, inputs: Mapping[str, NDArray[Any]], asked: Asked) -> Side:
    """The endpoint that a word names."""
    found = _ENDPOINT.fullmatch(word)
    if found is None:
        raise InputError(f"{word!r} is no endpoint", hint="An endpoint is host:port/model.")
    scheme = found["scheme"]
    url, protocol = (f"{scheme}://{found['address']}", None) if scheme else (found["address"], asked.protocol)
    headers = [header.replace("{model}", found["model"]) for header in asked.headers]
    target = endpoint(url, found["model"], protocol, headers, asked.tls)
    return Side(id=name, target=target, payloads=encode_payloads(inputs, target=target, seed=asked.seed))


def _record(
    side: Side,
    played: Sequence[Round],
    capacities: Sequence[Capacity],
    *,
    client: Host,
    samples_digest: str,
    settings: Mapping[str, Any],
) -> Recorded:
    own = [
        replace(one, runs=tuple(replace(run, raw=str(Path(run.raw).relative_to(side.id))) for run in one.runs))
        for one in played
        if one.candidate_id == side.id
    ]
    searched = next((one for one in capacities if one.candidate_id == side.id and one.ladder), None)
    return recorded_of(
        side.target,
        own,
        searched,
        client=client,
        samples_digest=samples_digest,
        settings=settings,
        session=digest([to_jsonable(one) for one in played]),
    )


def _of_side(turns: Turns, name: str) -> dict[Key, Estimate]:
    return _keyed([one for one in turns.measurements if one.candidate_id == name])


# --- telling ---------------------------------------------------------------------------------------------------


def document(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The pairs as plain values."""
    return {"kind": pairs[0].kind, "pairs": [_plain(pair) for pair in pairs]}


def _plain(pair: Pair) -> dict[str, Any]:
    chosen = pair.chosen
    return {
        "a": {"name": pair.names[0], "facts": dict(pair.facts[0])},
        "b": {"name": pair.names[1], "facts": dict(pair.facts[1])},
        "word": chosen.word if chosen else None,
        "metric": chosen.metric if chosen else None,
        "load": chosen.load if chosen else None,
        "ratio": to_jsonable(chosen.ratio) if chosen else None,
        "sentence": pair.sentence,
        "refused": pair.refused or None,
        "comparisons": [to_jsonable(one) for one in pair.comparisons],
        "metrics": [
            {
                "metric": metric,
                "load": load,
                "a": _estimate(pair, 0, metric, load),
                "b": _estimate(pair, 1, metric, load),
            }
            for metric, load in _keys(pair)
        ],
        "differences": [{"what": what, "a": one, "b": other} for what, one, other in pair.differences],
        "notes": list(pair.notes),
    }


def _keys(pair: Pair) -> list[Key]:
    """All metrics that are known of one of them, those without a load first, in the policy's order."""
    order = {name: place for place, name in enumerate(METRICS)}
    known = {*pair.metrics[0], *pair.metrics[1]}
    return sorted(known, key=lambda key: (key[1] or "", order.get(key[0], len(order)), key[0]))


def _estimate(pair: Pair, place: int, metric: str, load: str | None) -> Any:
    found = pair.metrics[place].get((metric, load))
    return None if found is None else to_jsonable(found)


def show(pairs: Sequence[Pair]) -> None:
    """Prints each pair: the verdict, what is known of both side by side, and what differs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for pair in pairs:
        console.print(pair.sentence, highlight=False, markup=False)
        table = Table("", "A", "B", "B / A", "")
        ratios = {(one.metric, one.load): one for one in pair.comparisons}
        for key in _keys(pair):
            one = ratios.get(key)
            told = (label(*key), *(numbers.text(known.get(key)) for known in pair.metrics))
            compared = ("", "") if one is None else (ratio_text(one), one.word)
            table.add_row(*map(Text, (*told, *compared)))
        console.print(table)
        differing = Table("what differs", "A", "B")
        for row in pair.differences:
            differing.add_row(*map(Text, row))
        console.print(differing if pair.differences else "Nothing that is known of them differs.")
        for note in pair.notes:
            console.print(note, highlight=False, markup=False)
