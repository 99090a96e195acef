"""What a stage draws from where, as a table for people: tokens, shares, and epochs over the whole lineage."""

from __future__ import annotations

from cpt.data.order import StageOrder


def share_table(order: StageOrder, num_slots: int) -> list[str]:
    """Lines of equal columns: a head, one line for each new source of the stage, one for replay if there is any.

    `num_slots`: windows of the stage. Epochs are told after the stage, and how many of them ancestors and earlier
    stages had read before it.
    """
    counts, length = order.counts(num_slots), order.sequence_length
    rows = [("source", "tokens", "share", "epochs", "before", "corpus")]
    for stream, (drawn_before, number) in zip(order.streams, counts[:-1], strict=False):
        before, an_epoch = stream.entry.num_consumed + drawn_before, stream.entry.num_windows
        epochs = [f"{windows / an_epoch:.2f}" for windows in (before + number, before)]
        rows.append((stream.name, f"{number * length:,}", _share(number, num_slots), *epochs, str(stream.corpus.path)))
    _, num_replayed = counts[-1]
    if num_replayed:
        size = order.num_replayable
        pool = ", ".join(name.removeprefix("replay/") for name in order.source_names[len(counts) - 1 :])
        told = f"{size * length:,} tokens of {pool}"
        share = _share(num_replayed, num_slots)
        rows.append(("replay", f"{num_replayed * length:,}", share, f"{num_replayed / size:.2f}", "", told))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{row[0]:<{widths[0]}}  {'  '.join(f'{cell:>{w}}' for cell, w in zip(row[1:5], widths[1:5], strict=True))}"
        f"  {row[5]}"
        for row in rows
    ]


def _share(number: int, num_slots: int) -> str:
    return f"{number / num_slots:.1%}" if num_slots else "-"
