"""torchvision's detectors and segmenters: converted, put on chips, calibrated.

Their weights are random, so what they find means nothing; what is compared are maps of features and
what the heads make of them, and that whole detectors find the same. torchvision's compiled
operators may be missing (see conftest.py). Then two stand-ins, this test's own, take their place:
a plain non-maximum suppression, and torchvision's own ``roi_align`` in Python, which it would
otherwise compile at the first call.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou

import evenkeel as ek
from evenkeel.analog import PCM, Converter, Device, Gain, Gaussian, Periphery, count, program
from evenkeel.norm import BatchChannelNorm2d, NoiseAwareBatchNorm, convert_

BARE: Any = {"weights": None, "weights_backbone": None, "num_classes": 5}
DENSE: Any = BARE | {"min_size": 64, "max_size": 96}
FEW: Any = {
    "rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 8, "box_detections_per_img": 4,
}  # fmt: skip
MADE: dict[str, Callable[[], nn.Module]] = {
    "faster r-cnn, mobilenet": partial(
        detection.fasterrcnn_mobilenet_v3_large_320_fpn, **DENSE, **FEW
    ),
    "faster r-cnn": partial(detection.fasterrcnn_resnet50_fpn, **DENSE, **FEW),
    "mask r-cnn": partial(detection.maskrcnn_resnet50_fpn, **DENSE, **FEW),
    "retinanet": partial(
        detection.retinanet_resnet50_fpn, **DENSE, topk_candidates=50, detections_per_img=4
    ),
    "deeplab, mobilenet": partial(segmentation.deeplabv3_mobilenet_v3_large, **BARE),
    "deeplab": partial(segmentation.deeplabv3_resnet50, **BARE),
}
NORMS = {
    "faster r-cnn, mobilenet": 46, "faster r-cnn": 53, "mask r-cnn": 53, "retinanet": 53,
    "deeplab, mobilenet": 52, "deeplab": 59,
}  # fmt: skip
RESNETS = ["faster r-cnn", "deeplab"]  # one of a kind: the others' backbones are the same
IDEAL = [
    Gain(1.0),
    Gaussian(0.0),
    Device(Gain(1.0), periphery=Periphery(dac=Converter(24), adc=Converter(24))),
]


def plain_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keep the best, drop what overlaps it too much, go on with the best of the rest."""
    over, kept = box_iou(boxes, boxes) > iou_threshold, []
    alive = torch.ones(len(boxes), dtype=torch.bool)
    for best in scores.argsort(descending=True, stable=True).tolist():
        if alive[best]:
            kept.append(best)
            alive &= ~over[best]
    return torch.tensor(kept, dtype=torch.int64)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torchvision.extension._has_ops():
        align = importlib.import_module("torchvision.ops.roi_align")
        plain = getattr(align._roi_align, "__wrapped__", align._roi_align)
        monkeypatch.setattr(align, "_roi_align", plain)
        monkeypatch.setattr("torchvision.ops.boxes.nms", plain_nms)


def images(number: int) -> list[Tensor]:
    """Of two sizes, each with a contrast of its own."""
    sizes = [(64, 80), (72, 64)] * number
    return [torch.rand(1) * F.interpolate(torch.randn(1, 3, 16, 16), size)[0]
            for size in sizes[:number]]  # fmt: skip


def inputs(name: str, number: int) -> Any:
    """As a detector takes them, a list, or as a segmenter does."""
    return images(number) if "deeplab" not in name else torch.stack(images(2 * number)[::2])


def run(model: nn.Module, x: Any) -> Any:
    return model(x)


def maps(model: nn.Module, x: Any) -> dict[str, list[Tensor]]:
    """What comes out of the backbone, of the pyramid on top of it, and of the heads on that."""
    net: Any = getattr(model, "model", model)
    if isinstance(x, Tensor):
        return {"backbone": list(net.backbone(x).values()), "heads": [net(x)["out"]]}
    x = net.transform(x)[0].tensors
    body = net.backbone.body(x)
    pyramid = list(net.backbone.fpn(body).values())
    head = net.rpn.head if hasattr(net, "rpn") else net.head
    heads = torch.utils._pytree.tree_leaves(head(pyramid))
    return {"backbone": list(body.values()), "pyramid": pyramid, "heads": heads}


def distance(found: dict[str, list[Tensor]], wanted: dict[str, list[Tensor]]) -> dict[str, float]:
    """How far maps are from others, relative to these."""
    return {
        part: max(float((f - w).norm() / w.norm()) for f, w in zip(found[part], maps, strict=True))
        for part, maps in wanted.items()
    }


