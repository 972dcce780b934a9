"""Released checkpoints: taken apart, loaded, and equal to a naive module written after the released equations."""

import copy

import pytest
import torch
from route_fakes import fake_call
from torch import nn
from torch.nn import functional as F

from headwise import attach, fingerprint
from headwise.errors import AttachError, RouteError, WrongModelError
from headwise.hub import load_model
from headwise.route import MOH_PRESETS, HeadRouter, LayerRoute, RouterConfig, load_official, moh, moh_preset
from headwise.units import Fingerprint

# the presets


@pytest.mark.parametrize(
    "name, active, heads",
    [
        ("vit-b-75", 5 * 4 + 5 * 8 + 23 * 12 + 5 * 21, 588),
        ("vit-b-50", 5 * 4 + 5 * 6 + 23 * 8 + 5 * 12, 588),
        ("vit-s-80", 5 * 3 + 5 * 6 + 22 * 9 + 5 * 20, 429),
        ("vit-s-75", 5 * 3 + 5 * 6 + 22 * 9 + 5 * 16, 429),
        ("dit-xl/2-90", 9 * 8 + 10 * 16 + 9 * 19, 448),
        ("dit-xl/2-75", 9 * 8 + 10 * 12 + 9 * 16, 448),
        ("dit-l/2-90", 8 * 8 + 8 * 16 + 8 * 19, 384),
        ("dit-l/2-75", 8 * 8 + 8 * 12 + 8 * 16, 384),
        ("dit-b/2-90", 5 * 10 + 5 * 11 + 2 * 12, 144),
        ("dit-b/2-75", 2 * 6 + 8 * 9 + 2 * 12, 144),
        ("dit-s/2-90", 8 * 5 + 4 * 6, 72),
        ("dit-s/2-75", 2 * 3 + 4 * 4 + 4 * 5 + 2 * 6, 72),
        ("llm-s-75", 12 * 9, 144),
        ("llm-s-50", 12 * 6, 144),
        ("llm-b-75", 24 * 12, 384),
        ("llm-b-50", 24 * 8, 384),
        ("llama3-8b-75", 32 * 24, 1024),
    ],
)
def test_active_heads_of_every_published_configuration(name, active, heads):
    preset = moh_preset(name)
    assert (preset.active, preset.heads) == (active, heads)
    assert abs(preset.share - preset.nominal) < 0.012
    assert len(preset.widths) == len(preset.layers)


def test_every_preset_is_in_the_table_above_and_keeps_the_dense_number_of_heads():
    assert len(MOH_PRESETS) == 17
    for name, (layers, heads) in {"dit-xl/2-90": (28, 16), "dit-l/2-75": (24, 16), "dit-b/2-90": (12, 12)}.items():
        assert moh_preset(name).heads == layers * heads  # DiT-XL and L move heads upwards, they add none


def test_a_preset_on_a_model_of_its_shape_and_of_another(llama):
    model = Fingerprint(architecture="llama", config_hash="x", layers=32, heads=32, kv_heads=8)
    assert moh_preset("llama3-8b-75").routes(model.layers, model.heads)[31].active == 24
    with pytest.raises(RouteError, match=r"preset llama3-8b-75 has 32 layers of \[32\] heads, the model 3 of 4"):
        moh(llama, None, preset="llama3-8b-75")
    router = moh(llama, None, preset=moh_preset("vit-b-50").scaled(3, 4))
    assert router.config.kind == "trained"
    assert router.active_counts() == [3, 2, 2]
    assert router.config.meta["preset"] == "vit-b-50 on 3 x 4"


@pytest.mark.parametrize("options", [{"active_heads": [3, 3, 3]}, {"dense_layers": 1}, {"shared_count": 1}])
def test_a_preset_leaves_nothing_else_to_choose(llama, options):
    with pytest.raises(RouteError, match="preset names the heads"):
        moh(llama, None, preset=moh_preset("vit-b-50").scaled(3, 4), **options)


@pytest.mark.parametrize("name", ["vit-b", 3, None])
def test_unknown_presets(name):
    with pytest.raises(RouteError, match="it must be one of vit-b-75"):
        moh_preset(name)


# the released module, naively


class Released(nn.Module):
    """Attention with router as the released DiT and ViT (K > 0, or K = 0 with several shared heads) compute it."""

    def __init__(self, width, heads, dim, shared, routed):
        super().__init__()
        self.heads, self.dim, self.shared, self.routed = heads, dim, shared, routed
        self.qkv, self.proj = nn.Linear(width, 3 * heads * dim), nn.Linear(heads * dim, width)
        if routed:
            self.wg = nn.Linear(width, heads - shared, bias=False)
            if shared:
                self.wg_0 = nn.Linear(width, 2, bias=False)
        if shared > 1:
            self.wg_1 = nn.Linear(width, shared, bias=False)

    def gates(self, x):
        B, N, _ = x.shape
        if not self.routed:
            return torch.softmax(self.wg_1(x), -1) * self.shared
        p = torch.softmax(self.wg(x), -1)
        g = torch.zeros(B, N, self.heads)
        a = 2 * torch.softmax(self.wg_0(x), -1) if self.shared else None
        s = torch.softmax(self.wg_1(x), -1) if self.shared > 1 else torch.ones(B, N, self.shared)
        for b in range(B):
            for t in range(N):
                chosen = p[b, t].topk(self.routed).indices
                for i in range(self.shared):
                    g[b, t, i] = a[b, t, 0] * self.shared * s[b, t, i]
                for i in chosen:
                    share = p[b, t, i] / p[b, t, chosen].sum() * self.routed
                    g[b, t, self.shared + i] = share if a is None else a[b, t, 1] * share
        return g

    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        out = torch.softmax(q @ k.mT / self.dim**0.5, -1) @ v  # (B, H, N, D)
        return self.proj((out.transpose(1, 2) * self.gates(x)[..., None]).flatten(2))


SHAPES = [(4, 4, 0), (8, 1, 3), (8, 3, 2), (8, 0, 5)]  # heads, shared, routed


def released(stack="blocks", shapes=SHAPES, width=24):
    torch.manual_seed(0)
    layers = [Released(width, heads, 6, shared, routed) for heads, shared, routed in shapes]
    state = {}
    for i, layer in enumerate(layers):
        state |= {f"{stack}.{i}.attn.{name}": value for name, value in layer.state_dict().items()}
    return layers, state


def test_gates_of_every_kind_of_layer_equal_the_released_ones():
    layers, state = released()
    official = load_official(state, routed=[0, 3, 2, 5])
    x = torch.randn(2, 7, 24)
    for i, layer in enumerate(layers):
        got = official.router.layers[i].eval()(fake_call(B=2, N=7, H=layer.heads, hidden=x))
        torch.testing.assert_close(got, layer.gates(x), rtol=1e-5, atol=1e-6)
    assert not any("wg" in name for name in official.weights)
    assert official.router.config.gate_norm == "official"


def test_the_four_stages_of_a_vision_transformer():
    state, routed = {}, []
    for stage, width in enumerate((8, 16, 24, 32), start=1):
        shapes = [(4, 4, 0)] if stage < 3 else [(8, 3, 2)] * 2
        state |= released(f"block{stage}", shapes, width)[1]
        routed += [shape[2] for shape in shapes]
    official = load_official(state, routed=routed)
    assert [r.config.width for r in official.routers.values()] == [8, 16, 24, 32]
    assert official.routers["block3"].active_counts() == [5, 5]
    with pytest.raises(RouteError, match="stacks block1, block2, block3, block4"):
        official.router  # noqa: B018


def test_a_whole_published_configuration(tmp_path):
    preset = moh_preset("dit-s/2-75")
    shapes = [(route.heads, len(route.shared), route.routed) for route in preset.layers]
    state = released(shapes=shapes)[1]
    router = load_official(state, preset="dit-s/2-75").router
    assert router.config.layers == preset.layers
    router.save_pretrained(tmp_path)
    again = HeadRouter.from_pretrained(tmp_path)
    assert torch.equal(again.layers[3].W_r, state["blocks.3.attn.wg.weight"])
    with pytest.raises(RouteError, match="3 heads are to be chosen|another preset|heads are to be chosen"):
        load_official(state, preset="dit-s/2-90")


