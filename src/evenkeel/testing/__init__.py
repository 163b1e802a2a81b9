"""Check values and assertions for device models, one's own included."""

from evenkeel.testing.devices import PCM_MOMENTS as PCM_MOMENTS
from evenkeel.testing.devices import assert_device_moments as assert_device_moments
from evenkeel.testing.devices import assert_transparent as assert_transparent
from evenkeel.testing.devices import device_moments as device_moments
