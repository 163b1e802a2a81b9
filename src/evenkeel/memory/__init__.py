"""A key-value memory of high-dimensional vectors, for learning from a few examples."""

from evenkeel.memory.attention import SHARPENINGS as SHARPENINGS
from evenkeel.memory.attention import attention as attention
from evenkeel.memory.attention import softabs as softabs
from evenkeel.memory.codes import CODES as CODES
from evenkeel.memory.codes import encode as encode
from evenkeel.memory.codes import similarity as similarity
from evenkeel.memory.controller import HDController as HDController
from evenkeel.memory.crossbar import CrossbarMemory as CrossbarMemory
from evenkeel.memory.episodes import Episode as Episode
from evenkeel.memory.episodes import EpisodeSampler as EpisodeSampler
from evenkeel.memory.key_value import KeyValueMemory as KeyValueMemory
from evenkeel.memory.key_value import Reading as Reading
from evenkeel.memory.objectives import OBJECTIVES as OBJECTIVES
from evenkeel.memory.objectives import attention_loss as attention_loss
from evenkeel.memory.objectives import prototypical_loss as prototypical_loss
from evenkeel.memory.search import BitIndex as BitIndex
