"""LongHeads (Lu et al. 2024, arXiv 2402.10685): every query reads its own few chunks, at positions within the trained length."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from headwise import storage
from headwise.addresses import Fingerprint, read_fingerprint
from headwise.attach import HeadCall, Stack, find_stack, fingerprint
from headwise.attach.controller import sliding_window
from headwise.attention import attention
from headwise.budget._longheads import Shape, attend, select
from headwise.budget._longheads_rotary import Rotation, rotation_of
from headwise.budget._longheads_state import ChunkLayer, Chunks
from headwise.checks import shown, whole
from headwise.errors import AttachError, CacheError, PlanError
from headwise.plan import HeadPlan
from headwise.registry import register
from headwise.storage import StrPath

if TYPE_CHECKING:
    from transformers import PreTrainedModel

By = Literal["group", "head"]
KIND = "long-heads"
TILE = 4096  # queries that are selected for and attended at a time


@register("budget", "longheads", paper="15")
def longheads(
    model: PreTrainedModel,
    *,
    chunk: int = 256,
    window: int | None = None,
    start: int | None = None,
    select_by: By = "group",
    reference_compat: bool = False,
) -> LongHeads:
    """Long texts within the trained length: each query reads k chunks, whose keys it meets at positions below the window (LongHeads).

    Queries in front of `start` attend as always. Behind it, a query at position t in chunk C = t // w reads chunk 0, chunks C - 1 and C,
    and of the others the k - 3 = window / chunk - 3 with the largest q · R_c, where q is the query without position and

        O = softmax(q~ k~ᵀ/√d) v within the chunk, not causal;  m = mean of O;  R_c = softmax(m k~ᵀ/√d) k~      (~: positions 0..w-1)

    The j-th key of the chosen chunks, in order, gets position j, the query its own slot (k - 1) · w + t mod w, so no distance is longer
    than the window. **No memory is freed**: all keys and values are kept; what falls is the work of a query, from t to k · w keys.

    Attach what comes back: `headwise.attach(model, transforms=[headwise.budget.longheads(model)])`.

    chunk: w, tokens of a chunk; it divides the window.
    window: positions that a query may use, at most the trained length; by default the largest multiple of the chunk below the model's.
    start: first position whose query selects; by default the window. At or below it, texts are read densely, bit for bit.
    select_by: "group" lets the query heads of a kv head select together, by the sum of their scores; "head" each for itself.
    reference_compat: leave a query's own key out in prefill, as the published code does.

    Raises AttachError for a model without RoPE of fixed frequencies, with sliding windows, or bidirectional; PlanError for a window
    that the chunk does not divide, or fewer than 4 chunks.

    >>> from headwise.attach import attach
    >>> from headwise.hub import load_model
    >>> model, _ = load_model("tiny-random-llama")
    >>> far = longheads(model, chunk=8, window=32)
    >>> print(far)
    LongHeads: 4 chunks of 8 tokens a query, behind position 32
    >>> with attach(model, transforms=[far]):
    ...     model(torch.arange(200)[None]).logits.shape
    torch.Size([1, 200, 320])
    """
    stack = find_stack(model)
    _need_reachable(stack)
    window = _window(stack, chunk, window)
    start = window if start is None else whole("start", start, 1, PlanError)
    _warn_beyond(stack, window=window, start=start)
    if select_by not in get_args(By):
        raise PlanError(f"select_by is {shown(select_by)}; it must be 'group' or 'head'")
    shape = (stack.heads, stack.kv_heads, stack.head_dim, stack.layers)
    made = rotation_of(stack), fingerprint(model), shape
    return LongHeads(chunk, window, start, select_by, reference_compat, *made)


def _need_reachable(stack: Stack) -> None:
    """Every layer must read everything before it, from keys that are whole."""
    if not stack.causal:
        raise AttachError(f"LongHeads needs causal attention; stack {stack.pattern} is bidirectional")
    if any(sliding_window(module) for module in stack.modules):
        raise AttachError(
            "this model has layers with sliding windows of their own, which never read far: nothing to select"
        )
    if getattr(stack.config, "kv_lora_rank", None):
        raise AttachError("this model caches one latent for all heads (MLA), whose keys are rotated in part only")


def _window(stack: Stack, chunk: int, window: int | None) -> int:
    """The window in tokens: a multiple of the chunk, of four chunks or more."""
    whole("chunk", chunk, 2, PlanError)
    context = getattr(stack.config, "max_position_embeddings", None)
    if window is None:
        if context is None:
            raise PlanError(
                "window=None needs a config with max_position_embeddings: say how long the model was trained"
            )
        window = context // chunk * chunk
    whole("window", window, 1, PlanError)
    if window % chunk or window < 4 * chunk:
        raise PlanError(
            f"window is {window} and chunk {chunk}: the window is a multiple of the chunk, four chunks or more "
            "(the first, the last two, and one to choose)"
        )
    return window


def _warn_beyond(stack: Stack, **lengths: int) -> None:
    context = getattr(stack.config, "max_position_embeddings", None)
    for name, value in lengths.items():
        if context is not None and value > context:
            warnings.warn(f"{name} is {value}, the model was trained for {context} positions", stacklevel=3)


@dataclass(frozen=True)
class LongHeads:
    """A transform for `attach`: see `longheads`, which makes it. It remembers nothing; a text's state is in its cache."""

    own_attention: ClassVar[bool] = True  # it makes the layer's attention anew: other transforms act on what it gives

    chunk: int
    window: int
    start: int
    select_by: By
    reference_compat: bool
    rotation: Rotation = field(repr=False, compare=False)
    fingerprint: Fingerprint = field(repr=False)
    model: tuple[int, int, int, int] = field(repr=False)  # query heads, kv heads, head dim, layers

    @property
    def chunks(self) -> int:
        """k, the chunks that a query reads."""
        return self.window // self.chunk

    def ratio(self, n: int) -> float:
        """Share of the cache that is kept, as `HeadPlan.ratio`: all of it. Chunk keys come on top, one a kv head and chunk."""
        return 1.0

    def bytes(self, n: int, *, head_dim: int, dtype: torch.dtype) -> Tensor:
        """(L,) int64: bytes of a row at n tokens, as `HeadPlan.bytes`: all keys and values, and on top the chunk keys (float32, one a kv
        head and finished chunk) and the queries of at most two chunks."""
        heads, kv_heads, _, layers = self.model
        own = kv_heads * (n // self.chunk) * 4 + heads * min(n, 2 * self.chunk) * dtype.itemsize
        return HeadPlan.full(layers, kv_heads).bytes(n, head_dim=head_dim, dtype=dtype) + own * head_dim

    def save(self, path: StrPath) -> None:
        """Write JSON; the rotation is the model's and is asked for again by `load`."""
        options = {name: getattr(self, name) for name in ("chunk", "window", "start", "select_by", "reference_compat")}
        storage.write_json(path, KIND, 1, {**options, "fingerprint": self.fingerprint.to_dict()})

    @classmethod
    def load(cls, path: StrPath, model: PreTrainedModel) -> LongHeads:
        """What `save` wrote, for the same model. Raises ArtifactError, WrongModelError."""
        options = storage.read_json(path, KIND, 1)
        with storage.decoding(path):
            made_for = read_fingerprint(options)
            del options["fingerprint"]
            if set(options) != {"chunk", "window", "start", "select_by", "reference_compat"}:
                raise PlanError(f"{sorted(options)} are not the options of LongHeads")
        if made_for is not None:
            made_for.require(fingerprint(model), "this LongHeads")
        with storage.decoding(path):
            return longheads(model, **options)

    def __str__(self) -> str:
        return f"LongHeads: {self.chunks} chunks of {self.chunk} tokens a query, behind position {self.start}"

    def __call__(self, call: HeadCall, compute: Callable[[], Tensor]) -> Tensor:
        """(B, N, H, D) of one layer."""
        self._check(call)
        layer, before = self._state(call)
        starts, shift = before.starts, _shift(call)
        state = before.extended(
            call.q, call.k, call.v, w=self.chunk, scale=call.scale, rotation=self.rotation, shift=shift
        )
        if layer is not None:
            layer.chunks = state
        first, last = self._far(call, starts)
        if first >= last:
            return compute()
        out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1])
        near = min(
            last, max(max(starts or (0,)) + self._threshold - call.past, 0)
        )  # columns that some row reads densely
        if near:
            out[:, :, :near] = self._dense(call, near)
        for begin in range(first, last, TILE):
            end = min(begin + TILE, last)
            far = self._tile(call, state, shift, begin, end)
            positions = call.positions()[:, begin:end].expand(len(far), -1)
            selecting = (positions >= self._threshold)[:, None, :, None]
            out[:, :, begin:end] = torch.where(selecting, far, out[:, :, begin:end])
        return out.transpose(1, 2)

    @property
    def _threshold(self) -> int:
        """First position whose query has chunks to leave out."""
        return max(self.start, self.window)

    def _far(self, call: HeadCall, starts: tuple[int, ...] | None) -> tuple[int, int]:
        """Query columns [first, last) in which some row selects."""
        N = call.q.shape[2]
        return max(0, min(starts or (0,)) + self._threshold - call.past), N

    def _tile(self, call: HeadCall, state: Chunks, shift: Tensor, begin: int, end: int) -> Tensor:
        """(B, H, n, D) of some query columns, over the chunks that each selects."""
        prefill = call.q.shape[2] > 1 or not call.past
        shape = Shape(self.chunk, self.chunks, call.scale, self.rotation, own=not (self.reference_compat and prefill))
        q = call.q[:, :, begin:end]
        positions = call.positions()[:, begin:end].expand(q.shape[0], -1)
        chosen = self._select(q, state.keys, positions, shift, shape)
        seen = call.past + end
        return attend(q, call.k[:, :, :seen], call.v[:, :, :seen], chosen, positions, state.starts, shape)

    def _select(self, q: Tensor, chunk_keys: Tensor, positions: Tensor, shift: Tensor, shape: Shape) -> Tensor:
        """Which chunks each query reads, (B, K, S, n, C) bool; a control overrides it."""
        return select(q, chunk_keys, positions, shift, shape, by_head=self.select_by == "head")

    def _dense(self, call: HeadCall, near: int) -> Tensor:
        """Ordinary attention (B, H, near, D) of the first query columns."""
        queries, seen = call.queries(), call.past + near
        mask = None if queries.mask is None else queries.mask[:, :, :near, :seen]
        out = attention(
            call.q[:, :, :near],
            call.k[:, :, :seen],
            call.v[:, :, :seen],
            mask=mask,
            start=queries.start,
            offset=call.past,
            scale=call.scale,
        )
        assert isinstance(out, Tensor)
        return out

    def _state(self, call: HeadCall) -> tuple[ChunkLayer | None, Chunks]:
        """Where the state of this text is kept, None without a cache, and the state before this pass."""
        cache = call.site.controller.cache
        if cache is None:
            if call.past:
                raise AttachError(
                    f"layer {call.layer}: LongHeads was given keys of {call.past} columns without their cache"
                )
            return None, Chunks.empty(call.q, call.k, _starts(call))
        layer = cache.layers[call.layer]
        if getattr(cache, "offloading", False) or type(layer) not in (DynamicLayer, ChunkLayer):
            raise AttachError(
                f"LongHeads needs a plain DynamicCache, which keeps every key; this is a {type(cache).__name__} of "
                f"{type(layer).__name__}"
            )
        if not isinstance(layer, ChunkLayer):
            layer = cache.layers[call.layer] = ChunkLayer.adopt(layer, self.chunk)
        state = layer.chunks or Chunks.empty(call.q, call.k, _starts(call))
        if state.seen != call.past or layer.w != self.chunk:
            raise CacheError(
                f"layer {call.layer}: the cache holds {call.past} columns of which LongHeads with chunks of {self.chunk} has seen "
                f"{state.seen if layer.w == self.chunk else 0}; fill a new cache with this transform attached"
            )
        if state.starts is not None and max(state.starts) >= state.seen:  # a row of which only padding was seen
            state = replace(state, starts=_starts(call))
        return layer, state

    def _check(self, call: HeadCall) -> None:
        """Refuse a model that this was not made for, and calls whose keys are not all tokens of one text in order."""
        call.need_expressible("LongHeads")
        shape = (call.q.shape[1], call.k.shape[1], call.q.shape[3])
        if shape != self.model[:3] or call.v.shape[3] != shape[2] or len(call.site.controller.sites) != self.model[3]:
            raise AttachError(
                f"this LongHeads was made for a model of {self.model} (heads, kv heads, head dim, layers); make one of this model"
            )
        if call.groups is not None:
            raise AttachError(
                "LongHeads selects from all keys: it cannot be used under a KV plan, which has dropped some"
            )
        if call.layer == 0:
            _need_one_text(call)


