"""Every argument of the peers' layers is one of ours, or the error says what to write."""

import inspect

import pytest
import torch
import vector_quantize_pytorch as peer

import rotvq
from rotvq.layer import names

Z = torch.zeros(2, 5, 8)
OURS = {
    "VectorQuantize": (lambda **o: rotvq.VectorQuantizer(8, 16, **o)),
    "ResidualVQ": (lambda **o: rotvq.ResidualVQ(8, 16, 2, **o)),
    "FSQ": (lambda **o: rotvq.FSQ((8,) * 8, **o)),
    "SimVQ": (lambda **o: rotvq.SimVQ(8, 16, **o)),
}
THEIRS = [
    (name, where, argument)
    for name in OURS
    for where in ("__init__", "forward")
    for argument, p in inspect.signature(getattr(getattr(peer, name), where)).parameters.items()
    if argument not in ("self", "x", "z") and p.kind != p.VAR_KEYWORD
]


@pytest.mark.parametrize("layer, where, argument", THEIRS)
def test_every_argument_of_theirs_is_ours_or_answered(layer, where, argument):
    make = OURS[layer]
    ours = {"VectorQuantize": rotvq.VectorQuantizer}.get(layer) or getattr(rotvq, layer)
    if argument in inspect.signature(getattr(ours, where)).parameters:
        return
    with pytest.raises(TypeError) as caught:
        make(**{argument: 1}) if where == "__init__" else make().eval()(Z, **{argument: 1})
    assert argument in str(caught.value) and (
        "write " in str(caught.value) or names.NONE in str(caught.value)
    ), str(caught.value)


@pytest.mark.parametrize("layer", OURS)
def test_a_slip_is_answered_with_what_is_near(layer):
    with pytest.raises(TypeError, match="did you mean channel_first"):
        OURS[layer](chanel_first=True)
    with pytest.raises(TypeError, match="it has no such argument"):
        OURS[layer](qwertz=1)
    with pytest.raises(TypeError, match="did you mean mask"):
        OURS[layer]().eval()(Z, masks=None)


@pytest.mark.parametrize("layer", [*OURS, "ProductVQ"])
def test_their_names_for_decoding(layer):
    vq = rotvq.ProductVQ(8, 16, 2) if layer == "ProductVQ" else OURS[layer]()
    indices = vq.eval()(Z + torch.linspace(-1, 1, 8)).indices
    assert (
        torch.equal(vq.get_output_from_indices(indices), vq.decode(indices))
        and vq.get_codes_from_indices(indices).shape[-1] == 8
    )
