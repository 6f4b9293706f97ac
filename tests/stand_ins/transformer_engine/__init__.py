"""A stand-in for Transformer Engine on CPUs: what Megatron's wrappers ask of its modules, in plain torch.

``tests/unit_tests/models/test_engine_norms.py`` puts this folder's parent on the path of processes of its own, and
compares the signatures below with those of Transformer Engine's own wheel, of the version named here. What the tests do
not reach (FP8, grouped linears, user buffers) is a name without contents.
"""

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch

__version__ = "2.20.2"
