"""The table of README.md: five jobs, each with its speed-up and the command that measures it."""

from __future__ import annotations

from llmcache.bench.competitors.names import OURS
from tests.readme_figures.markdown import by, prose, table, times
from tests.readme_figures.passages import Passages, Records


def summary(records: Records) -> str:
    """Return the table of README.md: five jobs, each with its speed-up and the command that measures it."""

    def ratio(name: str) -> str:
        return times(by(records[name]["rows"], name=OURS)["ratio"])

    reused = records["reuse-banking77-no-guard"]["rows"][0]
    prompts = by(records["decoding-gpt2-small"]["squad"], name="known paragraphs")
    lost = f"{100 * reused['accuracy_drop']:.2f} points of accuracy lost, 0.5 allowed"
    return "\n\n".join(
        [
            table(
                ["job", "times the model alone", "measured by"],
                [
                    ["new bank queries, stored durably", ratio("miss-banking77"), "`bench run miss-banking77`"],
                    ["the same, stored before", ratio("hit-banking77"), "`bench run hit-banking77`"],
                    ["paragraphs of 155 tokens, stored before", ratio("hit-squad"), "`bench run hit-squad`"],
                    [f"new queries by near matches ({lost})", f"{reused['ratio']:.1f}", "`bench reuse --no-guard`"],
                    [
                        "new questions about stored paragraphs, until the first token",
                        f"{prompts['times_as_fast_median']:.1f}",
                        "`bench decoding`",
                    ],
                ],
            ),
            prose(
                """Medians of recorded runs on two cores of an x86 server; all commands begin with `llmcache`. Each
                record in `data/bench/` names its commit; decoders were measured at earlier commits.
                "The model alone" is `SentenceTransformer.encode`, or transformers with its own key/value cache.
                Conditions, rivals and all other measurements are in [docs/benchmarks.md](docs/benchmarks.md)."""
            ),
        ]
    )


SUMMARY: Passages = (
    (
        ("miss-banking77", "hit-banking77", "hit-squad", "reuse-banking77-no-guard", "decoding-gpt2-small"),
        summary,
    ),
)
"""The passages of README.md."""
