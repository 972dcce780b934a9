"""Commands that write and read files: edits, plans, generation, evaluation, and what they print as JSON."""

import json

import torch

from headwise.cli.common import jsonable
from headwise.units import HeadScores, HeadSet

LLAMA = "tiny-random-llama"


def test_edits_are_written_added_to_and_used(run, tmp_path):
    file = str(tmp_path / "edits.json")
    assert run("edit", "zero", "--units", "L0H1,L1H2", "-o", file)[0] == 0
    code, out, _ = run("edit", "scale", "--units", "L2H0", "--value", "2", "-o", file, "--append", "--json")
    assert code == 0
    said = json.loads(out)
    assert [edit.split()[0] for edit in said["edits"]] == ["zero", "scale"]

    ask = ["generate", "-m", LLAMA, "-p", "Once upon a time", "-n", "5", "--json"]
    plain, edited = (json.loads(run(*ask, *more)[1]) for more in ([], ["--edits", file]))
    assert plain["prompt_tokens"] == edited["prompt_tokens"] > 0
    assert 1 <= plain["new_tokens"] <= 5
    assert plain["cache_bytes"] > 0


def test_edits_of_the_best_heads_remember_their_model(run, tmp_path):
    import torch

    from headwise.attach import fingerprint
    from headwise.hub import load_model

    model, _ = load_model(LLAMA)
    values = torch.arange(12.0).view(3, 4)
    HeadScores(values=values, method="toy", fingerprint=fingerprint(model)).save(tmp_path / "s.safetensors")
    code, out, _ = run(
        "edit", "zero", "--scores", str(tmp_path / "s.safetensors"), "--top", "2", "-o", str(tmp_path / "e.json")
    )
    assert code == 0
    assert "L2H2,L2H3" in out
    code, _, err = run("generate", "-m", "tiny-random-gpt2", "-p", "hello", "--edits", str(tmp_path / "e.json"))
    assert code == 2
    assert "was made for llama" in err


def test_generate_under_a_plan_uses_less_cache(run, tmp_path):
    from headwise.plan import HeadPlan, SinkWindow

    HeadPlan.uniform(SinkWindow(4, 12), 3, 2).save(tmp_path / "plan.json")
    ask = ["generate", "-m", LLAMA, "-p", "Once upon a time, " * 20, "-n", "4", "--json"]
    full, small = (json.loads(run(*ask, *more)[1]) for more in ([], ["--plan", str(tmp_path / "plan.json")]))
    assert small["cache_bytes"] < 0.2 * full["cache_bytes"]


def test_eval_prints_one_json_object(run, tmp_path):
    from headwise.plan import HeadPlan, SinkWindow

    HeadPlan.uniform(SinkWindow(4, 60), 3, 2).save(tmp_path / "plan.json")
    ask = [
        "eval",
        "-m",
        LLAMA,
        "--task",
        "passkey,needle,perplexity,summary",
        "--batch-size",
        "2",
        "--length",
        "300",
        "--tokens",
        "600",
        "--prompts",
        "2",
    ]
    for more in ([], ["--plan", str(tmp_path / "plan.json")]):
        code, out, _ = run(*ask, *more, "--json")
        said = json.loads(out)
        assert code == 0
        assert set(said["tasks"]) == {"passkey", "needle", "perplexity", "summary"}
        low, high = said["perplexity_interval"]
        assert low <= said["tasks"]["perplexity"] <= high
        agreement = said["tasks"]["summary"]["rouge_l"]
        assert agreement["mean"] == 1.0 if not more else 0 <= agreement["low"] <= agreement["mean"] < 1
        assert said["tasks"]["passkey"]["prompts"] == 2
        assert said["tasks"]["perplexity"] > 1
    assert "exact" in run(*ask)[1]


