"""Small tables and bars for metadata, which the UI shows inline below 1,000 characters."""

from collections.abc import Mapping, Sequence

import dagster as dg

#: Length from which Dagster hides markdown behind a click.
INLINE_LIMIT = 1000


def cell(value: object) -> str:
    """A value as a short text that can't break a markdown table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    short = text if len(text) <= 40 else text[:37] + "..."
    return short.replace("\\", "\\\\").replace("|", "\\|")


def markdown_table(rows: Sequence[Mapping[str, object]]) -> dg.MarkdownMetadataValue:
    """Rows as a markdown table, cut before it is too long to be shown inline."""
    if not rows:
        return dg.MetadataValue.md("nothing")
    names = list(rows[0])
    lines = ["|".join(["", *map(cell, names), ""]), "|".join(["", *["-"] * len(names), ""])]
    for i, row in enumerate(rows):
        line = "|".join(["", *(cell(row[name]) for name in names), ""])
        if sum(map(len, lines)) + len(lines) + len(line) > INLINE_LIMIT - 40:
            return dg.MetadataValue.md("\n".join([*lines, "", f"and {len(rows) - i} more"]))
        lines.append(line)
    return dg.MetadataValue.md("\n".join(lines))


def share_bars(shares: Mapping[str, float]) -> dg.MarkdownMetadataValue:
    """Shares as a markdown table with bars of blocks; 20 blocks are everything."""
    return markdown_table(
        [
            {"domain": name, "share": f"{share:.3f}", "": "█" * round(20 * share)}
            for name, share in shares.items()
        ]
    )
