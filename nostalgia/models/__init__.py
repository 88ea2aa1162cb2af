"""Networks: backbones of either library, adapters, heads, batch-norm statistics, export."""

from nostalgia.models.adapters import attach_lora
from nostalgia.models.backbone import Backbone
from nostalgia.models.backbones import build_backbone, has_adapters, scope_parameters
from nostalgia.models.heads import expand_head, load_heads, make_head, save_heads

__all__ = [
    "Backbone",
    "attach_lora",
    "build_backbone",
    "expand_head",
    "has_adapters",
    "load_heads",
    "make_head",
    "save_heads",
    "scope_parameters",
]
