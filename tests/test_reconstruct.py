"""Pictures that are to come back: the task of the audit, and its data."""

import json

import pytest
import torch
from torch import nn

import evenkeel as ek
from evenkeel.audit import Reconstruct
from evenkeel.audit.names import resolve
from evenkeel.audit.picture import LARGEST, inline_png
from evenkeel.data import folder_of
from evenkeel.data.pictures import kodak, middle
from evenkeel.errors import ConfigError


class Coder(nn.Module):
    """Gives pictures back nearly as they were."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 12, 2, 2, bias=False)
        self.up = nn.ConvTranspose2d(12, 3, 2, 2, bias=False)
        with torch.no_grad():
            eye = torch.eye(12).view(12, 3, 2, 2)
            self.down.weight.copy_(eye)
            self.up.weight.copy_(eye + 0.02 * torch.randn(12, 3, 2, 2))

    def forward(self, x):
        return self.up(self.down(x))


@pytest.fixture
def pictures():
    return [(torch.rand(5, 3, 8, 8),) for _ in range(4)]


def test_psnr_is_the_mean_over_pictures():
    x = torch.full((2, 3, 4, 4), 0.5)
    y = x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    task = Reconstruct()
    sums = task.score(y, (x,))
    assert task.value(sums) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert task.value(sums + task.score(y[:1], (x[:1],))) == pytest.approx(80 / 3, abs=1e-3)
    assert task.errors(y, (x,)).tolist() == pytest.approx([0.01, 0.0001], rel=1e-3)


def test_the_interval_is_students():
    task, x = Reconstruct(), torch.rand(6, 1, 5, 5)
    y = (x + 0.1 * torch.randn(6, 1, 5, 5)).clamp(0, 1)
    each = [task.value(task.score(y[k : k + 1], (x[k : k + 1],))) for k in range(6)]
    from evenkeel.audit.summary import t_interval

    assert task.interval(task.score(y, (x,))) == pytest.approx(t_interval(each))
    assert task.interval(task.score(y[:1], (x[:1],))) is None


def test_outputs_count_as_they_would_be_shown():
    task, x = Reconstruct(), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    beyond = torch.tensor([-3.0, 7.0]).view(1, 1, 1, 2)
    assert task.value(task.score(beyond, (x,))) == 100  # as good as anything counts


def test_the_peak_is_that_of_the_pixels():
    x = torch.full((1, 1, 4, 4), 100.0)
    assert Reconstruct(255).value(Reconstruct(255).score(x + 25.5, (x,))) == pytest.approx(20)
    with pytest.raises(ConfigError, match="peak must be above 0"):
        Reconstruct(0.0)


def test_a_picture_beside_the_input_is_what_it_should_become():
    task, noisy, clean = Reconstruct(), torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    assert task.value(task.score(clean, (noisy, clean))) == 100
    labels = torch.tensor([0, 1])
    assert task.value(task.score(noisy, (noisy, labels))) == 100
    assert task.value(task.score(noisy, noisy)) == 100


@pytest.mark.parametrize(
    ("batch", "model", "says"),
    [
        ((torch.rand(2, 3, 4, 4) - 0.5,), nn.Identity(), "must lie in 0 to 1"),
        ((torch.randint(0, 255, (2, 3, 4, 4)),), nn.Identity(), "float tensors"),
        ((["a"],), nn.Identity(), "got list"),
        (
            (torch.rand(2, 3, 4, 4),),
            nn.Flatten(),
            r"shape, \(2, 3, 4, 4\); the network gives \(2, 48",
        ),
    ],
    ids=["range", "dtype", "kind", "shape"],
)
def test_what_does_not_fit_is_refused(batch, model, says):
    with pytest.raises(ConfigError, match=says):
        Reconstruct().check(model, [batch], ())


def test_every_batch_is_looked_at():
    good, bad = (torch.rand(2, 3, 4, 4),), (torch.rand(2, 3, 4, 4) + 1,)
    with pytest.raises(ConfigError, match="must lie in 0 to 1"):
        Reconstruct().check(nn.Identity(), [good, bad], ())


def test_it_is_known_by_name():
    assert resolve("tasks", "reconstruct") == Reconstruct()
    assert resolve("tasks", "reconstruct:255").to_dict() == {
        "type": "Reconstruct", "version": 1, "peak": 255.0,
    }  # fmt: skip


def test_an_audit_in_decibel(pictures, tmp_path):
    result = ek.audit(
        Coder(), pictures, task="reconstruct", devices=["gaussian:0.05"], chips=3, workers=0,
        remedies=["none", "match"], store=":memory:", floor=20,
    )  # fmt: skip
    facts = json.loads(json.dumps(result.to_dict()))
    assert (result.metric, result.unit, facts["unit"]) == ("PSNR", "dB", "dB")
    assert {cell["unit"] for cell in facts["cells"]} == {"dB"}
    assert result.digital > result.cells[0].mean > 5
    assert result.digital_layers == {}
    said = " ".join(result.verdict)
    assert f"PSNR {result.digital:.1f} dB" in said
    assert "reach 20 dB" in said
    assert "PSNR in dB" in result.table()
    page = result.report(tmp_path / "r.html").read_text()
    assert "PSNR, dB" in page
    assert "PSNR, %" not in page
    assert page.count('class="beside"') == 5
    assert "original" in page
    pytest.importorskip("xarray")
    assert result.to_xarray().attrs["units"] == "dB"


def test_large_pictures_are_shown_smaller_and_on_one_scale():
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    def shown(x, limits):
        text = inline_png(x, limits).split("base64,")[1].rstrip('">')
        return Image.open(BytesIO(b64decode(text)))

    assert max(shown(torch.rand(3, 300, 900), (0, 1)).size) == LARGEST
    grey = shown(torch.full((1, 100, 100), 0.5), (0.0, 1.0))
    assert grey.getcolors() == [(100 * 100, 128)]


def test_the_middle_of_a_picture():
    image = torch.arange(3 * 6 * 8.0).view(3, 6, 8)
    assert torch.equal(middle(image, 4), image[:, 1:5, 2:6])
    assert torch.equal(middle(image, 7), image[:, :, :7])


def test_kodak_is_cut_into_pictures_to_calibrate_and_to_test():
    try:
        folder = folder_of("kodak")
    except ConfigError:
        pytest.skip("needs kodak under $EVENKEEL_DATA")
    data = kodak(folder)
    assert (data.test_samples, data.calibration_samples) == (16, 8)
    assert data.test[0][0].shape == (16, 3, 256, 256)
    assert data.shared_samples() == 0
    Reconstruct().check(nn.Identity(), data.test, ())
