"""Watch heads while the model keeps its fused attention: no N x N tensor, no change of backend.

Statistics of attention rows are recomputed from q and k in blocks of rows, each at most `BLOCK` logits; what is kept is
one number per (head, row), or running sums per head.

Letters: L layers, B batch, H query heads, K kv heads, G = H/K, R watched rows, M keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from headwise.attach import Attachment, attach
from headwise.attach.hook import HeadCall
from headwise.attention.groups import Compensation, KVGroup, Queries, key_positions, query_heads, visible
from headwise.errors import AttachError

BLOCK = 1 << 22  # logits of one block of rows: 16 MiB in float32, whatever the length
ROW_STATISTICS = ("argmax", "entropy", "distance", "top_mass")
OUTPUT_STATISTICS = ("output", "norm")
KeyTest = Callable[[Tensor], Tensor]
PairTest = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Record:
    """What was seen. Rows are in the order in which the model computed them, over all forward passes.

    `rows[name]`: a list per layer of tensors (B, H, R) -> `table(name)` (L, B, H, R);
    `output`: a list per layer of (B, N, H, D); `norm_mean` (L, H): mean norm of each head's output over real tokens.
    """

    layers: int
    rows: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    outputs: list[list[Tensor]] = field(default_factory=list)
    norm_sum: list[Tensor | None] = field(default_factory=list)
    norm_count: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.outputs = [[] for _ in range(self.layers)]
        self.norm_sum = [None] * self.layers
        self.norm_count = [0.0] * self.layers

    def add(self, name: str, layer: int, values: Tensor) -> None:
        """Append values (B, H, R); they stay on their device until `table`, so that a decode step waits for nothing."""
        if name not in self.rows:
            self.rows[name] = [[] for _ in range(self.layers)]
        self.rows[name][layer].append(values)

    def table(self, name: str) -> Tensor:
        """(L, B, H, R) on the CPU of a row statistic: argmax (position of the key), entropy (nats), distance (tokens), mass names."""
        if name not in self.rows or not all(self.rows[name]):
            raise AttachError(f"nothing recorded under {name!r}; recorded: {sorted(self.rows)}, or no forward pass ran")
        return torch.stack([torch.cat(parts, dim=-1).cpu() for parts in self.rows[name]])

    def output(self, layer: int) -> Tensor:
        """Per-head outputs of a layer before the output projection, (B, N, H, D), all forward passes in a row."""
        if not self.outputs[layer]:
            raise AttachError(f"no output of layer {layer} was recorded: observe(..., 'output') and run the model")
        return torch.cat(self.outputs[layer], dim=1)

    @property
    def norm_mean(self) -> Tensor:
        """(L, H) mean L2 norm of the head outputs over real tokens."""
        rows = [s / n for s, n in zip(self.norm_sum, self.norm_count, strict=True) if s is not None]
        if len(rows) != self.layers:
            raise AttachError("no norms were recorded: observe(..., 'norm') and run the model")
        return torch.stack(rows)

    def clear(self) -> None:
        """Forget what was seen."""
        self.rows.clear()
        self.__post_init__()


class observe:  # noqa: N801 - used like a function
    """Context manager that records statistics of chosen rows for all heads; gives a `Record`.

    `statistics`: any of argmax, entropy, distance, top_mass (rows of the attention), output, norm (head outputs).
    `rows`: "all", "last", or positions of the queries (real tokens of the row, 0 = first); negative ones count columns
    from the end of each forward pass. `mass`: name -> test on key positions; records the probability mass
    on the keys for which the test is true. `pair_mass`: name -> test on (query positions, key positions), where the keys
    that count differ from query to query: the two broadcast against each other. Memory: 4 * B * H * R bytes per
    layer and statistic, and 16 MiB of scratch; "output" keeps 4 * B * N * H * D bytes a layer. Under tensor parallelism
    a rank records its own heads, H / ranks of them; the other tables are on the other ranks.

    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> with observe(model, "argmax", mass={"sink": lambda pos: pos == 0}) as record:
    ...     _ = model(torch.arange(12)[None])
    >>> record.table("argmax").shape == record.table("sink").shape
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *statistics: str,
        rows: str | Sequence[int] = "all",
        mass: Mapping[str, KeyTest] | None = None,
        pair_mass: Mapping[str, PairTest] | None = None,
        stack: str | None = None,
    ):
        known = ROW_STATISTICS + OUTPUT_STATISTICS
        unknown = [s for s in statistics if s not in known]
        if unknown or not (statistics or mass or pair_mass):
            raise AttachError(f"statistics {unknown or '()'}: choose from {known}, or give mass= or pair_mass=")
        if isinstance(rows, str) and rows not in ("all", "last"):
            raise AttachError(f"rows={rows!r}: use 'all', 'last' or a list of positions")
        if not isinstance(rows, str) and len(rows) and min(rows) < 0 <= max(rows):
            raise AttachError(f"rows={list(rows)}: positions from the start and negative ones from the end do not mix")
        self.model, self.statistics, self.rows, self.stack = model, statistics, rows, stack
        self.mass = {name: _of_key(test) for name, test in (mass or {}).items()} | dict(pair_mass or {})
        self.handle: Attachment | None = None

    def __enter__(self) -> Record:
        self.handle = attach(self.model, observers=[self._see], stack=self.stack)
        self.record = Record(self.handle.controller.stack.layers)
        return self.record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.handle is not None
        self.handle.detach()

    @torch.no_grad()
    def _see(self, call: HeadCall, out: Tensor) -> None:
        if "output" in self.statistics:
            self.record.outputs[call.layer].append(out.detach().clone())
        if "norm" in self.statistics:
            self._add_norm(call, out)
        if self.mass or any(s in ROW_STATISTICS for s in self.statistics):
            self._add_rows(call)

    def _add_norm(self, call: HeadCall, out: Tensor) -> None:
        norms = out.detach().float().norm(dim=-1)  # (B, N, H)
        real = call.real_tokens()
        if real is not None:
            norms = norms * real[..., None]
        count = float(norms.shape[0] * norms.shape[1] if real is None else real.sum())
        total = norms.sum(dim=(0, 1)).cpu()
        old = self.record.norm_sum[call.layer]
        self.record.norm_sum[call.layer] = total if old is None else old + total
        self.record.norm_count[call.layer] += count

    def _add_rows(self, call: HeadCall) -> None:
        index = self._row_index(call)
        if index is not None and index.numel() == 0:
            return
        for name, values in row_statistics(call, self.statistics, self.mass, index).items():
            self.record.add(name, call.layer, values)

    def _row_index(self, call: HeadCall) -> Tensor | None:
        """Query columns to watch (B, R); None = all of them."""
        B, N = call.q.shape[0], call.q.shape[2]
        if self.rows == "all":
            return None
        if self.rows == "last":
            return None if N == 1 else _last_columns(call)
        assert not isinstance(self.rows, str)
        if len(self.rows) and min(self.rows) < 0:
            columns = sorted(N + int(row) for row in self.rows)
            return torch.tensor([c for c in columns if c >= 0], dtype=torch.long, device=call.q.device).expand(B, -1)
        positions = call.positions().expand(B, -1)
        hits = torch.isin(positions, torch.as_tensor(list(self.rows), device=call.q.device))  # (B, N)
        counts = hits.sum(1)
        if int(counts.min()) != int(counts.max()):
            raise AttachError(
                "rows given by position fall on different columns counts per row of the batch; observe rows one by one"
            )
        return hits.nonzero()[:, 1].reshape(B, -1)


