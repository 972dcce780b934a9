"""The adapter for diffusers transformers: same face, same artifacts, and no edit that is not applied."""

import copy

import pytest
import torch

from headwise.attach import attach, detach, find_stack, fingerprint
from headwise.attach.ablate import ablate
from headwise.attach.attention_door import ATTENTION
from headwise.attach.diffusers import segments
from headwise.attach.observe import observe
from headwise.edits import Edit
from headwise.errors import AttachError, PlanError, UnitError, WrongModelError
from headwise.plan import Full, HeadPlan
from headwise.units import HeadSet
from tiny_helper import random

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'headwise[vision]'")

from vision_helper import MODELS, inputs, model, predict

EACH = pytest.mark.parametrize("name", MODELS)
LAYERS = {"sd3": 3, "flux": 4, "pixart": 2, "dit": 3}


def hooks(made):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in made.modules()], [
        sorted(vars(m)) for m in made.modules()
    ]


@EACH
def test_the_stack_is_the_self_attention_in_running_order(name):
    made = model(name)
    stack = find_stack(made)
    seen = []
    with attach(made, observers=[lambda call, out: seen.append((call.layer, tuple(out.shape)))]):
        predict(made, inputs(name))
    N = {"sd3": 23, "flux": 23, "pixart": 16, "dit": 16}[name]
    assert [layer for layer, _ in seen] == list(range(LAYERS[name])) == list(range(stack.layers))
    assert {shape for _, shape in seen} == {(2, N, stack.heads, stack.head_dim)}
    assert fingerprint(made).layers == LAYERS[name]


@EACH
def test_attached_and_idle_is_bit_identical_and_leaves_nothing(name):
    made, batch = model(name), inputs(name)
    before, plain = hooks(made), predict(made, batch)
    with attach(made, edits=Edit.scale(HeadSet.parse("L0H0"), 1.0)):
        assert torch.equal(predict(made, batch), plain)
    with attach(made, edits=Edit.zero(HeadSet.parse("L1H1"))):
        assert not torch.equal(predict(made, batch), plain)
    assert torch.equal(predict(made, batch), plain)
    assert hooks(made) == before


@EACH
def test_an_edit_of_every_head_is_felt(name):
    made, batch = model(name), inputs(name)
    stack, plain = find_stack(made), predict(made, batch)
    for layer in range(stack.layers):
        for head in range(stack.heads):
            with ablate(made, HeadSet.of([(layer, head)])):
                assert not torch.equal(predict(made, batch), plain), (layer, head)


def test_zero_is_the_same_as_zeroed_columns_of_the_output_projection():
    made, batch = model("dit"), inputs("dit")
    other = copy.deepcopy(made)
    attention = other.transformer_blocks[1].attn1
    with torch.no_grad():
        attention.to_out[0].weight[:, 8:16] = 0
    with ablate(made, "L1H1"):
        torch.testing.assert_close(predict(made, batch), predict(other, batch))


@pytest.mark.parametrize("text", [3, 7, 16])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_tokens_of_joint_attention_are_read_from_the_call(name, text):
    made, found = model(name), {}
    with attach(made, observers=[lambda call, out: found.__setitem__(call.layer, segments(call))]):
        predict(made, inputs(name, text=text))
    image_first = {"image": slice(0, 16), "text": slice(16, 16 + text)}
    text_first = {"text": slice(0, text), "image": slice(text, text + 16)}
    assert set(found) == set(range(LAYERS[name]))
    assert all(parts == (image_first if name == "sd3" else text_first) for parts in found.values())


@EACH
def test_layers_in_which_nothing_is_done_have_no_hook(name):
    made, batch = model(name), inputs(name)
    stack, plain = find_stack(made), hooks(made)[0]
    with attach(made, edits=Edit.zero(HeadSet.parse("L1H0"))):
        hooked = [bool(m._forward_hooks or m._forward_pre_hooks) for m in stack.modules]
        assert hooked == [layer == 1 for layer in range(stack.layers)]
        changed = predict(made, batch)
    assert hooks(made)[0] == plain and not torch.equal(changed, predict(made, batch))