def test_loading_into_a_host_of_the_same_names_leaves_it_alone_if_it_cannot():
    model, _ = load_model("tiny-random-llama")
    state = dict(model.state_dict())
    before = copy.deepcopy(state)
    other = {**state, "model.norm.weight": torch.zeros(3)}
    with pytest.raises(RouteError, match="do not fit LlamaForCausalLM"):
        load_official(other, model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_released_llama_is_the_dense_model_and_a_norm_router():
    source, _ = load_model("tiny-random-llama")
    state = {name: value + 0.01 for name, value in source.state_dict().items()}
    model, _ = load_model("tiny-random-llama")
    official = load_official(state, model)
    assert official.router.config.kind == "norm"
    assert official.router.config.layers == (LayerRoute.first(4, 2, 1),) * 3  # int(4 / 2) and int(4 / 4)
    assert torch.equal(model.model.norm.weight, state["model.norm.weight"])
    ids = torch.arange(12)[None]
    with torch.no_grad(), attach(model, router=official.router):
        got = model(ids).logits
    routes = official.router.config.layers
    same = HeadRouter(RouterConfig(layers=routes, kind="norm", fingerprint=fingerprint(model)))
    with torch.no_grad(), attach(model, router=same):
        torch.testing.assert_close(got, model(ids).logits)


def test_state_dicts_of_another_layout():
    _, state = released()
    cases = [
        ({"a.weight": torch.ones(1)}, {"routed": []}, "not a MoH checkpoint"),
        ({"model": state}, {}, 'entry "model" or "ema"'),
        (state, {}, "give preset= or routed="),
        (state, {"routed": [0, 3]}, "4 attention layers, preset or routed names 2"),
        (state, {"routed": [1, 3, 2, 5]}, "1 heads are to be chosen, the checkpoint has 0"),
        (state, {"routed": [0, 0, 2, 5]}, "0 heads are to be chosen, the checkpoint has 7"),
        (state, {"routed": [0, 8, 2, 5]}, "routed is 8"),
        (state, {"preset": "dit-s/2-90"}, "4 attention layers, preset or routed names 12"),
        ({k: v for k, v in state.items() if ".2.attn.wg_0" not in k}, {"routed": [0, 3, 2, 5]}, "wg_0 must be there"),
        ({k: v for k, v in state.items() if ".2." not in k}, {"routed": [0, 3, 5]}, "without a gap"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}, {}, "give preset= or model="),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}, {"preset": "dit-s/2-90"}, "has router weights"),
    ]
    for given, options, problem in cases:
        with pytest.raises(RouteError, match=problem):
            load_official(given, **options)
    wide = {**state, "blocks.1.attn.wg_0.weight": torch.zeros(2, 25)}
    with pytest.raises(RouteError, match="widths"):
        load_official(wide, routed=[0, 3, 2, 5])


# a whole DiT in diffusers


class NaiveDiT(nn.Module):
    """A DiT by the released names and equations, at time 0 (where every table of frequencies gives cos = 1, sin = 0)."""

    def __init__(self, shapes, width=24):
        super().__init__()
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(4, width, 2, 2)
        self.t_embedder, self.y_embedder, self.final_layer = nn.Module(), nn.Module(), nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(6, width)
        self.blocks = nn.ModuleList()
        for heads, shared, routed in shapes:
            block = nn.Module()
            block.attn = Released(width, heads, width // heads, shared, routed)
            block.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
            block.mlp = nn.Module()
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.blocks.append(block)
        self.final_layer.linear = nn.Linear(width, 2 * 2 * 8)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, labels, places):
        width = places.shape[-1]
        h = self.x_embedder.proj(x).flatten(2).mT + places
        time = torch.cat([torch.ones(128), torch.zeros(128)]).expand(len(x), -1)
        c = self.t_embedder.mlp(time) + self.y_embedder.embedding_table(labels)

        def moved(z, shift, scale):
            return F.layer_norm(z, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

        for block in self.blocks:
            s1, k1, g1, s2, k2, g2 = block.adaLN_modulation(c).chunk(6, 1)
            h = h + g1[:, None] * block.attn(moved(h, s1, k1))
            inner = F.gelu(block.mlp.fc1(moved(h, s2, k2)), approximate="tanh")
            h = h + g2[:, None] * block.mlp.fc2(inner)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, 1)
        out = self.final_layer.linear(moved(h, shift, scale))
        side = int(out.shape[1] ** 0.5)
        return torch.einsum("nhwpqc->nchpwq", out.view(len(x), side, side, 2, 2, 8)).reshape(len(x), 8, 2 * side, -1)


def diffusers_dit(heads=4, layers=3):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'headwise[vision]'")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=24 // heads,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
        norm_eps=1e-6,
    ).eval()


def test_a_dit_in_diffusers_equals_the_naive_one():
    model = diffusers_dit()
    torch.manual_seed(1)
    naive = NaiveDiT([(4, 1, 2), (4, 2, 1), (4, 4, 0)])
    state = {**naive.state_dict(), "pos_embed": torch.zeros(1, 16, 24)}
    official = load_official(state, model, routed=[2, 1, 0])
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 4])
    with torch.no_grad(), attach(model, router=official.router.eval()):
        got = model(x, timestep=torch.zeros(2, dtype=torch.long), class_labels=labels).sample
        want = naive(x, labels, model.pos_embed.pos_embed)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_dit_whose_heads_differ_from_the_hosts_is_refused():
    model = diffusers_dit(heads=2)
    state = NaiveDiT([(4, 1, 2), (4, 2, 1), (4, 4, 0)]).state_dict()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((WrongModelError, AttachError), match="heads"):
        load_official(state, model, routed=[2, 1, 0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
