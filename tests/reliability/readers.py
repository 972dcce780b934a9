"""Every file that headwise reads back, with what writes a good one and what reads it: the table of the fuzz tests.

A reader gets a folder. `files` are the ones in it that are damaged, each in turn.
"""

import gzip
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from headwise import storage
from headwise.attention import crossover
from headwise.budget._moa_profile import InfluenceProfile
from headwise.budget._step_time import Point, StepTime
from headwise.budget.longheads import LongHeads, longheads
from headwise.edits import Edit, HeadEdits, KeyGroup
from headwise.expert_edits import ExpertEdit, ExpertEdits
from headwise.hub import load_model
from headwise.models import loop
from headwise.papers.reproduction import Check, Reproduction
from headwise.plan import Elastic, Full, HeadPlan, Selected, SinkWindow
from headwise.route import HeadRouter, bam, load_rebuilt, moh, uoe
from headwise.route import _recipes_images as images
from headwise.route._recipes import Job, Student, Trained
from headwise.route._recipes_rules import Mixture, MixtureLM
from headwise.route._train import Curve, Recipe, token_rows, train
from headwise.score._corpus import Fields, rows
from headwise.score._gate_files import read_gates, write_gates
from headwise.score._select_job import SelectJob
from headwise.steer._residual import ResidualVector
from headwise.steer._task_embedding import TaskEmbedding
from headwise.steer.headhunter import _Memory
from headwise.steer.mote import _labelled
from headwise.steer.var import VAR
from headwise.steer.vhr import VHR
from headwise.units import Fingerprint, HeadScores, HeadSet
from headwise.view.library import Library

MODEL = Fingerprint(architecture="LlamaForCausalLM", config_hash="ab12", layers=3, heads=4, kv_heads=2)


def random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape)))


def tiny(name: str = "llama") -> Any:
    return load_model(f"tiny-random-{name}")[0]


@dataclass(frozen=True)
class Reader:
    """`save(folder)` writes, `load(folder)` reads; `share` of the usual number of damaged files, where one reading takes long.

    `needs` names a module that is an extra: without it the reader cannot be tried, which a test says as it skips.
    """

    save: Callable[[Path], Any]
    load: Callable[[Path], Any]
    files: tuple[str, ...]
    share: float = 1.0
    needs: str = ""

    @property
    def missing(self) -> str:
        """Why the reader cannot be tried here; "" where it can."""
        here = not self.needs or importlib.util.find_spec(self.needs)
        return "" if here else f"needs {self.needs}: pip install 'headwise[parquet]'"


def one(name: str, save: Callable[[Path], Any], load: Callable[[Path], Any], *others: str, needs: str = "") -> Reader:
    """A reader of one file, which may have others beside it."""
    files = (name, *others)
    return Reader(lambda folder: save(folder / name), lambda folder: load(folder / name), files, needs=needs)


def scores() -> HeadScores:
    return HeadScores(values=random(3, 4), method="m", data="d", fingerprint=MODEL, meta={"tests": 3})


def plan() -> HeadPlan:
    row = (Full(), SinkWindow(2, 6), Elastic(1, 2, 0.5, compensation="count"))
    return HeadPlan(patterns=(row, row[::-1]), prefill="dense", method="m", meta={"x": 0.5})


def selected_plan() -> HeadPlan:
    return HeadPlan(patterns=((Selected(4, 8, 16),) * 2,) * 3, fingerprint=MODEL)


def edits() -> HeadEdits:
    units = HeadSet.parse("L0H1:0.5,L2H3")
    groups = [KeyGroup("sinks", "0:4", 0.5), KeyGroup("rest", "all")]
    parts = [Edit.zero(units), Edit.scale(units, 2.0), Edit.replace(units, random(2, 4)), Edit.reweight(units, groups)]
    return HeadEdits.of(*parts, fingerprint=MODEL, method="m")


def expert_edits() -> ExpertEdits:
    kinds = (
        ExpertEdit(op="off", units=HeadSet.parse("L0E1,L1E3")),
        ExpertEdit(op="scale", units=HeadSet.parse("L1E0"), value=0.5),
    )
    return ExpertEdits(kinds, method="m", meta={"x": 1})


