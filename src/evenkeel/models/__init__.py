"""Small reference networks, built by name so that a file of weights can be loaded again."""

from evenkeel.models.centre_detector import CentreDetector as CentreDetector
from evenkeel.models.centre_detector import centre_detector as centre_detector
from evenkeel.models.colour import ColourAutoEncoder as ColourAutoEncoder
from evenkeel.models.hd_controller import hd_controller as hd_controller
from evenkeel.models.quaternion_resnet import (
    quaternion_resnet14_cifar10 as quaternion_resnet14_cifar10,
)
from evenkeel.models.registry import architecture as architecture
from evenkeel.models.registry import build as build
from evenkeel.models.registry import config_of as config_of
from evenkeel.models.resnet import ResNet as ResNet
from evenkeel.models.unet import UNet as UNet
from evenkeel.models.unet import unet as unet