def test_a_plan_tells_its_bytes_by_layer_and_head_before_anything_runs(run, tmp_path):
    HeadScores(values=torch.rand(3, 2), kind="kv", method="random").save(tmp_path / "s.safetensors")
    ask = [
        "plan",
        "duo",
        "--scores",
        str(tmp_path / "s.safetensors"),
        "--sparsity",
        "0.5",
        "-o",
        str(tmp_path / "p.json"),
    ]
    assert "(give --head-dim or --machine for bytes)" in run(*ask)[1]
    code, out, _ = run(*ask, "--head-dim", "64", "--length", "2048", "--batch", "2", "--json")
    said = json.loads(out)
    assert (
        code == 0
        and said["length"] == 2048
        and sorted(n for row in said["head_tokens"] for n in row) == [320] * 3 + [2048] * 3
    )
    assert sum(map(sum, said["head_bytes"])) == sum(said["layer_bytes"]["2048"]) == 2 * 256 * 3 * (2048 + 320)
    table = run(*ask, "--head-dim", "64", "--length", "2048")[1]
    assert "by kv head at 2048 tokens" in table and "512" in table and len(table.splitlines()) > 6
    made = json.loads(
        run("plan", "snapkv", "-m", LLAMA, "--budget", "64tok", "-o", str(tmp_path / "q.json"), "--json")[1]
    )
    assert len(made["head_bytes"]) == 3 and all(n > 0 for row in made["head_bytes"] for n in row)


def test_eval_reads_through_the_cache_under_longheads(run, tmp_path):
    far = str(tmp_path / "far.json")
    assert run("plan", "longheads", "-m", LLAMA, "--chunk", "16", "--window", "128", "-o", far)[0] == 0
    ask = ["-m", LLAMA, "--plan", far, "--length", "256", "--prompts", "1", "--tokens", "256", "--json"]
    code, out, err = run("eval", "--task", "passkey,perplexity", *ask)
    assert code == 0, err
    assert json.loads(out)["tasks"]["perplexity"] > 1


def test_a_plan_for_a_target_latency(run, tmp_path, monkeypatch):
    from headwise.attach import fingerprint
    from headwise.budget import StepTime
    from headwise.budget._step_time import Point
    from headwise.hub import load_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scores = HeadScores(
        values=torch.rand(3, 2), kind="kv", method="random", fingerprint=fingerprint(load_model(LLAMA)[0])
    )
    scores.save(tmp_path / "s.safetensors")
    ask = [
        "plan",
        "duo",
        "--scores",
        str(tmp_path / "s.safetensors"),
        "-o",
        str(tmp_path / "p.json"),
        "--length",
        "32768",
    ]
    assert "headwise calibrate" in run(*ask, "--latency", "12ms")[2]
    code, out, _ = run(
        "calibrate", "-m", LLAMA, "--batches", "1,8", "--lengths", "64,16384", "--repeats", "2", "--json"
    )
    timed = json.loads(out)
    assert code == 0 and len(timed["points"]) == 4 and timed["file"].startswith(str(tmp_path))
    known = StepTime.load(
        timed["file"]
    )  # the same model and machine, with times that do not depend on what else runs here
    slow = [Point(b, t, 1536 * b * t, 2 + b + 1536 * b * t / 1e6) for b in (1, 4) for t in (64, 4096, 32768)]
    labels = {name: getattr(known, name) for name in ("device", "dtype", "head_dim", "fingerprint")}
    StepTime.fit(slow, **labels).save(timed["file"])
    for more in ([], ["--machine", timed["file"]]):
        said = json.loads(run(*ask, "--latency", "0.1s", "--batch", "4", "--json", *more)[1])
        assert 60 < said["step_ms"] <= 100 and said["budget"].endswith(" B")
    assert "not both" in run(*ask, "--latency", "12s", "--budget", "50%")[2]
    assert "before any key is read" in run(*ask, "--latency", "0.0000001ms")[2]
    assert "no budget" in run(*ask, "--latency", "soon")[2]


def test_the_same_seed_gives_the_same_sample(run):
    ask = ["generate", "-m", LLAMA, "-p", "a", "-n", "6", "--temperature", "1", "--json"]
    texts = [json.loads(run(*ask, "--seed", seed)[1])["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_models_lists_the_bundled_ones(run):
    assert "smollm2" in json.loads(run("models", "--json")[1])["models"]
    assert LLAMA in run("models")[1]


def test_json_has_only_plain_values():
    import torch

    value = {"a": (1, torch.tensor([1.5])), 2: float("nan"), "p": HeadSet.parse("L0H1"), "n": None}
    assert jsonable(value) == {"a": [1, [1.5]], "2": None, "p": "L0H1", "n": None}


def test_generating_beyond_the_context_is_refused(run):
    code, _, err = run("generate", "-m", LLAMA, "--prompt", "a" * 4000, "--max-new-tokens", "200")
    assert code == 2
    assert "reads 4096" in err
