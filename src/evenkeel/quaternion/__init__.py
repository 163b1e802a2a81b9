"""Quaternion layers: four channels that belong together, at a quarter of the parameters."""

from evenkeel.quaternion import weights as weights
from evenkeel.quaternion.algebra import conjugate as conjugate
from evenkeel.quaternion.algebra import hamilton as hamilton
from evenkeel.quaternion.algebra import modulus as modulus
from evenkeel.quaternion.algebra import rotated as rotated
from evenkeel.quaternion.conv import QuaternionConv1d as QuaternionConv1d
from evenkeel.quaternion.conv import QuaternionConv2d as QuaternionConv2d
from evenkeel.quaternion.conv import QuaternionConv3d as QuaternionConv3d
from evenkeel.quaternion.conv_transpose import (
    QuaternionConvTranspose1d as QuaternionConvTranspose1d,
)
from evenkeel.quaternion.conv_transpose import (
    QuaternionConvTranspose2d as QuaternionConvTranspose2d,
)
from evenkeel.quaternion.conv_transpose import (
    QuaternionConvTranspose3d as QuaternionConvTranspose3d,
)
from evenkeel.quaternion.image import from_quaternion as from_quaternion
from evenkeel.quaternion.image import to_quaternion as to_quaternion
from evenkeel.quaternion.init import quaternion_init_ as quaternion_init_
from evenkeel.quaternion.layer import QuaternionLayer as QuaternionLayer
from evenkeel.quaternion.linear import QuaternionLinear as QuaternionLinear
from evenkeel.quaternion.norm import QuaternionBatchNorm as QuaternionBatchNorm
from evenkeel.quaternion.parts import QuaternionDropout as QuaternionDropout
from evenkeel.quaternion.parts import QuaternionMaxPool2d as QuaternionMaxPool2d
