"""What torchvision needs to be imported beside a build of torch without its compiled operators.

timm imports it. Its wheel's operators are compiled for another build of torch, and their schemas,
which its Python code refers to, are then missing.
"""

import pytest
import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)

try:
    import torchvision  # noqa: F401
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # for as long as this module lives
    for schema in SCHEMAS:
        LIBRARY.define(schema)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # many small operations, which threads only slow down