def _last_columns(call: HeadCall) -> Tensor:
    """Column of the newest real token of each row, (B, 1)."""
    B, N = call.q.shape[0], call.q.shape[2]
    columns, real = torch.arange(N, device=call.q.device).expand(B, -1), call.real_tokens()
    return (columns if real is None else columns.masked_fill(~real, 0)).max(dim=1, keepdim=True).values


def _of_key(test: KeyTest) -> PairTest:
    return lambda queries, keys: test(keys)


def row_statistics(
    call: HeadCall, statistics: Sequence[str], mass: Mapping[str, PairTest], index: Tensor | None
) -> dict[str, Tensor]:
    """Statistics (B, H, R) of the attention rows at query columns `index` (B, R), or of all rows."""
    call.need_expressible("observing attention rows")
    queries = call.queries()
    q = call.q if index is None else _rows_of(call.q, index)
    R = q.shape[2]
    groups = call.key_groups()
    keys = sum(g.k.shape[2] for g in groups)
    step = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * keys))
    if step >= R and index is None:
        return _block(call, groups, q, queries, statistics, mass)
    blocks = []
    for begin in range(0, R, step):
        end = min(begin + step, R)
        columns = None if index is None else index[:, begin:end]
        blocks.append(_block(call, groups, q[:, :, begin:end], _some(queries, begin, end, columns), statistics, mass))
    return {name: torch.cat([b[name] for b in blocks], dim=-1) for name in blocks[0]}


def _rows_of(q: Tensor, index: Tensor) -> Tensor:
    return q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))


@dataclass(frozen=True)
class _Picked(Queries):
    """Queries at chosen columns (B, R), instead of a run of columns."""

    columns: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        assert self.columns is not None
        return self.columns if self.start is None else self.columns - self.start[:, None]


