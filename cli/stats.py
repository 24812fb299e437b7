"""`llmcache stats`: contents of a store, hits, and seconds saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from llmcache.banks.break_even import Profile
from llmcache.banks.counters import Counters, layer_counters
from llmcache.cli.shared import options
from llmcache.cli.shared import output as printing
from llmcache.config import CacheConfig
from llmcache.indexes.format.manifest import BankFacts
from llmcache.indexes.store import Store
from llmcache.near.status import NearReport
from llmcache.report.statistics import BankStatistics, statistics


def stats(
    store: options.StoreArgument,
    key_file: options.KeyFile = None,
    key_variable: options.KeyVariable = None,
    allow_untrusted: options.AllowUntrusted = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also measure for each bank whether loading beats computing on this machine."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Show the banks of a store, how documents were answered, and the time saved."""
    opened = Store.open(store, **options.Access(None, key_file, key_variable, allow_untrusted).of_store())
    try:
        found = statistics(opened, Counters())
        profiles = _profiles(opened, found.banks) if profile else {}
    finally:
        opened.close()
    if json:
        shown = {name: found.as_dict()[name] for name in ("generation", "lifetime", "banks", "near")}
        measured = {name: {**asdict(one), "pays": one.pays} for name, one in profiles.items()}
        printing.as_json({**shown, **({"profile": measured} if profile else {})})
        return
    life = found.lifetime
    asked = life["documents"]
    hits = 1 - life["misses"] / asked if asked else 0.0
    printing.table(
        ["namespace", "layer", "entries", "numbers", "payload", "on disk", "index"],
        [
            [one.namespace, one.layer, one.entries, f"{one.dtype}[{one.width}]",
             printing.size(one.payload_bytes), printing.size(one.bytes), one.index]
            for one in found.banks
        ],
    )  # fmt: skip
    if layers := layer_counters(life):
        printing.table(
            ["layer", "rows looked up", "hits", "near", "look-up s", "load s", "s saved"],
            [
                [name, int(one["asked"]), int(one["hits"]), int(one["near"]), one["look_up_seconds"],
                 one["load_seconds"], one["saved_seconds"]]
                for name, one in layers.items()
            ],
        )  # fmt: skip
    for one in found.near:
        _near(one)
    if profiles:
        printing.table(
            ["bank", "entries probed", "ms to compute", "ms to load", "MiB/s", "reuse"],
            [
                [name, one.entries, f"{1e3 * one.compute:.3g}", f"{1e3 * (one.look_up + one.load):.3g}",
                 f"{1 / max(one.load_per_byte, 1e-12) / (1 << 20):,.0f}", "pays" if one.pays else "costs more"]
                for name, one in profiles.items()
            ],
            title="recorded seconds of the model against loading measured now",
        )  # fmt: skip
    printing.facts(
        [
            ("documents requested", int(asked)),
            ("exact by text", int(life["exact_text"])),
            ("exact by tokens", int(life["exact_tokens"])),
            ("repeats within a call", int(life["repeats"])),
            ("near", int(life["near"])),
            ("computed", int(life["misses"])),
            ("hit rate", f"{100 * hits:.1f} %"),
            ("not looked up, loading takes longer", int(life.get("left_alone", 0))),
            *_of_decoders(life),
            ("not stored", int(life["not_stored"])),
            ("at the model's maximum length", int(life.get("at_limit", 0))),
            ("damaged rows", int(life["damaged"])),
            ("exact hits recomputed as a check", _exact_audits(life)),
            ("model seconds", life["model_seconds"]),
            ("cache seconds", life["overhead_seconds"]),
            ("seconds saved", life["saved_seconds"]),
            ("net", _net(life["saved_seconds"] - life["overhead_seconds"], asked or life.get("answers_stored", 0))),
        ]
    )


def _of_decoders(life: Mapping[str, float]) -> list[tuple[str, int]]:
    """Return the counts of language models; none for a store that no language model has used."""
    prompts, answers = (int(life.get(name, 0)) for name in ("prefix.prompts", "answers_stored"))
    if not prompts and not answers:
        return []
    return [
        ("answers and scores from the store", answers),
        ("prompts computed", prompts),
        ("their tokens", int(life.get("prefix.tokens", 0))),
        ("of these computed", int(life.get("prefix.computed", 0))),
    ]


def _profiles(store: Store, banks: Sequence[BankStatistics]) -> dict[str, Profile]:
    """Profile every bank of activations that has entries, by namespace and name."""
    from llmcache.banks.payoff import profiled

    choice = CacheConfig().near
    return {
        f"{one.namespace} {one.layer}": profiled(store.bank(one.namespace, one.layer, _no_new_bank, choice))
        for one in banks
        if one.entries and not one.layer.startswith(("fitted", "distilled-"))
    }


def _no_new_bank() -> BankFacts:
    raise AssertionError("only existing banks are profiled")


def _near(one: NearReport) -> None:
    typer.echo(f"near reuse of {one.namespace}, {one.bank}: {one.state}{one.why and f' ({one.why})'}")
    printing.facts(
        [
            ("drift of", one.drift),
            ("budget, of all results", f"{one.budget:.3%}, calibrated bound {one.bound:.3%}"),
            ("budget, of near hits", f"{one.budget_of_hits:.2%}, calibrated bound {one.bound_of_hits:.2%}"),
            ("documents looked up", f"{one.asked:,}, of which near {one.hits:,}"),
            ("audits", f"{one.audits:,}, mean drift {one.audited_drift:.2%}"),
            (
                "seconds saved",
                f"{one.saved:.3g}, less look-up {one.look_up:.3g} and audits {one.audit:.3g}: {one.net:.3g}",
            ),
        ]
    )


def _exact_audits(life: Mapping[str, float]) -> str:
    """Summarise the audits of exact hits over all openings: count, seconds, result."""
    mismatches = int(life["exact_mismatches"])
    result = "no difference beyond rounding" if not mismatches else f"DIFFERENCES in {mismatches:,} openings"
    return (
        f"{int(life['exact_audits']):,} in {life['exact_audit_seconds']:.3g} s, {result} (at most "
        f"{life['exact_audit_largest']:.2g})"
    )


def _net(seconds: float, asked: float) -> str:
    if not asked:
        return "no documents yet"
    return (
        f"{seconds:.3g} seconds saved"
        if seconds >= 0
        else f"{-seconds:.3g} seconds lost: this store costs more than it saves"
    )