@torch.no_grad()
def made(name: str, batches: int = 2) -> tuple[nn.Module, list[Any]]:
    """A network whose normalizers know what comes to them, and the batches they know it from."""
    torch.manual_seed(0)
    net = MADE[name]().eval()
    if name == "retinanet":  # its scores begin at 0.01, below what it takes for a finding
        nn.init.zeros_(net.head.classification_head.cls_logits.bias)
    seen = [inputs(name, 4) for _ in range(batches)]
    ek.calibrate_(net, seen, gate=False, shrinkage=None, forward=maps)
    return net, seen


def leaves(output: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(output)


# ---- converted


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_all_batch_norms_are_converted(name):
    net, _ = made(name)
    x = inputs(name, 2)
    expected = maps(net, x)
    done = convert_(net, NoiseAwareBatchNorm)
    assert (len(done.converted), done.skipped) == (NORMS[name], {})
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert max(distance(maps(net, x), expected).values()) < 1e-4
    done.undo()
    assert max(distance(maps(net, x), expected).values()) == 0


@pytest.mark.parametrize("name", ["faster r-cnn, mobilenet", "retinanet"])
def test_a_converted_detector_trains(name):
    net = MADE[name]()
    convert_(net, lambda channels: BatchChannelNorm2d(channels, 8, statistics="running"))
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    targets = [{"boxes": box, "labels": torch.tensor([k])} for k in (1, 2)]
    losses = net.train()(images(2), targets)
    sum(losses.values()).backward()
    taught = [p for p in net.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in taught)
    assert all(d["boxes"].isfinite().all() for d in net.eval()(images(2)))


def frozen() -> nn.Module:
    """As torchvision builds them for weights it has trained."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return detection.FasterRCNN(backbone, 5, min_size=64, max_size=96, **FEW).eval()


@torch.no_grad()
def test_frozen_batch_norms_of_a_detector_are_calibrated_and_converted():
    net, seen = frozen(), [images(4) for _ in range(4)]
    norms = [path for path, m in net.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    done = ek.calibrate_(net, seen, gate=False, shrinkage=None, forward=maps)
    assert list(done.methods) == norms
    assert not any((net.get_submodule(p).running_var == 1).any() for p in norms)
    expected = maps(net, seen[0])
    chip = program(net, Gain(0.7), seed=0)
    before = distance(maps(chip, seen[0]), expected)
    assert ek.calibrate_(chip, seen, forward=run).kept  # of the whole detector
    assert distance(maps(chip, seen[0]), expected)["backbone"] < 0.8 * before["backbone"]
    assert convert_(net, nn.BatchNorm2d).converted == norms
    assert max(distance(maps(net, seen[0]), expected).values()) < 1e-4


# ---- on chips


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_nearly_all_of_it_is_on_the_chip(name):
    net, seen = made(name)
    x = inputs(name, 2)
    chip = program(net, PCM(), seed=0)
    counts = count(chip, x)
    assert counts.analog_share >= 0.95, (counts.digital, chip.digital)
    assert chip.digital == {}
    assert all(t.isfinite().all() for t in leaves(chip.age_(3600.0)(x)))


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_ideal_arrays_and_converters_give_the_digital_output(name):
    net, _ = made(name)
    x = inputs(name, 2)
    wanted, findings = maps(net, x), leaves(net(x))
    assert sum(t.numel() for t in findings)
    for device in IDEAL:
        chip = program(net, device, seed=0)
        d = distance(maps(chip, x), wanted)
        print(name, d)
        for found, finding in zip(leaves(chip(x)), findings, strict=True):
            print(found.shape, (found - finding).abs().max(), finding.abs().max())


# ---- calibrated


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("device", [Gain(0.7), Gaussian(0.05)], ids=lambda d: type(d).__name__)
@torch.no_grad()
def test_calibration_brings_features_nearer(name, device):
    net, seen = made(name, batches=8)
    x = inputs(name, 4)
    wanted = maps(net, x)
    chip = program(net, device, seed=0)
    before = distance(maps(chip, x), wanted)
    done = ek.calibrate_(chip, seen, forward=maps)
    after = distance(maps(chip, x), wanted)
    print(name, device, before, after, done.reason)
    done.undo()
    done = ek.calibrate_(chip, seen, forward=maps, gate=False, shrinkage=None)
    after = distance(maps(chip, x), wanted)
    print(name, device, before, after, done.reason)