def task_embedding(path: Path) -> None:
    TaskEmbedding(random(3, 4, 5), random(3, 4), MODEL).save(path)


def gates(folder: Path) -> None:
    write_gates(HeadScores(values=random(3, 2), kind="kv", method="g"), folder, sinks=128, window=256)


def step_time() -> StepTime:
    points = tuple(Point(batch, 64 * n, 1000 * n * batch, 1.0 + n) for batch in (1, 2) for n in (1, 2, 3))
    return StepTime(
        device="cpu",
        dtype="float32",
        head_dim=16,
        fingerprint=MODEL,
        floor_ms=1,
        empty_ms=((1, 0.6), (4, 0.9)),
        rate=1e6,
        points=points,
    )


def influence() -> InfluenceProfile:
    return InfluenceProfile.of(
        {32: random(3, 4, 4, 4), 48: random(3, 4, 6, 6)}, 8, kind="head", data="d", fingerprint=MODEL
    )


def points(path: Path) -> None:
    run = {"exact": 1.0, "tokens": 1.0, "prompts": 2, "perplexity": 20.5, "tokens_per_s": 3.0}
    runs = [
        run | {"kind": "full cache", "full_heads": 6, "cache_bytes": 99},
        run | {"kind": "random", "full_heads": 2, "cache_bytes": 40},
    ]
    storage.write_json(path, "cache-points", 1, {"runs": runs, "how": "measured"})


def demo_report(path: Path) -> None:
    points(path)
    budgets = json.loads(path.read_text())["runs"]
    storage.write_plain_json(
        path, {"findings": {"budgets": budgets, "scores": {"top": ["L1H1"]}}, "settings": {"seed": 0}}
    )


def record(path: Path) -> None:
    checks = (Check("specific", "top", "<", "random"), Check("", "ppl", "<=", 21.0))
    numbers = {"metrics": {"top": 0.1, "ppl": 20.0}, "baselines": {"random": 0.9}}
    path.write_text(Reproduction(paper="moh", claim="c", scale="cpu", checks=checks, seconds=3.0, **numbers).to_json())


def explored(path: Path) -> list[str]:
    """A file in the explorer: listed with its line, or as a problem with a reason, never an exception; named alone it is refused."""
    library = Library.open([path.parent])
    assert all(problem.reason for problem in library.problems)
    return [item.line for item in Library.open([path]).items.values()]


def curves(folder: Path) -> None:
    trained = Trained("moh-lm", {"steps": 3, "seed": 0}, {"routed": Student(None)})
    trained.curves["routed"] = Curve([3.0, 2.0, 1.5], {3: 1.4})
    trained.measured["routed"] = {"train_loss": 1.5, "held_out_loss": 1.4}
    trained.save_figures(folder / "curves.json")


def drawn(folder: Path) -> str:
    from headwise.report.training import save_page

    page = save_page(folder)
    return page.read_text()[:100] if page else ""


def job(folder: Path, resume: bool) -> None:
    Job(
        name="demo",
        recipe=Recipe(steps=2),
        settings={"steps": 2, "rate": 0.1, "text": None},
        folder=str(folder),
        resume=resume,
    ).open()


def looped(folder: Path, resume: bool) -> list[float]:
    """Two steps of a linear model, with a checkpoint after the second; resumed, they are only read, or done anew."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
    generator = torch.Generator().manual_seed(3)
    run = loop.Run(steps=2, folder=str(folder), save_every=0 if resume else 2, resume=resume)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def loss_of(step: int) -> torch.Tensor:
        return model(torch.randn(4, 3, generator=generator)).square().mean()

    return loop.train(run, model, [optimizer], loss_of, rate=loop.warm_cosine(1, 2), generator=generator)


def trained(folder: Path, resume: bool) -> list[float]:
    """The same through transformers' Trainer."""
    ids = torch.arange(64).reshape(4, 16) % 256
    recipe = Recipe(steps=2, batch_size=1, folder=str(folder), save_every=0 if resume else 2)
    return train(tiny(), token_rows(ids), recipe, resume=resume).losses


