"""The greedy search: the right heads, in order, for the promised price, and the same again after an interruption."""

import pytest
import torch

import headwise
from headwise.attach import fingerprint
from headwise.errors import ArtifactError, EditError, UnitError
from headwise.models.flow_vit import flow_vit
from headwise.steer import FlowSampler, Perturbation, hunt
from headwise.units import HeadSet
from tiny_helper import tiny

WORTH = torch.tensor([[0.1, 0.9, 0.3, 0.0], [0.8, 0.2, 0.7, -0.5]])  # of the 8 heads of the tiny ViT
BEST = ((0, 1), (1, 0), (1, 2), (0, 2), (1, 1), (0, 0))


class Toy:
    """Images that are the strengths of the heads themselves, M of them."""

    def __init__(self, pairs=3):
        self.pairs, self.sets = pairs, []

    def __call__(self, strengths, like=None):
        strengths = torch.zeros(1, 2, 4) if strengths is None else strengths
        self.sets += list(strengths)
        return strengths[:, None].expand(-1, self.pairs, -1, -1)


class Objective:
    """The sum of the known weights; counts the images it sees."""

    def __init__(self, fail_after=None):
        self.images, self.fail_after = 0, fail_after

    def __call__(self, images):
        if self.fail_after is not None and self.images >= self.fail_after:
            raise KeyboardInterrupt
        self.images += len(images)
        return (images * WORTH).sum((1, 2))


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("k, rounds", [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_an_additive_objective_gives_the_best_heads_in_order(k, rounds, batch):
    toy, objective = Toy(), Objective()
    found = hunt(tiny("vit"), toy, objective, k=k, rounds=rounds, batch=batch)
    assert found.order == BEST[: k * rounds]
    wanted = 3 * sum(8 - (r - 1) * k for r in range(1, rounds + 1))
    assert objective.images == wanted + 3  # and the M images without guidance
    assert found.images == wanted
    torch.testing.assert_close(found.scores().values, WORTH)
    assert list(found.best) == sorted(found.best)


def test_ties_go_to_the_lowest_address_and_a_pool_is_kept_to():
    found = hunt(tiny("vit"), Toy(), lambda images: torch.zeros(3), k=2, rounds=1)
    assert found.order == ((0, 0), (0, 1))
    found = hunt(tiny("vit"), Toy(), Objective(), k=1, rounds=2, pool=HeadSet.parse("L0H0,L0H3,L1H1"))
    assert found.order == ((1, 1), (0, 0))


@pytest.mark.parametrize("stop", [3, 12, 27, 33])
def test_an_interrupted_search_goes_on_where_it_was(tmp_path, stop):
    whole = hunt(tiny("vit"), Toy(), Objective(), k=2, rounds=3, batch=2)
    state = tmp_path / "hunt.json"
    with pytest.raises(KeyboardInterrupt):
        hunt(tiny("vit"), Toy(), Objective(stop), k=2, rounds=3, batch=2, state=state)
    objective = Objective()
    again = hunt(tiny("vit"), Toy(), objective, k=2, rounds=3, batch=2, state=state)
    assert again == whole
    assert objective.images <= 3 * 18 + 3 - 3 * 2 * ((stop - 3) // 6)
    longer = hunt(tiny("vit"), Toy(), Objective(), k=2, rounds=4, batch=2, state=state)
    assert longer.order[:6] == whole.order


def test_a_search_of_real_samples_is_the_same_again_whatever_the_batch():
    model = flow_vit(size=8, patch=4, width=16, layers=2, heads=2, classes=3, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # an untrained flow gives 0: its last layer is
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    searches = []
    for batch in (1, 4, 4):
        sampler = FlowSampler(model, noise, {"labels": torch.tensor([0, 1, 2])}, steps=3, w=2.0)
        searches.append(hunt(model, sampler, lambda images: images.flatten(1).std(1), k=1, rounds=2, batch=batch))
    assert searches[1] == searches[2] and searches[0].order == searches[1].order
    torch.testing.assert_close(searches[0].scores().values, searches[1].scores().values, atol=1e-5, rtol=1e-4)
    assert searches[0].scores().values.abs().max() > 0


def test_a_state_of_another_search_is_refused(tmp_path):
    state = tmp_path / "hunt.json"
    hunt(tiny("vit"), Toy(), Objective(), k=2, rounds=1, state=state)
    with pytest.raises(ArtifactError, match="holds a search with other settings"):
        hunt(tiny("vit"), Toy(), Objective(), k=1, rounds=1, state=state)
    state.write_text("{")
    with pytest.raises(ArtifactError):
        hunt(tiny("vit"), Toy(), Objective(), k=2, rounds=1, state=state)


def test_the_found_set_as_artifacts(tmp_path):
    model = tiny("vit")
    found = hunt(model, Toy(), Objective(), k=2, rounds=2)
    assert str(found.heads(3)) == "L0H1,L1H0,L1H2"
    soft = found.perturbation(u=0.5, count=2)
    assert (soft.u, str(soft.heads)) == (0.5, "L0H1,L1H0")
    found.heads().save(tmp_path / "heads.safetensors", fingerprint=fingerprint(model))
    assert HeadSet.load(tmp_path / "heads.safetensors", fingerprint=fingerprint(model)) == found.heads()
    edits = headwise.steer.headhunter(model, None, sampler=Toy(), objective=Objective(), k=2, rounds=2, u=0.5)
    assert edits[0].units == found.heads()
    assert edits[0].amount == 0.5
    assert edits.meta["order"] == "L0H1 L1H0 L1H2 L0H2"
    edits.check(fingerprint(model))


def test_candidates_carry_the_wished_strength():
    toy = Toy()
    hunt(tiny("vit"), toy, Objective(), k=1, rounds=1, like=Perturbation(heads=HeadSet.empty(), u=0.25))
    assert {float(one.max()) for one in toy.sets[1:]} == {0.25}


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"pool": HeadSet.empty()}, UnitError, "pool is empty"),
        ({"pool": HeadSet.parse("L5H0")}, UnitError, "L5H0 does not exist"),
        ({"k": 3, "rounds": 3}, UnitError, r"3 · 3 heads are asked for, the pool has 8"),
        ({"k": 0}, UnitError, "k is 0"),
        ({"objective": lambda images: torch.full((3,), float("nan"))}, EditError, "gave NaN"),
        ({"objective": lambda images: torch.zeros(2)}, EditError, "one score for each of the 3 images"),
    ],
)
def test_bad_searches_are_refused(options, error, words):
    objective = options.pop("objective", Objective())
    with pytest.raises(error, match=words):
        hunt(tiny("vit"), Toy(), objective, **({"rounds": 1} | options))


def test_the_method_needs_its_callables():
    with pytest.raises(EditError, match="needs sampler= and objective="):
        headwise.steer.headhunter(tiny("vit"), None)
