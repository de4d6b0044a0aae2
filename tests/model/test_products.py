"""Products are the same numbers whichever library computes them, with gradients and without."""

import pytest
import torch
import torch.nn.functional as F

from model import products
from model.posmlp import PosMLPVideo
from model.presets import ModelConfig
from model.products import add_product, gelu_fits, in_onednn, product
from tests.model.reference import relative_error

ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("library", [True, False])
def test_products_and_their_gradients(kind: torch.dtype, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setattr(products, "in_onednn", lambda *_: False)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).requires_grad_(True)

    weight, tokens, rows, narrow = leaf(24, 20), leaf(35, 20), leaf(24, 35), leaf(24, 12)
    start = torch.randn(35, 12, generator=generator, dtype=torch.float64).to(torch.promote_types(kind, torch.float32)).requires_grad_(True)
    leaves = [weight, tokens, rows, narrow, start]

    def gradients(values: list[torch.Tensor]) -> list[torch.Tensor]:
        torch.autograd.backward([v.square().sum() for v in values])
        found = [leaf.grad.double() for leaf in leaves if leaf.grad is not None]
        assert len(found) == len(leaves)
        for leaf in leaves:
            leaf.grad = None
        return found

    ours = [product(weight, tokens), add_product(start.clone(), rows, narrow)]
    got = gradients(ours)
    with torch.no_grad():
        activated = gelu_fits(tokens.device, kind)
        hidden = product(weight, tokens, gelu=activated)
    theirs = [weight.double() @ tokens.double().t(), start.double() + rows.double().t() @ narrow.double()]
    assert ours[1].dtype == start.dtype
    for out, expected in zip([*ours, *got], [*theirs, *gradients(theirs)], strict=True):
        assert relative_error(out.double(), expected) <= ERROR[kind]
    assert relative_error(hidden.double(), F.gelu(theirs[0]) if activated else theirs[0]) <= ERROR[kind]


def test_onednn_is_what_float32_takes_here() -> None:
    """Or the tests above compare one library with itself."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert in_onednn(torch.device("cpu"), torch.float32)
    assert not in_onednn(torch.device("cpu"), torch.float64)
    assert not gelu_fits(torch.device("cpu"), torch.float32)  # with gradients GELU's argument is needed


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch's own making
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_model_gives_the_numbers_of_an_eager_one(training: bool) -> None:
    torch.manual_seed(0)
    model = PosMLPVideo(
        ModelConfig(preset="posmlp_tiny", num_frames=2, input_size=32, dictionary_init="trunc_normal", depths=(1, 1, 1, 1), drop_path=0.0)
    ).train(training)
    clips = torch.randn(2, 3, 2, 32, 32)
    results = []
    for run in (model, torch.compile(model, backend="eager")):
        with torch.set_grad_enabled(training):
            logits = run(clips)
        if training:
            model.zero_grad()
            logits.square().sum().backward()
        results.append([logits, *([p.grad.clone() for p in model.parameters() if p.grad is not None] if training else [])])
    assert len(results[0]) == len(results[1])
    for name, eager, compiled in zip(["logits", *dict(model.named_parameters())], *results, strict=False):
        if not name.endswith(("proj1.bias", "patch_embed1.proj2.bias")):  # zero but for rounding: the norm behind takes them away
            assert relative_error(compiled, eager) <= 1e-4, name