def crossovers(path: Path) -> None:
    sizes = dict.fromkeys(
        ("routed", "routed_backward", "routed_graph", "windowed", "windowed_backward", "windowed_graph", "decode"), 1024
    )
    made = crossover.Crossover(device="gpu", dtype="bfloat16", head_dim=64, **sizes).save(path.parent)
    made.rename(path)


def corpus(path: Path) -> None:
    texts = [json.dumps({"text": f"document {n}", "domain": "ab"[n % 2], "id": n}) for n in range(6)]
    data = ("\n".join(texts) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def parquet(path: Path, **how: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"text": [f"document {n}" for n in range(6)], "id": list(range(6)), "tags": [["a"], [], ["b", "c"]] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **how)


def packed_parquet(path: Path) -> None:
    """Compressed pages without a dictionary, in two row groups."""
    parquet(path, compression="zstd", use_dictionary=False, row_group_size=3, data_page_version="2.0")


def documents(path: Path) -> list[Any]:
    return [Fields("text").read(row, where) for where, row in rows([path])]


def selection_job(folder: Path) -> SelectJob:
    return SelectJob((folder / "in.jsonl",), folder)


def selection(folder: Path) -> None:
    """What a finished shard of `select-data` holds, by a scorer that gives each document its length."""
    corpus(folder / "in.jsonl")
    found = SimpleNamespace(tokens=3, why=None, base=1.0, reference=2.0, score=0.5, control_scores=(0.1,))
    how = SimpleNamespace(sets=[], mode="uniform", denominator="base", context=8, min_tokens=1, model=tiny())
    selection_job(folder).score(SimpleNamespace(**vars(how), score=lambda texts: (found for _ in texts)))  # type: ignore[arg-type]


def prompts(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"prompt": f"{n} + 1 =", "label": "ab"[n % 2]}) for n in range(4)) + "\n")


