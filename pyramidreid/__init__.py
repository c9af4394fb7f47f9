"Pyramidal person re-identification with multi-loss dynamic training, as a fastai library."
from importlib import import_module

# The names of the README's first page. Each is imported when asked for, so that `import pyramidreid` needs no torch.
_HOMES = {
    'pyramid_learner':    'all', # brings all methods of a learner, from every room
    'ReIDDataLoaders':    'data.loaders',
    'market_table':       'data.datasets',
    'doctor':             'data.doctor_report',
    'evaluate':           'evaluation.retrieval',
    'rerank':             'evaluation.reranking',
    'bootstrap':          'evaluation.protocol_card',
    'compare_cards':      'evaluation.protocol_card',
    'Checkpoints':        'training.checkpoints',
    'ReIDInterpretation': 'explain.interpretation',
    'Gallery':            'gallery.gallery',
    'Runtime':            'export.onnx_runtime',
    'load_pretrained':    'export.pretrained_models',
    'synth_persons':      'synth.dataset',
}
__all__ = list(_HOMES)

def add_learner_methods():
    "Import every room that adds methods to a learner; a learner asks for it when it is unpickled"
    import_module('pyramidreid.all')

def __getattr__(name):
    if name in _HOMES: return getattr(import_module(f'pyramidreid.{_HOMES[name]}'), name)
    if name=='__version__':
        from .core import installed_version
        return installed_version('pyramidreid')
    raise AttributeError(f"module 'pyramidreid' has no attribute {name!r}; other names are imported from their room, "
                         "e.g. from pyramidreid.data.tables import hold_out")

def __dir__(): return sorted([*globals(), *_HOMES, '__version__'])
