"""Triton's kernels for causal attention within documents, forward and backward.

One program of `forward` and of `grad_queries` has a block of queries of one head and walks over keys; one of
`grad_keys_values` has a block of keys of one key head and walks over the queries of all heads that share it. The walk
begins and ends where documents do, and only blocks on the diagonal and on the borders of documents are masked:

    keys   first ... last ........................ start ... stop     first, last: where the documents of the block's
           <-- masked --> <------- whole -------> <-- masked -->      first and last query begin

Whoever writes a block has it alone: no atomics, and the same bits every time.

B windows, S positions, H query heads, G key and value heads, K head width. Rows are positions, columns entries of a
head. x_window, x_row, x_head: how many entries lie between neighbours of tensor x; columns are neighbours in memory.
What is written lies as [B, S, heads, K]; logsums, the logarithm of base 2 of the sum of 2^score, and deltas, the sum of
output times gradient, as [B, H, S] in fp32.
Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691 (FlashAttention 1 and 2).
"""

from __future__ import annotations

from cpt_kernels.language import jit, tl


@jit
def _load(base, start, row, stop, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
          IS_BOUNDED: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """[ROWS, COLUMNS] from row `start` on; zeros from column WIDTH and, if bounded, from row `stop` on."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    # 64 bits for what grows with the window: in 2^18 positions of 8192 entries 32 would overflow.
    tile = base + tl.cast(start, tl.int64) * row + (rows[:, None] * row + columns[None, :])
    if IS_BOUNDED:
        block = tl.load(tile, mask=(start + rows < stop)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH != COLUMNS:
        block = tl.load(tile, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        block = tl.load(tile)
    return block.to(tl.float32) if WIDEN else block


@jit
def _store(base, start, row, stop, block, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """What `_load` reads, rounded to the type of the tensor."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    tile = base + tl.cast(start, tl.int64) * row + (rows[:, None] * row + columns[None, :])
    is_there = (start + rows < stop)[:, None] & (columns < WIDTH)[None, :]
    tl.store(tile, block.to(base.dtype.element_ty), mask=is_there)


@jit
def _walk(first, last, start, stop, STEP: tl.constexpr):
    """(masked, whole, masked) blocks of STEP on the way from `first` to `stop`; those whole lie in [last, start)."""
    num_before = tl.cdiv(last - first, STEP)
    whole = first + num_before * STEP
    num_whole = tl.maximum(start - whole, 0) // STEP
    num_after = tl.cdiv(tl.maximum(stop - whole - num_whole * STEP, 0), STEP)
    return num_before, num_whole, num_after


@jit
def _begins_of(begins, window, start, positions, HAS_DOCUMENTS: tl.constexpr, ROWS: tl.constexpr):
    """Where the documents of a block's queries begin: [ROWS], that of the first query and that of the last one."""
    if HAS_DOCUMENTS:
        base = begins + tl.cast(window, tl.int64) * positions
        of_rows = tl.load(base + tl.minimum(start + tl.arange(0, ROWS), positions - 1))
        first = tl.load(base + start)
        last = tl.load(base + tl.minimum(start + ROWS, positions) - 1)
    else:
        of_rows = tl.zeros([ROWS], tl.int32)
        first = start * 0
        last = start * 0
    return of_rows, first, last


@jit
def _absorb(queries, keys, values, rows, places, begins, mixed, peaks, totals, scale, IS_MASKED: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """One more block of keys and values in the weighted mean of each query. `peaks`: the highest scores so far."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [rows, places]
    if IS_MASKED:
        is_visible = (places[None, :] <= rows[:, None]) & (places[None, :] >= begins[:, None])
        scores = tl.where(is_visible, scores, float("-inf"))
    new_peaks = tl.maximum(peaks, tl.max(scores, 1) * scale)
    # A row that has seen nothing yet has the peak -inf, which must not be taken from itself.
    shift = tl.where(new_peaks == float("-inf"), 0.0, new_peaks) if IS_MASKED else new_peaks
    weights = tl.exp2(scores * scale - shift[:, None])
    fade = tl.exp2(peaks - shift)
    totals = totals * fade + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * fade[:, None], input_precision=PRECISION)
    return mixed, new_peaks, totals


@jit
def _add_to_queries(asking, wanted, logsum, delta, asked, given, rows, places, begins, sums, scale,
                    IS_MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What one more block of keys and values adds to the gradient of each query."""
    scores = tl.dot(asking, tl.trans(asked), input_precision=PRECISION)  # [rows, places]
    weights = tl.exp2(scores * scale - logsum[:, None])
    slopes = weights * (tl.dot(wanted, tl.trans(given), input_precision=PRECISION) - delta[:, None])
    if IS_MASKED:
        is_visible = (places[None, :] <= rows[:, None]) & (places[None, :] >= begins[:, None])
        slopes = tl.where(is_visible, slopes, 0.0)
    return tl.dot(slopes.to(asked.dtype), asked, sums, input_precision=PRECISION)


@jit
def _add_to_keys_values(asked, given, asking, wanted, logsum, delta, places, rows, ends, key_sums, value_sums, scale,
                        IS_MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What one more block of queries adds to the gradients of each key and value."""
    # With a row for each key: what is summed over queries needs no turning round.
    scores = tl.dot(asked, tl.trans(asking), input_precision=PRECISION)  # [places, rows]
    weights = tl.exp2(scores * scale - logsum[None, :])
    if IS_MASKED:
        is_visible = (places[:, None] <= rows[None, :]) & (rows[None, :] < ends[:, None])
        weights = tl.where(is_visible, weights, 0.0)
    value_sums = tl.dot(weights.to(wanted.dtype), wanted, value_sums, input_precision=PRECISION)
    slopes = weights * (tl.dot(given, tl.trans(wanted), input_precision=PRECISION) - delta[None, :])
    key_sums = tl.dot(slopes.to(asking.dtype), asking, key_sums, input_precision=PRECISION)
    return key_sums, value_sums


@jit
def forward(
    queries, keys, values, begins, mixed, logsums,
    queries_window, queries_row, queries_head, keys_window, keys_row, keys_head, values_window, values_row, values_head,
    positions, heads, repeats, scale,
    HAS_DOCUMENTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """mixed [B, S, H, K] and logsums [B, H, S]. scale: log2(e) / sqrt(K). repeats: H / G."""
    num_blocks = tl.cdiv(positions, QUERIES)
    window_head = tl.program_id(0) // num_blocks
    window = tl.cast(window_head // heads, tl.int64)
    head = window_head % heads
    # The last blocks walk furthest: they go first.
    start = (num_blocks - 1 - tl.program_id(0) % num_blocks) * QUERIES
    rows = start + tl.arange(0, QUERIES)
    of_rows, first, last = _begins_of(begins, window, start, positions, HAS_DOCUMENTS, QUERIES)
    num_before, num_whole, num_after = _walk(first, last, start, tl.minimum(start + QUERIES, positions), KEYS)

    queries += window * queries_window + head * queries_head
    keys += window * keys_window + (head // repeats) * keys_head
    values += window * values_window + (head // repeats) * values_head
    asking = _load(queries, start, queries_row, positions, QUERIES, WIDTH, COLUMNS, True, WIDEN)
    sums = tl.zeros([QUERIES, COLUMNS], tl.float32)
    peaks = tl.full([QUERIES], float("-inf"), tl.float32)
    totals = tl.zeros([QUERIES], tl.float32)
    for step in range(num_whole):
        place = first + (num_before + step) * KEYS
        asked = _load(keys, place, keys_row, positions, KEYS, WIDTH, COLUMNS, False, WIDEN)
        given = _load(values, place, values_row, positions, KEYS, WIDTH, COLUMNS, False, WIDEN)
        places = place + tl.arange(0, KEYS)
        sums, peaks, totals = _absorb(
            asking, asked, given, rows, places, of_rows, sums, peaks, totals, scale, False, PRECISION
        )
    for step in range(num_before + num_after):
        place = first + (step + tl.where(step < num_before, 0, num_whole)) * KEYS
        asked = _load(keys, place, keys_row, positions, KEYS, WIDTH, COLUMNS, True, WIDEN)
        given = _load(values, place, values_row, positions, KEYS, WIDTH, COLUMNS, True, WIDEN)
        places = place + tl.arange(0, KEYS)
        sums, peaks, totals = _absorb(
            asking, asked, given, rows, places, of_rows, sums, peaks, totals, scale, True, PRECISION
        )

    mixed += (window * positions * heads + head) * WIDTH
    _store(mixed, start, heads * WIDTH, positions, sums / totals[:, None], QUERIES, WIDTH, COLUMNS)
    logsums += (window * heads + head) * positions
    tl.store(logsums + rows, peaks + tl.log2(totals), mask=rows < positions)


@jit
def grad_queries(
    queries, keys, values, begins, mixed, logsums, grads, deltas, grad,
    queries_window, queries_row, queries_head, keys_window, keys_row, keys_head, values_window, values_row, values_head,
    grads_window, grads_row, grads_head,
    positions, heads, repeats, scale, grad_scale,
    HAS_DOCUMENTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad [B, S, H, K] of the queries, and deltas [B, H, S] for `grad_keys_values`.

    grads [B, S, H, K]: those of `mixed`. grad_scale: 1 / sqrt(K).
    """
    num_blocks = tl.cdiv(positions, QUERIES)
    window_head = tl.program_id(0) // num_blocks
    window = tl.cast(window_head // heads, tl.int64)
    head = window_head % heads
    start = (num_blocks - 1 - tl.program_id(0) % num_blocks) * QUERIES
    rows = start + tl.arange(0, QUERIES)
    of_rows, first, last = _begins_of(begins, window, start, positions, HAS_DOCUMENTS, QUERIES)
    num_before, num_whole, num_after = _walk(first, last, start, tl.minimum(start + QUERIES, positions), KEYS)

    own = (window * positions * heads + head) * WIDTH
    queries += window * queries_window + head * queries_head
    grads += window * grads_window + head * grads_head
    keys += window * keys_window + (head // repeats) * keys_head
    values += window * values_window + (head // repeats) * values_head
    asking = _load(queries, start, queries_row, positions, QUERIES, WIDTH, COLUMNS, True, WIDEN)
    wanted = _load(grads, start, grads_row, positions, QUERIES, WIDTH, COLUMNS, True, WIDEN)
    had = _load(mixed + own, start, heads * WIDTH, positions, QUERIES, WIDTH, COLUMNS, True, WIDEN)
    of_heads = (window * heads + head) * positions
    delta = tl.sum(had.to(tl.float32) * wanted.to(tl.float32), 1)
    tl.store(deltas + of_heads + rows, delta, mask=rows < positions)
    logsum = tl.load(logsums + of_heads + rows, mask=rows < positions, other=0.0)
    sums = tl.zeros([QUERIES, COLUMNS], tl.float32)
    for step in range(num_whole):
        place = first + (num_before + step) * KEYS
        asked = _load(keys, place, keys_row, positions, KEYS, WIDTH, COLUMNS, False, WIDEN)
        given = _load(values, place, values_row, positions, KEYS, WIDTH, COLUMNS, False, WIDEN)
        places = place + tl.arange(0, KEYS)
        sums = _add_to_queries(
            asking, wanted, logsum, delta, asked, given, rows, places, of_rows, sums, scale, False, PRECISION
        )
    for step in range(num_before + num_after):
        place = first + (step + tl.where(step < num_before, 0, num_whole)) * KEYS
        asked = _load(keys, place, keys_row, positions, KEYS, WIDTH, COLUMNS, True, WIDEN)
        given = _load(values, place, values_row, positions, KEYS, WIDTH, COLUMNS, True, WIDEN)
        places = place + tl.arange(0, KEYS)
        sums = _add_to_queries(
            asking, wanted, logsum, delta, asked, given, rows, places, of_rows, sums, scale, True, PRECISION
        )
    _store(grad + own, start, heads * WIDTH, positions, sums * grad_scale, QUERIES, WIDTH, COLUMNS)


@jit
def grad_keys_values(
    queries, keys, values, ends, logsums, grads, deltas, grad_keys, grad_values,
    queries_window, queries_row, queries_head, keys_window, keys_row, keys_head, values_window, values_row, values_head,
    grads_window, grads_row, grads_head,
    positions, groups, repeats, scale, grad_scale,
    HAS_DOCUMENTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """grad_keys and grad_values [B, S, G, K], each summed over the heads that share a key. groups: G."""
    num_blocks = tl.cdiv(positions, KEYS)
    window_group = tl.program_id(0) // num_blocks
    window = tl.cast(window_group // groups, tl.int64)
    group = window_group % groups
    # The first keys are seen by the most queries, and go first as it is.
    start = tl.program_id(0) % num_blocks * KEYS
    places = start + tl.arange(0, KEYS)
    if HAS_DOCUMENTS:
        base = ends + window * positions
        of_places = tl.load(base + tl.minimum(places, positions - 1))
        end_of_first = tl.load(base + start)
        end_of_last = tl.load(base + tl.minimum(start + KEYS, positions) - 1)
    else:
        of_places = tl.zeros([KEYS], tl.int32) + positions
        end_of_first = start * 0 + positions
        end_of_last = start * 0 + positions
    num_before, num_whole, num_after = _walk(start, start + KEYS - 1, end_of_first, end_of_last, QUERIES)

    keys += window * keys_window + group * keys_head
    values += window * values_window + group * values_head
    asked = _load(keys, start, keys_row, positions, KEYS, WIDTH, COLUMNS, True, WIDEN)
    given = _load(values, start, values_row, positions, KEYS, WIDTH, COLUMNS, True, WIDEN)
    key_sums = tl.zeros([KEYS, COLUMNS], tl.float32)
    value_sums = tl.zeros([KEYS, COLUMNS], tl.float32)
    for repeat in range(repeats):
        head = group * repeats + repeat
        of_head = queries + window * queries_window + head * queries_head
        grads_of_head = grads + window * grads_window + head * grads_head
        numbers = (window * groups * repeats + head) * positions
        for step in range(num_whole):
            row = start + (num_before + step) * QUERIES
            rows = row + tl.arange(0, QUERIES)
            asking = _load(of_head, row, queries_row, positions, QUERIES, WIDTH, COLUMNS, False, WIDEN)
            wanted = _load(grads_of_head, row, grads_row, positions, QUERIES, WIDTH, COLUMNS, False, WIDEN)
            logsum = tl.load(logsums + numbers + rows)
            delta = tl.load(deltas + numbers + rows)
            key_sums, value_sums = _add_to_keys_values(
                asked, given, asking, wanted, logsum, delta, places, rows, of_places, key_sums, value_sums, scale,
                False, PRECISION,
            )  # fmt: skip
        for step in range(num_before + num_after):
            row = start + (step + tl.where(step < num_before, 0, num_whole)) * QUERIES
            rows = row + tl.arange(0, QUERIES)
            asking = _load(of_head, row, queries_row, positions, QUERIES, WIDTH, COLUMNS, True, WIDEN)
            wanted = _load(grads_of_head, row, grads_row, positions, QUERIES, WIDTH, COLUMNS, True, WIDEN)
            logsum = tl.load(logsums + numbers + rows, mask=rows < positions, other=0.0)
            delta = tl.load(deltas + numbers + rows, mask=rows < positions, other=0.0)
            key_sums, value_sums = _add_to_keys_values(
                asked, given, asking, wanted, logsum, delta, places, rows, of_places, key_sums, value_sums, scale,
                True, PRECISION,
            )  # fmt: skip
    own = (window * positions * groups + group) * WIDTH
    row_width = groups * WIDTH
    _store(grad_keys + own, start, row_width, positions, key_sums * grad_scale, KEYS, WIDTH, COLUMNS)
    _store(grad_values + own, start, row_width, positions, value_sums, KEYS, WIDTH, COLUMNS)
