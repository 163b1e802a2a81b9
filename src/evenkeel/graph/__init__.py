"""One captured view of a network: its operations, its channels, which scales are tied."""

from evenkeel.graph.capture import Captured as Captured
from evenkeel.graph.capture import capture as capture
from evenkeel.graph.labels import Labels as Labels
from evenkeel.graph.rules import rule as rule
from evenkeel.graph.scales import Coverage as Coverage
from evenkeel.graph.scales import Scaled as Scaled
from evenkeel.graph.scales import Scales as Scales
from evenkeel.graph.scales import find_scales as find_scales
from evenkeel.graph.trace import Act as Act
from evenkeel.graph.trace import Leaf as Leaf
from evenkeel.graph.trace import Tracer as Tracer
from evenkeel.graph.trace import viewed as viewed
