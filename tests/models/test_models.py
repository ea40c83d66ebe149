"""Siren, BatchedSiren, Strainer and Encoder: counts, equalities, moves of weights between them."""

import pytest
import torch

import strainer_fast as sf
from strainer_fast import reference


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def points(n: int = 11) -> torch.Tensor:
    return torch.rand(n, 2) * 2 - 1


def test_parameter_counts_of_the_paper() -> None:
    strainer = sf.Strainer(2, 256, 6, 3, num_shared_layers=5, num_decoders=10)
    assert count(strainer.encoder) == 263_936
    assert count(sf.Siren(2, 256, 6, 3)) == 264_707
    assert count(strainer) == 271_646


@pytest.mark.parametrize("num_layers", [1, 2, 6])
@pytest.mark.parametrize("in_features", [1, 2, 3])
def test_siren_is_the_reference(num_layers: int, in_features: int) -> None:
    model = sf.Siren(in_features, 16, num_layers, 3, omega=[float(10 + i) for i in range(num_layers - 1)])
    x = torch.rand(4, 5, in_features)
    parameters = list(model.parameters())
    expected = reference.siren(x, parameters[::2], parameters[1::2], model.omegas)
    assert torch.equal(model(x), expected)
    assert model(x).shape == (4, 5, 3)


def test_head_is_initialised_as_a_siren_layer() -> None:
    siren = sf.Siren(2, 64, 3, 2000)
    bound = (6 / 64) ** 0.5 / 30
    assert 0.99 * bound < siren.head.weight.abs().max() <= bound
    strainer = sf.Strainer(2, 64, 3, 200, 2, 10, omega=(30.0, 10.0))
    assert 0.99 * bound * 3 < strainer.head.weight.abs().max() <= bound * 3  # omega of the sine layer before it


@pytest.mark.parametrize("num_shared", [1, 2, 3])
def test_strainer_equals_its_sirens(num_shared: int) -> None:
    strainer = sf.Strainer(2, 16, 4, 3, num_shared, num_decoders=5, omega=(30.0, 20.0, 10.0))
    x = points()
    together = strainer(x)
    assert together.shape == (5, 11, 3)
    for n in range(5):
        torch.testing.assert_close(strainer.siren(n)(x), together[n], atol=1e-5, rtol=0)


def test_decoders_of_any_depth_have_no_loop_over_signals() -> None:
    strainer = sf.Strainer(2, 16, 5, 1, num_shared_layers=2, num_decoders=7)
    assert len(list(strainer.parameters())) == 2 * 5  # weight and bias per level, however many signals
    assert strainer.decoder[0].weight.shape == (7, 16, 16)


def test_batched_siren_equals_its_sirens() -> None:
    sirens = [sf.Siren(2, 16, 4, 3, omega=(30.0, 20.0, 10.0)) for _ in range(3)]
    stack = sf.BatchedSiren.from_sirens(sirens)
    x = points()
    own = torch.stack([x, 2 * x, 3 * x])
    for n, siren in enumerate(sirens):
        torch.testing.assert_close(stack(x)[n], siren(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(stack(own)[n], siren(own[n]), atol=1e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(stack.siren(n).parameters(), siren.parameters(), strict=True))


def test_encoder_moves_into_a_siren() -> None:
    strainer = sf.Strainer(2, 16, 4, 1, num_shared_layers=2, num_decoders=3, omega=(30.0, 20.0, 10.0))
    x = points()
    features = strainer.encoder(x)
    from_module = sf.Siren.from_encoder(strainer.encoder, out_features=3)
    assert from_module.omegas == (30.0, 20.0, 10.0)
    from_state = sf.Siren.from_encoder(strainer.encoder_state(), 3, num_layers=4)
    assert from_state.omegas == (30.0, 20.0, 10.0)
    assert sf.Siren.from_encoder(dict(strainer.encoder_state()), 3, omega=5.0).omegas == (5.0, 5.0)
    for siren in (from_module, from_state):
        assert len(siren.layers) == 3
        assert siren(x).shape == (11, 3)
        assert torch.equal(siren.layers[1](siren.layers[0](x)), features)
    siren = sf.Siren(2, 16, 4, 3)
    missing, unexpected = siren.load_state_dict(strainer.encoder_state(), strict=False)
    assert not unexpected
    assert all(name.startswith(("layers.2", "head")) for name in missing)


def test_encoder_state_is_a_copy() -> None:
    strainer = sf.Strainer(2, 8, 3, 1, 2, 2)
    state = strainer.encoder_state()
    with torch.no_grad():
        state["layers.0.weight"].zero_()
    assert strainer.encoder.layers[0].weight.abs().max() > 0


def test_a_deeper_network_than_the_encoder_was_made_for() -> None:
    encoder = sf.Encoder(2, sf.Architecture(16, 3, 2, omega=(30.0, 5.0)))
    assert sf.Siren.from_encoder(encoder, 1, num_layers=5).omegas == (30.0, 5.0, 5.0, 5.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sf.Siren(2, 16, 0, 1), "num_layers"),
        (lambda: sf.Siren(2, 16, 3, 1, omega=(30.0,)), "one number for each of the 2 sine layers"),
        (lambda: sf.Strainer(2, 16, 4, 1, 4, 2), "num_shared_layers: expected .* at most 3, got 4"),
        (lambda: sf.Strainer(2, 16, 4, 1, 0, 2), "num_shared_layers"),
        (lambda: sf.Strainer(2, 16, 4, 1, 3, 0), "num_decoders"),
        (lambda: sf.Architecture(hidden_features=10**9), "hidden_features"),
        (lambda: sf.Siren.from_encoder({}, 1), "encoder_state"),
        (lambda: sf.Siren.from_encoder(sf.Siren(2, 4, 3, 1).state_dict(), 1), "layers.0.weight, ... only"),
        (lambda: sf.Siren.from_encoder(sf.Encoder(2, sf.Architecture(8, 4, 3)), 1, num_layers=3), "more than the enc"),
    ],
)
def test_bad_sizes_are_refused(build: object, message: str) -> None:
    with pytest.raises(sf.InputError, match=message):
        build()


def test_encoder_file_round_trip(encoder: sf.Encoder, tmp_path: object) -> None:
    path = tmp_path / "encoder.safetensors"
    encoder.save(path)
    again = sf.Encoder.load(path)
    assert again.fingerprint() == encoder.fingerprint()
    assert again.architecture == encoder.architecture
    assert again.record == encoder.record
    assert again.decoders.keys() == encoder.decoders.keys()
    assert all(torch.equal(again.decoders[k], encoder.decoders[k]) for k in again.decoders)
    x = points()
    assert torch.equal(again(x), encoder(x))