def _starts(call: HeadCall) -> tuple[int, ...] | None:
    """First real column of each row."""
    start = call.start
    return None if start is None else tuple(start.tolist())


def _shift(call: HeadCall) -> Tensor:
    """How much more than headwise's positions the model's own are, (B or 1,): 0 where both count real tokens from 0."""
    given = call.options.get("position_ids")
    if not isinstance(given, Tensor) or given.ndim != 2:
        if call.start is not None or given is not None:
            raise AttachError("LongHeads needs the position_ids (B, N) that the model rotates by, and was given none")
        return torch.zeros(1, dtype=torch.long, device=call.q.device)
    positions = call.positions()
    first_real = (positions >= 0).to(torch.int8).argmax(dim=1, keepdim=True)  # a padded column has no position
    B = max(given.shape[0], positions.shape[0])
    given, positions, first_real = given.expand(B, -1), positions.expand(B, -1), first_real.expand(B, -1)
    return (given.gather(1, first_real) - positions.gather(1, first_real))[:, 0]


def _need_one_text(call: HeadCall) -> None:
    """A row is padding, then one text, then perhaps padding; anything else hides keys that a chunk would count."""
    real = call.site.controller.real_columns(call.mask, 0, call.past + call.q.shape[2], call.q.shape[0])
    if real is not None and bool(
        (real[:, 1:].int() - real[:, :-1].int() == 1).sum(1).add(real[:, 0].int()).gt(1).any()
    ):
        raise AttachError("LongHeads cannot read rows with padding between their tokens")
    if call.mask is not None:
        last = call.queries().mask
        assert last is not None
        seen = last[:, 0, -1]  # what the newest column reads
        wanted = torch.ones_like(seen) if real is None else real[:, : seen.shape[1]]
        if bool((seen != wanted).logical_and(seen.any(1, keepdim=True)).any()):
            raise AttachError("LongHeads needs causal masks of whole texts: this mask hides tokens (packed sequences?)")