def test_an_attachment_can_be_laid_down_and_taken_up():
    made, batch = model("sd3"), inputs("sd3")
    plain = predict(made, batch)
    handle = attach(made, edits=Edit.zero(HeadSet.parse("L1H0")))
    changed = predict(made, batch)
    for _ in range(2):
        handle.suspend()
        handle.suspend()
        assert torch.equal(predict(made, batch), plain)
        with attach(made, edits=Edit.zero(HeadSet.parse("L0H0"))):  # another one comes and goes meanwhile
            assert not torch.equal(predict(made, batch), plain)
        handle.resume()
        handle.resume()
        assert torch.equal(predict(made, batch), changed)
    handle.suspend()
    handle.detach()
    assert torch.equal(predict(made, batch), plain) and not any(hooks(made)[0])
    with pytest.raises(AttachError, match="was detached"):
        handle.resume()


def test_a_single_stream_alone_knows_its_text_tokens():
    made, found = model("flux"), {}

    class Look:
        in_layers = (3,)

        def __call__(self, call, out):
            found[call.layer] = segments(call)

    with attach(made, observers=[Look()]):
        predict(made, inputs("flux", text=5))
    assert found == {3: {"text": slice(0, 5), "image": slice(5, 21)}}


def test_fused_projections_and_another_grid():
    made, found = model("flux"), {}
    made.fuse_qkv_projections()
    with attach(made, observers=[lambda call, out: found.__setitem__(call.layer, segments(call))]):
        predict(made, inputs("flux"))
    assert all(parts["image"] == slice(7, 23) for parts in found.values())
    found.clear()
    made = model("sd3")
    with attach(made, observers=[lambda call, out: found.__setitem__(call.layer, segments(call))]):
        predict(made, inputs("sd3") | {"hidden_states": random(2, 4, 4, 12)})
    assert all(parts["image"] == slice(0, 12) for parts in found.values())


def test_image_only_models_have_image_tokens_only():
    found = []
    made = model("dit")
    with attach(made, observers=[lambda call, out: found.append(segments(call))]):
        predict(made, inputs("dit"))
    assert found == [{"image": slice(0, 16), "text": slice(0, 0)}] * 3


def test_other_stacks_by_name():
    made = model("pixart")
    assert find_stack(made, "attn2").layers == 2
    with ablate(made, "L0H0", stack="attn2"):
        assert not torch.equal(predict(made, inputs("pixart")), predict(model("pixart"), inputs("pixart")))
    with (
        attach(made, edits=Edit.mix_v(HeadSet.parse("L0H0"), 0.5), stack="attn2"),
        pytest.raises(AttachError, match="other tokens"),
    ):
        predict(made, inputs("pixart"))
    assert find_stack(model("flux"), "single_transformer_blocks").layers == 2
    assert find_stack(model("sd3", dual_attention_layers=(0,))).layers == 3
    with pytest.raises(AttachError, match=r"stack='nowhere' matches 0 of the attention stacks \['transformer_blocks"):
        find_stack(made, "nowhere")


def test_observing_rows_of_a_diffusers_model():
    made = model("dit")
    with observe(made, "entropy", "norm") as record:
        predict(made, inputs("dit"))
    assert record.table("entropy").shape == (3, 2, 4, 16)
    assert record.norm_mean.shape == (3, 4)


def test_attachments_nest_and_detach_in_any_order():
    made, batch = model("sd3"), inputs("sd3")
    plain = predict(made, batch)
    first = attach(made, edits=Edit.zero(HeadSet.parse("L0H0")))
    only_first = predict(made, batch)
    second = attach(made, edits=Edit.zero(HeadSet.parse("L2H1")))
    assert not torch.equal(predict(made, batch), only_first)
    first.detach()
    second.detach()
    assert torch.equal(predict(made, batch), plain)
    attach(made, edits=Edit.zero(HeadSet.parse("L0H0")))
    detach(made)
    assert torch.equal(predict(made, batch), plain)


