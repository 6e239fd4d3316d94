"""Are disentangled variational autoencoders really easier to attack? A literate reproduction."""

import importlib

__version__ = "0.1.0"

NAMES = {  # name: the module that defines it, imported when the name is first asked for
    'AttackPlayground': 'play',
    'LatentExplorer': 'explorer',
    'adapt': 'yours',
    'attack': 'attacks',
    'diagnose': 'diagnosis',
    'evaluate': 'robustness',
    'images': 'data',
    'load': 'data',
    'load_model': 'yours',
    'pixels': 'data',
    'posterior': 'objectives',
    'preset': 'settings',
    'pretrained': 'training',
    'pretrained_judge': 'judges',
    'rates': 'robustness',
    'save_model': 'yours',
    'train': 'training',
}
__all__ = [*NAMES]


def __getattr__(name):
    "The object that the module `NAMES[name]` calls `name` (PEP 562)."
    if name not in NAMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{NAMES[name]}', __name__), name)


def __dir__(): return sorted({*globals(), *NAMES})
