"""Runs that are killed, interrupted or repeated, in processes of their own."""

import contextlib
import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch

from forked_helper import forked
from headwise.cli import main
from headwise.models import loop
from headwise.route import _recipes_text as texts
from headwise.route import train_moh_lm
from headwise.route._train import SEAL
from headwise.storage import digest

SMALL = texts.TextSize(width=32, layers=2, heads=4, hidden=64, steps=60, batch=2, length=16)


def recipe(folder: Path) -> None:
    """The MoH recipe at its smallest; losses and a digest of the weights go to `folder/done.json`."""
    texts.SIZES["cpu"] = SMALL
    begun = (folder / "run" / "run.json").exists()
    made = train_moh_lm(folder=str(folder / "run"), save_every=2, resume=begun, device="cpu", control=True)
    made.save_pretrained(folder / "out")
    curves = {name: curve.losses for name, curve in made.curves.items()}
    weights = {str(path.relative_to(folder)): digest(path) for path in sorted((folder / "out").rglob("*.safetensors"))}
    (folder / "done.json").write_text(json.dumps({"losses": curves, "weights": weights}, sort_keys=True))


def looped(folder: Path) -> None:
    """The training loop of the small models, the same way."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
    generator = torch.Generator().manual_seed(3)
    run = loop.Run(steps=1500, folder=str(folder / "run"), save_every=5, resume=True)

    def loss_of(step: int) -> torch.Tensor:
        x = torch.randn(32, 64, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = loop.train(run, model, [optimizer], loss_of, rate=loop.warm_cosine(2, 1500), generator=generator)
    total = [float(value.double().sum()) for value in model.parameters()]
    (folder / "done.json").write_text(json.dumps({"losses": losses, "weights": total}))


TRAININGS = {"recipe moh-lm": recipe, "training loop": looped}


def being_written(folder: Path, since: float) -> bool:
    """Is there a checkpoint that was begun since then and is not whole?"""
    begun = [path for path in folder.rglob("checkpoint-*") if path.is_dir() and not (path / SEAL).exists()]
    with contextlib.suppress(FileNotFoundError):  # finished meanwhile
        return any(path.stat().st_mtime > since for path in [*folder.rglob(".*.part"), *begun])
    return False


def killed(name: str, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill a training with SIGKILL again and again, half of the times at the moment when a checkpoint is being written.

    Gives how often, how often inside a checkpoint, and whether the run that at last came to its end is the one that nobody killed.
    """
    train, rng = TRAININGS[name], random.Random(seed)
    whole, broken = folder / "whole", folder / "broken"
    whole.mkdir(parents=True)
    broken.mkdir()
    start = time.monotonic()
    forked(lambda: train(whole)).join()
    seconds = time.monotonic() - start
    done = inside = 0
    while done < kills:
        begun, process = time.time(), forked(lambda: train(broken))
        wait = rng.uniform(0.05, min(0.4, 3 / kills)) * seconds
        deadline, watch = time.monotonic() + wait, math.inf
        if done % 2:
            deadline, watch = deadline + seconds, deadline
        while process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0002)
            if time.monotonic() > watch and being_written(broken, begun):
                break
        if not process.is_alive():
            break  # it came to its end before all kills were used
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        inside += being_written(broken, begun)
        done += 1
    forked(lambda: train(broken)).join()
    same = (broken / "done.json").read_text() == (whole / "done.json").read_text()
    return {
        "kills": done,
        "inside_a_checkpoint": inside,
        "same_losses_and_weights": same,
        "seconds_whole": round(seconds, 1),
    }


COMMANDS = {
    "score": ["score", "induction", "--model", "tiny-random-llama", "-o", "OUT/a.safetensors"],
    "train": ["train", "moh-lm", "-o", "OUT/run"],
    "reproduce": ["reproduce", "razorattention"],
    "generate": ["generate", "--model", "tiny-random-llama", "--prompt", "Hello", "-n", "4000"],
}


def interrupted(name: str, folder: Path, after: float) -> dict[str, Any]:
    """SIGINT to a command after so many seconds: its exit code, what it said, and the files that it left."""
    folder.mkdir(parents=True)
    arguments = [text.replace("OUT", str(folder)) for text in COMMANDS[name]]
    log = folder.with_suffix(".log")
    process = forked(lambda: main(arguments), log)
    time.sleep(after)
    for _ in range(
        4
    ):  # a signal that comes in the middle of a finalizer or a callback from C is lost: a user presses again
        if process.is_alive():
            os.kill(process.pid, signal.SIGINT)
        process.join(20)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {"exit": process.exitcode, "said": log.read_text()[-2000:], "files": files}


def soak(calls: int, seed: int = 0) -> dict[str, Any]:
    """`generate` again and again, with plans, edits and batches of any kind: memory, hooks and the model's config stay as they were."""
    import resource

    import headwise
    from headwise.edits import Edit, HeadEdits
    from headwise.plan import Full, HeadPlan, SinkWindow
    from headwise.units import HeadSet

    rng = random.Random(seed)
    model, _ = headwise.load_model("tiny-random-llama")
    ids = torch.arange(1, 12)[None]

    def plain() -> Any:
        return model.generate(ids, max_new_tokens=4, do_sample=False).tolist()

    def state() -> list[Any]:
        hooks = [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()
        ]
        return [model.config._attn_implementation, hooks]

    def call() -> None:
        rows, length = rng.randint(1, 4), rng.randint(2, 60)
        tokens = torch.tensor([[rng.randrange(256) for _ in range(length)] for _ in range(rows)])
        mask = torch.ones_like(tokens)
        for row in range(rows):
            gap = rng.randrange(length)
            mask[row, :gap] = 0
        patterns = tuple(
            tuple(rng.choice([Full(), SinkWindow(rng.randint(0, 4), rng.randint(1, 16))]) for _ in range(2))
            for _ in range(3)
        )
        edits = HeadEdits.of(
            Edit.scale(HeadSet.of([(rng.randrange(3), rng.randrange(4))]), rng.choice([0.0, 0.5, 2.0]))
        )
        with headwise.attach(model, plan=rng.choice([None, HeadPlan(patterns=patterns)]), edits=edits), torch.no_grad():
            model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=rng.randint(1, 12),
                do_sample=rng.random() < 0.5,
                pad_token_id=256,
            )

    def memory() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    before, text = state(), plain()
    for _ in range(min(50, calls // 4)):
        call()
    first = memory()
    rises = []
    for number in range(calls):
        call()
        if number % max(1, calls // 10) == 0:
            rises.append(round(memory() - first, 1))
    return {
        "calls": calls,
        "memory_mb": round(first),
        "rise_mb": rises,
        "state_kept": state() == before,
        "same_text": plain() == text,
    }


@contextlib.contextmanager
def small_files(limit: int) -> Any:
    """No file of more than `limit` bytes can be written: what a full disk does, without one."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