def pictures(folder: Path) -> None:
    for part, count in (("t10k", 2), ("train", 3)):
        for kind, size in (("images", 28 * 28), ("labels", 1)):
            magic, skip = images.MAGIC[kind]
            raw = magic.to_bytes(4, "big") + bytes(skip - 4) + bytes(count * size)
            (folder / f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte.gz").write_bytes(gzip.compress(raw))


def mixture(folder: Path) -> None:
    dense, made = tiny(), Mixture(rule="softmax", experts=2, k=1, balance=0.01, z=0.0, seed=0)
    MixtureLM(dense, made.build(dense), made).save_pretrained(folder)


def hunt(path: Path) -> None:
    memory = _Memory(path, {"u": 1.0, "k": 2})
    memory.write(0, {(0, 1): 0.5, (1, 2): -1.0})


def resumed_hunt(path: Path) -> Any:
    return _Memory(path, {"u": 1.0, "k": 2}).rounds


def reference_model(folder: Path) -> None:
    model, tokenizer = load_model("tiny-random-llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


REBUILT = ("headwise.json", "config.json", "rebuilt.safetensors")
LLAMA = {"made": None}


def far_reader(path: Path) -> Any:
    LLAMA["made"] = LLAMA["made"] or tiny()
    return LongHeads.load(path, LLAMA["made"])


READERS: dict[str, Reader] = {
    "set": one("a.safetensors", lambda p: HeadSet.parse("L0H1:0.5,L2H3").save(p, fingerprint=MODEL), HeadSet.load),
    "scores": one("a.safetensors", lambda p: scores().save(p), HeadScores.load),
    "scores, their tensors": one(
        "a.safetensors",
        lambda p: scores().save(p),
        lambda p: storage.read_tensors(p, "head-scores", 1, {"values": (torch.float32, 2)}),
    ),
    "plan": one("a.json", lambda p: plan().save(p), HeadPlan.load),
    "plan of selected keys": one("a.json", lambda p: selected_plan().save(p), HeadPlan.load),
    "edits": one("a.json", lambda p: edits().save(p), HeadEdits.load, "a.safetensors"),
    "expert edits": one("a.json", lambda p: expert_edits().save(p), ExpertEdits.load),
    "retrieval scores of others": one(
        "a.json",
        lambda p: HeadScores(values=random(2, 2), method="m").to_retrieval_json(p),
        lambda p: HeadScores.from_retrieval_json(p, 2, 2),
    ),
    "gates of DuoAttention": Reader(gates, read_gates, ("full_attention_heads.tsv", "config.json")),
    "head router": Reader(
        lambda f: moh(tiny(), None, router="trained").save_pretrained(f),
        HeadRouter.from_pretrained,
        ("router_config.json", "router_model.safetensors"),
    ),
    "head router without weights": Reader(
        lambda f: moh(tiny(), None).save_pretrained(f), HeadRouter.from_pretrained, ("router_config.json",)
    ),
    "mixed model": Reader(lambda f: bam([tiny()] * 2, None).save_pretrained(f), load_rebuilt, REBUILT, 0.5),
    "union model": Reader(lambda f: uoe(tiny(), None).save_pretrained(f), load_rebuilt, REBUILT, 0.5),
    "mixture model": Reader(mixture, load_rebuilt, REBUILT, 0.5),
    "VHR": one("a.json", lambda p: VHR(layers=(0, 2), fingerprint=MODEL).save(p), VHR.load),
    "VAR": one(
        "a.json",
        lambda p: VAR(dims=(3, 7), layers=(1,), heads=HeadSet.parse("L1H1"), fingerprint=MODEL).save(p),
        VAR.load,
    ),
    "residual vector": one(
        "a.safetensors",
        lambda p: ResidualVector(random(8), 1, "add", MODEL, "m", {"x": 1}).save(p),
        ResidualVector.load,
    ),
    "task embedding": one("a.json", task_embedding, TaskEmbedding.load, "a.safetensors"),
    "head hunt": one("a.json", hunt, resumed_hunt),
    "step time": one("a.json", lambda p: step_time().save(p), lambda p: str(StepTime.load(p))),
    "influence profile": one("a.safetensors", lambda p: influence().save(p), InfluenceProfile.load),
    "long heads": one("a.json", lambda p: longheads(tiny(), chunk=4, window=48).save(p), far_reader),
    "cache points in the explorer": one("a.json", points, explored),
    "report in the explorer": one("a.json", demo_report, explored),
    "record in the explorer": one("a.json", record, explored),
    "scores in the explorer": one("a.safetensors", lambda p: scores().save(p), explored),
    "record": one("a.json", record, lambda p: Reproduction.from_json(storage.read_text(p))),
    "curves of a recipe": Reader(curves, drawn, ("curves.json",), 0.5),
    "note of a recipe": Reader(lambda f: job(f, False), lambda f: job(f, True), ("run.json",)),
    "checkpoint of the loop": Reader(lambda f: looped(f, False), lambda f: looped(f, True), ("step-2.safetensors",)),
    "checkpoint of the Trainer": Reader(
        lambda f: trained(f, False),
        lambda f: trained(f, True),
        tuple(
            f"checkpoint-2/{name}"
            for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
        ),
        0.1,
    ),
    "crossover table": one("a.json", crossovers, crossover.read),
    "documents": one("a.jsonl", corpus, documents),
    "packed documents": one("a.jsonl.gz", corpus, documents),
    "scores of documents": Reader(selection, lambda f: selection_job(f).scored(), ("part-00000-of-00001.jsonl",)),
    "labelled prompts": one("a.jsonl", prompts, lambda p: _labelled(p, None, None)),
    "pictures": Reader(
        pictures, lambda f: images._idx(f, 2), ("t10k-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
    ),
    "model folder": Reader(
        reference_model,
        load_model,
        ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"),
        0.2,
    ),
    "Parquet documents": one("a.parquet", parquet, documents, needs="pyarrow"),
    "packed Parquet documents": one("a.parquet", packed_parquet, documents, needs="pyarrow"),
}
