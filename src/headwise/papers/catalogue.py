"""The 33 systems in scope, and the true status of each.

A row is `planned` until `papers/<slug>.py` exists. That module declares what it reached:

    PAPER = Paper(slug="moh", status="works", api="headwise.route.moh", claim="…one sentence that can be false…")
    def reproduce(scale="cpu", *, seed=0, progress=False) -> Reproduction: ...

The declaration is only an upper bound. `works` is shown when everything in `api` can be imported and called, and a run
that is recorded in `papers/records/<slug>.json` (at the larger scale `<slug>.gpu.json`) tests the same claim and its
numbers bear it out, at every scale that is recorded; anything less is `partial`, and `problems()` says what is missing,
which fails the checks of `make test`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from headwise.errors import ArtifactError, HeadwiseError
from headwise.papers.reproduction import Reproduction

Status = Literal["works", "partial", "planned"]
RECORDS = Path(__file__).parent / "records"

# id, slug, title, verb, arXiv
_ROWS = """
01 moh                         route  2410.11842 MoH: mixture-of-head attention
02 moa-sparse                  budget 2406.14909 MoA: mixture of sparse attention spans with elastic rules
03 vmoba                       route  2506.23858 VMoBA: mixture-of-block attention for video diffusion models
04 muon-mla-moe                scale  2509.24406 Muon: training and trade-offs with latent attention and MoE
05 deepseek-v3                 scale  2505.09343 Insights into DeepSeek-V3: scaling challenges and hardware
06 bam                         route  2408.08274 BAM: branch-attend-mix parameter upcycling
07 headhunter-softpag          steer  2506.10978 HeadHunter and SoftPAG: perturbation guidance by head selection
08 icl-linear-regression       score  2503.12734 In-context linear regression with multi-head softmax attention
09 duoattention                budget 2410.10819 DuoAttention: retrieval heads and streaming heads
10 vit-head-analytics          score  2303.13731 How does attention work in vision transformers? Visual analytics
11 task-kv                     budget 2501.15113 Task-KV: task-aware head budgets from semantic spread
12 multicrafter                steer  2509.21953 MultiCrafter: spatially disentangled attention for many subjects
13 retrieval-head              score  2404.15574 Retrieval heads: scoring heads by how often they copy the needle
14 deconstructing-attention    score  2510.11602 Deconstructing attention: design principles of language models
15 longheads                   budget 2402.10685 LongHeads: every head attends to its own few chunks
16 rcmha                       scale  2308.03429 RCMHA: relative convolutional multi-head attention
17 mixture-of-thoughts         route  2509.21164 Mixture of Thoughts: aggregating what experts think
18 mote                        steer  2502.11096 MoTE: mixture of tunable experts
19 circuit-chinchilla          score  2307.09458 Circuit analysis at scale: multiple choice in Chinchilla
20 distributed-mha             scale  2302.06218 A unified view of long-sequence models; distributed attention
21 duplex                      scale  2409.01141 Duplex: a device for MoE, grouped queries and continuous batching
22 vision-aware-head-divergence steer 2412.13949 VHD and VHR: vision-aware heads against hallucination
23 dynamic-mask-attention      route  2508.02124 Trainable dynamic mask sparse attention
24 uoe                         route  2503.02495 UoE: union of experts
25 moe-survey                  route  2407.06204 A survey on mixture of experts, as a working module set
26 graph-of-tokens             route  2505.00792 Graph of tokens: similarity- and attention-aware MoE routing
27 soft-injection              steer  2507.20906 Soft injection of task embeddings
28 attentioninfluence          score  2505.07293 AttentionInfluence: selecting data by its need of retrieval heads
29 circuit-reuse               score  2310.08744 Circuit component reuse across tasks
30 razorattention              budget 2407.15891 RazorAttention: head-wise KV compression with a compensation token
31 mixer                       route  2502.05335 MixER: mixture of experts for dynamical system reconstruction
32 mixformer                   route  2203.11082 MixFormer: tracking with iterative mixed attention
33 visual-attention-sink       steer  2503.03321 VAR: visual attention sinks in large multimodal models
"""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a module of `headwise.papers` declares about itself, as its `PAPER`.

    Attributes:
        slug: name of the row, e.g. `"retrieval-head"`; the module is called `retrieval_head`.
        status: `"works"` for the whole specification, `"partial"` for a part of it.
        api: dotted names that a user calls, joined by `", "`; every one must import.
        claim: the sentence that `reproduce` tests.
    """

    slug: str
    status: Literal["works", "partial"]
    api: str
    claim: str