def test_an_error_in_the_middle_leaves_torch_as_it_was():
    made, batch = model("dit"), inputs("dit")

    def broken(call, attend):
        raise ZeroDivisionError

    with attach(made, transforms=[broken]), pytest.raises(ZeroDivisionError):
        predict(made, batch)
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.nn.functional.scaled_dot_product_attention is ATTENTION
    predict(made, batch)


def test_bfloat16_and_gradients():
    made = model("sd3").bfloat16()
    batch = {k: v.bfloat16() if k != "timestep" else v for k, v in inputs("sd3").items()}
    with attach(made, edits=Edit.mix_v(HeadSet.parse("L0H0,L1H3"), 0.5)):
        made(**batch).sample.float().sum().backward()
    assert made.transformer_blocks[0].attn.to_v.weight.grad.isfinite().all()


def test_grouped_queries_whose_processor_repeats_keys():
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(0)
    fields = dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1)
    fields |= dict(
        num_attention_heads=6, num_kv_heads=2, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64)
    )
    made = Lumina2Transformer2DModel(**fields, cap_feat_dim=8).eval()
    mask = torch.ones(2, 5, dtype=torch.bool)
    batch = dict(
        hidden_states=random(2, 4, 8, 8), timestep=torch.rand(2), encoder_hidden_states=random(2, 5, 8, seed=1)
    )
    batch["encoder_attention_mask"] = mask
    stack, plain, seen = find_stack(made, "layers"), predict(made, batch), []
    assert (stack.layers, stack.heads, stack.kv_heads) == (2, 6, 2)
    with attach(made, edits=Edit.scale(HeadSet.parse("L0H0"), 1.0), stack="layers"):
        torch.testing.assert_close(predict(made, batch), plain)
    watch = lambda call, out: seen.append((call.v, out.clone()))
    with attach(made, edits=Edit.mix_v(HeadSet.parse("L0H1,L0H4"), 1.0), observers=[watch], stack="layers"):
        predict(made, batch)
    v, out = seen[0]
    assert v.shape[1] == 2
    assert torch.equal(out[:, :, 1], v[:, 0]) and torch.equal(out[:, :, 4], v[:, 1])


class Elsewhere:
    """A processor that never calls torch's attention: what another attention backend looks like from here."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        return attn.to_out[0](attn.to_v(hidden_states))


def test_a_module_that_is_out_of_reach_is_refused_at_once():
    made, batch = model("dit"), inputs("dit")
    made.transformer_blocks[1].attn1.set_processor(Elsewhere())
    before = hooks(made)
    with pytest.raises(AttachError, match=r"layer 1 of DiTTransformer2DModel was not reached.*set_attention_backend"):
        attach(made, edits=Edit.zero(HeadSet.parse("L0H0")))
    assert hooks(made) == before
    handle = attach(model("dit"), edits=Edit.zero(HeadSet.parse("L0H0")))
    handle.model.transformer_blocks[0].attn1.set_processor(Elsewhere())  # behind our back
    with pytest.raises(AttachError, match="layer 0 of DiTTransformer2DModel was not reached"):
        predict(handle.model, batch)


def test_an_output_projection_of_zero_is_refused():
    made = model("dit")
    torch.nn.init.zeros_(made.transformer_blocks[0].attn1.to_out[0].weight)
    with pytest.raises(AttachError, match="zeroing all heads of a Attention changes nothing"):
        attach(made, edits=Edit.zero(HeadSet.parse("L0H0")))


def test_bad_artifacts():
    made = model("dit")
    with pytest.raises(UnitError, match="L3H0 does not exist"):
        attach(made, edits=Edit.zero(HeadSet.parse("L3H0")))
    with pytest.raises((AttachError, PlanError, WrongModelError)):
        attach(made, plan=HeadPlan(patterns=((Full(),) * 4,) * 3))
    with pytest.raises(AttachError, match="Linear is no transformers model"):
        attach(torch.nn.Linear(2, 2))


def test_unets_are_refused():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    with pytest.raises(AttachError, match="only transformers are reached, not U-Nets"):
        find_stack(unet)
