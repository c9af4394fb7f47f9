"Pyramidal person re-identification with multi-loss dynamic training, as a fastai library."
from importlib.metadata import version

__version__ = version("pyramidreid")