def _some(queries: Queries, begin: int, end: int, index: Tensor | None) -> Queries:
    if index is None:
        return queries.rows(begin, end)
    mask = queries.mask
    if mask is not None:
        mask = mask.expand(index.shape[0], -1, -1, -1)
        mask = mask.gather(2, index[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
    return _Picked(index.shape[1], queries.offset, queries.start, mask, queries.causal, columns=index + queries.offset)


def _block(
    call: HeadCall,
    groups: Sequence[KVGroup],
    q: Tensor,
    queries: Queries,
    statistics: Sequence[str],
    mass: Mapping[str, PairTest],
) -> dict[str, Tensor]:
    """Statistics of a block of rows, over all groups of kv heads."""
    if len(groups) == 1:
        return _group_block(call, q, groups[0], queries, statistics, mass)
    G = q.shape[1] // sum(len(g.heads) for g in groups)
    parts: dict[str, list[Tensor]] = {}
    order: list[int] = []
    for group in groups:
        heads = query_heads(group.heads, G)
        order += heads
        for name, values in _group_block(call, q[:, heads], group, queries, statistics, mass).items():
            parts.setdefault(name, []).append(values)
    back = torch.tensor(order, device=q.device).argsort()
    return {name: torch.cat(values, dim=1)[:, back] for name, values in parts.items()}


def _group_block(
    call: HeadCall, q: Tensor, group: KVGroup, queries: Queries, statistics: Sequence[str], mass: Mapping[str, PairTest]
) -> dict[str, Tensor]:
    B, Hg, R, D = q.shape
    Kg, S = group.k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    q_rows = (q.to(wide) * call.scale).reshape(B, Kg, -1, D)
    logits = torch.matmul(q_rows, group.k.to(wide).mT).view(B, Kg, Hg // Kg, R, S)
    if not _sees_all(group, queries):
        logits = logits.masked_fill(~visible(group, queries)[:, :, None], -torch.inf)
    found: dict[str, Tensor] = {}
    if "argmax" in statistics:
        found["argmax"] = _positions_of_best(logits, group, queries)
    if mass or any(s in statistics for s in ("entropy", "distance", "top_mass")):
        extra = (
            None if group.compensation is None else _compensation_logits(q_rows, group.compensation, logits.shape[:-1])
        )
        k_pos = key_positions(group, queries)[:, :, None, None]  # (B, Kg or 1, 1, 1, S)
        found |= _probability_statistics(logits, extra, k_pos, queries, statistics, mass)
    return {name: values.reshape(B, Hg, R) for name, values in found.items()}


def _positions_of_best(logits: Tensor, group: KVGroup, queries: Queries) -> Tensor:
    """Position of each row's largest logit, (B, Kg, G, R)."""
    best = logits.argmax(-1)
    if group.positions is None and queries.start is None:  # slot t holds position t
        return best
    k_pos = key_positions(group, queries)[:, :, None, None]  # (B, Kg or 1, 1, 1, S)
    return k_pos.expand(logits.shape).gather(-1, best[..., None])[..., 0]


def _sees_all(group: KVGroup, queries: Queries) -> bool:
    """One unpadded query over everything before it: the usual decode step, for which no mask is built."""
    S = group.k.shape[2]
    if queries.count != 1 or queries.mask is not None or queries.start is not None or not queries.causal:
        return False
    in_order = group.positions is None and queries.offset + 1 == S
    whole = (group.complete and group.tail == 0) or (
        in_order and (group.pattern.keeps_all or group.pattern.kept(S) == S)
    )
    return whole and not isinstance(queries, _Picked)


def _compensation_logits(q_rows: Tensor, compensation: Compensation, shape: torch.Size) -> Tensor:
    """Logits of the compensation token, (B, Kg, G, R): it takes its share of the softmax, but has no position."""
    extra = q_rows @ compensation.k.to(q_rows.dtype)[..., None]  # (B, Kg, G·R, 1)
    return (extra + compensation.log_count.to(q_rows.dtype)[..., None, None]).reshape(shape)


def _probability_statistics(
    logits: Tensor,
    extra: Tensor | None,
    k_pos: Tensor,
    queries: Queries,
    statistics: Sequence[str],
    mass: Mapping[str, PairTest],
) -> dict[str, Tensor]:
    lse = torch.logsumexp(logits, dim=-1)
    lse = lse if extra is None else torch.logaddexp(lse, extra)
    lse = lse.masked_fill(torch.isneginf(lse), 0.0)  # a row that sees nothing has no mass anywhere
    probs = torch.exp(logits - lse[..., None])
    q_pos = queries.positions(logits.device)[:, None, None, :, None]  # (B or 1, 1, 1, R, 1)
    found: dict[str, Tensor] = {}
    if "entropy" in statistics:
        found["entropy"] = -torch.xlogy(probs, probs).sum(-1)
        if extra is not None:
            rest = torch.exp(extra - lse)
            found["entropy"] -= torch.xlogy(rest, rest)
    if "distance" in statistics:
        found["distance"] = (probs * (q_pos - k_pos)).sum(-1)
    if "top_mass" in statistics:
        found["top_mass"] = probs.max(-1).values
    for name, test in mass.items():
        found[name] = (probs * test(q_pos, k_pos).to(probs.dtype)).sum(-1)
    return found
