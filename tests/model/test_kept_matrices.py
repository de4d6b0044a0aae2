"""What evaluation keeps of a dictionary is what gathering it again would give, whatever happened to it, and takes no more than stated."""

import copy
from collections.abc import Callable

import pytest
import torch

from model.lrpe import LRPE
from model.posmlp import PosMLPVideo
from model.presets import ModelConfig

TABLE = "window_relative_position_bias_table"


def _encoding() -> LRPE:
    torch.manual_seed(0)
    return LRPE((3, 3), 4, "trunc_normal").eval()


def _step(encoding: LRPE) -> None:
    optimizer = torch.optim.AdamW(encoding.parameters(), lr=0.1)
    encoding.matrices().sum().backward()
    optimizer.step()


def _load(encoding: LRPE, assign: bool) -> None:
    encoding.load_state_dict({name: tensor + 1 for name, tensor in encoding.state_dict().items()}, assign=assign)


CHANGES: dict[str, Callable[[LRPE], object]] = {
    "optimizer step": _step,
    "load_state_dict": lambda e: _load(e, assign=False),
    "load_state_dict, assigned": lambda e: _load(e, assign=True),
    "in place": lambda e: e.get_parameter(TABLE).detach().mul_(2),
    "one number, through .data": lambda e: e.get_parameter(TABLE).data[7, 1].add_(1e-3),
    "other storage": lambda e: setattr(e.get_parameter(TABLE), "data", torch.ones(25, 4)),
    "another parameter": lambda e: setattr(e, TABLE, torch.nn.Parameter(torch.ones(25, 4))),
    "cast": lambda e: e.double(),
    "cast there and back": lambda e: e.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_dictionary_is_noticed(change: str) -> None:
    encoding = _encoding()
    with torch.no_grad():
        before = encoding.matrices()
        assert encoding.matrices() is before  # kept, or this test shows nothing
    CHANGES[change](encoding)
    fresh = copy.deepcopy(encoding).train()
    with torch.no_grad():
        after, expected = encoding.matrices(), fresh.matrices()
    assert after.dtype == expected.dtype
    assert torch.equal(after, expected)
    assert after is not before


def test_another_grid_or_type_is_not_confused() -> None:
    encoding = _encoding()
    with torch.inference_mode():
        whole = encoding.matrices()
        assert encoding.matrices((2, 3)).shape == (4, 6, 6)
        assert encoding.matrices(kind=torch.bfloat16).dtype == torch.bfloat16
        assert torch.equal(encoding.matrices(), whole)


def test_training_keeps_nothing_and_gets_gradients() -> None:
    encoding = _encoding()
    with torch.inference_mode():
        encoding.matrices()
    assert encoding.matrices().requires_grad  # evaluation with gradients, after inference
    with torch.no_grad():
        encoding.matrices()
    encoding.train()
    assert encoding._spelled is None
    encoding.matrices()
    assert encoding._spelled is None


def test_it_is_no_state_and_takes_what_is_stated() -> None:
    torch.manual_seed(0)
    model = PosMLPVideo(ModelConfig(preset="posmlp_tiny", num_frames=4, input_size=64, dictionary_init="trunc_normal")).eval()
    names, clips = list(model.state_dict()), torch.randn(1, 3, 4, 64, 64)
    with torch.no_grad():
        first = model(clips)
        assert torch.equal(model(clips), first)
    encodings = [module for module in model.modules() if isinstance(module, LRPE)]
    for encoding in encodings:
        assert encoding._spelled is not None
        source, used, matrices = encoding._spelled
        tokens = torch.Size(used).numel()
        assert matrices.untyped_storage().nbytes() == encoding.groups * tokens**2 * 4
        assert source.numel() == encoding.get_parameter(TABLE).numel()
    assert list(model.state_dict()) == names
    encodings[0].get_parameter(TABLE).data.add_(0.5)
    with torch.no_grad():
        assert not torch.equal(model(clips), first)