@dataclass(frozen=True)
class Row:
    """One of the 33 systems: what is planned, and what its module proves."""

    id: str
    slug: str
    verb: str
    arxiv: str
    title: str

    @property
    def module(self) -> ModuleType | None:
        """The module of this paper, imported; None while there is none."""
        name = self.slug.replace("-", "_")
        if not (Path(__file__).parent / f"{name}.py").exists():
            return None
        return importlib.import_module(f"headwise.papers.{name}")

    @property
    def paper(self) -> Paper | None:
        """What the module declares; None while there is no module."""
        declared = getattr(self.module, "PAPER", None)
        return declared if isinstance(declared, Paper) else None

    @property
    def api(self) -> str:
        """Dotted names that a user calls; empty while there are none."""
        return self.paper.api if self.paper else ""

    @property
    def reproduce(self) -> Callable[..., Reproduction] | None:
        """The module's `reproduce(scale, *, seed, progress)`; None while there is none."""
        function = getattr(self.module, "reproduce", None)
        return function if callable(function) else None

    @property
    def record(self) -> Reproduction | None:
        """The recorded run at CPU scale, its `holds` computed anew; None while there is none."""
        return _read(record_file(self.slug, "cpu"))

    @property
    def records(self) -> tuple[Reproduction, ...]:
        """The recorded runs of all scales, the smallest first."""
        return tuple(run for run in (self.record, _read(record_file(self.slug, "gpu"))) if run is not None)

    def problems(self) -> list[str]:
        """What keeps the declaration from being shown as it stands; empty for a planned row and for a true one."""
        if self.module is None:
            return []
        if self.paper is None:
            return ["the module has no PAPER"]
        found = [] if self.paper.slug == self.slug else [f"PAPER.slug is {self.paper.slug!r}"]
        found += [f"{name} cannot be imported and called" for name in self.api.split(", ") if not _callable(name)]
        if self.reproduce is None:
            found.append("the module has no reproduce()")
        if self.paper.status == "works":
            found += self._unproved(self.paper)
        return found

    def _unproved(self, paper: Paper) -> list[str]:
        try:
            found = self.records
        except ArtifactError as error:
            return [str(error)]
        if not found:
            return [f"no recorded run: headwise reproduce {self.slug} --record"]
        if any((run.paper, run.claim) != (self.slug, paper.claim) for run in found):
            return ["the recorded run tests another claim"]
        return [f"in the recorded run this is false: {check}" for run in found for check in run.failed()]

    @property
    def status(self) -> Status:
        """`works`, `partial` or `planned`, see the top of this module."""
        if self.module is None:
            return "planned"
        return "works" if self.paper and self.paper.status == "works" and not self.problems() else "partial"

    def to_dict(self) -> dict[str, Any]:
        """The object that `headwise papers --json` prints for this row."""
        return {
            "id": self.id,
            "title": self.title,
            "status": self.status,
            "verb": self.verb,
            "api": self.api,
            "reproduce": self.reproduce is not None,
        }


def record_file(slug: str, scale: str) -> Path:
    """Where the run of a paper at a scale is recorded."""
    return RECORDS / (f"{slug}.json" if scale == "cpu" else f"{slug}.{scale}.json")


def _read(file: Path) -> Reproduction | None:
    return Reproduction.from_json(file.read_text(encoding="utf-8")) if file.exists() else None


def rows() -> list[Row]:
    """The 33 rows in order."""
    parts = (line.split(maxsplit=4) for line in _ROWS.strip().splitlines())
    return [Row(id_, slug, verb, arxiv, title) for id_, slug, verb, arxiv, title in parts]


def row(name: str) -> Row:
    """The row with this slug or id; `ArtifactError` lists close slugs.

    >>> row("moh").id, row("09").slug
    ('01', 'duoattention')
    """
    import difflib

    slugs = {r.slug: r for r in rows()}
    by_name = slugs | {r.id: r for r in rows()} | {r.slug.replace("-", "_"): r for r in rows()}
    if name not in by_name:
        close = difflib.get_close_matches(name, slugs, n=3, cutoff=0.4)
        raise ArtifactError(
            f"no paper is called {name!r}; {'did you mean ' + ' or '.join(close) if close else 'see headwise papers'}"
        )
    return by_name[name]


def _callable(dotted: str) -> bool:
    """Whether a dotted name below `headwise` can be imported and called."""
    parts = dotted.split(".")
    if parts[0] != "headwise" or len(parts) < 2:
        return False
    try:
        thing: Any = importlib.import_module("headwise")
        for depth, part in enumerate(parts[1:], start=2):
            if not hasattr(thing, part):
                importlib.import_module(".".join(parts[:depth]))
            thing = getattr(thing, part)
    except (ImportError, AttributeError, HeadwiseError):
        return False
    return callable(thing)
