from transformer_engine.pytorch import distributed as distributed
from transformer_engine.pytorch.modules import DotProductAttention as DotProductAttention
from transformer_engine.pytorch.modules import GroupedLinear as GroupedLinear
from transformer_engine.pytorch.modules import LayerNorm as LayerNorm
from transformer_engine.pytorch.modules import LayerNormLinear as LayerNormLinear
from transformer_engine.pytorch.modules import Linear as Linear
from transformer_engine.pytorch.modules import RMSNorm as RMSNorm
