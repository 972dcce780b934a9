"""Head routers of every kind with sharp choices, for the tests of `HeadRouter`."""

import torch

from headwise import fingerprint
from headwise.route import HeadRouter, LayerRoute, RouterConfig

KINDS = ["trained", "norm", "fitted", "static"]


def make(model, kind, shared=(1,), routed=2, sharp=40, stack=None, **options):
    print_ = fingerprint(model, stack)
    route = LayerRoute(heads=print_.heads, shared=shared, routed=0 if kind == "static" else routed)
    width = 64 if kind in ("trained", "fitted") else 0
    config = RouterConfig(layers=(route,) * print_.layers, kind=kind, width=width, fingerprint=print_, **options)
    router = HeadRouter(config)
    with torch.no_grad():
        for p in router.parameters():
            p.mul_(sharp)
    return router


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits
