"""The least work of each op's passes (bytes of HBM or memory traffic, FLOPs, transcendentals), in formulas."""

from benchmarks.measure import Work


def linear_scan(elements: int, x_size: int, decay_size: int) -> tuple[Work, Work]:
    """Forward reads x and log_decay, writes y; backward reads dy, log_decay, y, writes dx and dlog_decay."""
    forward = Work(bytes=elements * (2 * x_size + decay_size), transcendentals=elements)
    return forward, Work(bytes=elements * (3 * x_size + 2 * decay_size), transcendentals=elements)


def gated_linear_attention(
    tokens: int, keys: int, values: int, chunk: int, size: int, decay_size: int
) -> tuple[Work, Work]:
    """`tokens` counts those of every head. Chunks of full tiles: q k^T, scores v, q S and the state's update."""
    products = 2 * tokens * (chunk * keys + chunk * values + 2 * keys * values)
    tensors = tokens * (size * (2 * keys + 2 * values) + decay_size * keys)  # q, k, v, o and log_decay
    backward = tokens * (size * (4 * keys + 3 * values) + 2 * decay_size * keys)
    return (
        Work(bytes=tensors, flops=products, transcendentals=tokens * keys),
        Work(bytes=backward, flops=2.5 * products, transcendentals=tokens * keys),
    )


def gated_delta_rule(tokens: int, keys: int, values: int, chunk: int, size: int, key_size: int) -> tuple[Work, Work]:
    """`tokens` counts those of every value head, each with keys of its own. Full tiles: k k^T, q k^T, the inverse
    (14/3 C^2), and the products with values and states."""
    ck, cv, kv = chunk * keys, chunk * values, keys * values
    forward = tokens * (2 * (2 * ck + 2 * cv + 3 * kv) + 14 / 3 * chunk**2)
    return (
        Work(bytes=tokens * (2 * key_size * keys + 2 * size * values + 8), flops=forward),
        Work(
            bytes=tokens * (4 * key_size * keys + 3 * size * values + 16),
            flops=tokens * 2 * (9 * ck + 5 * cv + 8 * kv),
        ),
    )


def diagonal_lstm(elements: int, size: int) -> tuple[Work, Work]:
    """Forward reads three gates, writes h and keeps the cell; backward reads gates, h, cell and dh, writes dgates."""
    return (
        Work(bytes=elements * 5 * size, transcendentals=4 * elements),
        Work(bytes=elements * 9 * size, transcendentals=4 * elements),
    )


def diagonal_gru(elements: int, size: int) -> tuple[Work, Work]:
    """Forward reads three gates and writes h; backward reads gates, h and dh, writes dgates."""
    return (
        Work(bytes=elements * 4 * size, transcendentals=3 * elements),
        Work(bytes=elements * 8 * size, transcendentals=3 * elements),
    )


def attention(pairs: int, tokens: int, groups: int, heads: int, width: int, size: int) -> tuple[Work, Work]:
    """`pairs` of a query and a key that it sees, of one head. Two products and an exp a pair; backward forms the scores
    again and has four products more. Each of q, k, v, o and of their gradients once."""
    numbers = tokens * width * (2 * heads + 2 * groups)
    return (
        Work(bytes=size * numbers, flops=4.0 * pairs * heads * width, transcendentals=pairs * heads),
        Work(bytes=2 * size * numbers, flops=10.0 * pairs * heads * width, transcendentals=pairs * heads),
    )


def elementwise(elements: int, size: int) -> tuple[Work, Work]:
    """One read and one write; backward reads x and dy and writes dx: convolution and norms."""
    return Work(bytes=2 * elements * size), Work(bytes=3 * elements * size)


def linear_cross_entropy(tokens: int, width: int, vocabulary: int) -> tuple[Work, Work]:
    """The logits' product, and its two gradients beside forming it again."""
    product = 2.0 * tokens * width * vocabulary
    return Work(flops=product, transcendentals=tokens * vocabulary), Work(
        flops=3 * product, transcendentals=tokens * vocabulary
    )
