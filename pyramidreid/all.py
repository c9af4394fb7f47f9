"Everything a notebook needs: `from pyramidreid.all import *`"
from fastai.vision.all import *
from pyramidreid.backbone import *
from pyramidreid.core import *
from pyramidreid.data import *
from pyramidreid.dynamic import *
from pyramidreid.evaluation import *
from pyramidreid.learner import *
from pyramidreid.losses import *
from pyramidreid.pyramid import *
from pyramidreid.released import *
from pyramidreid.results import *
from pyramidreid.sampler import *
from pyramidreid.synth import contact_sheet,synth_persons
from pyramidreid.tables import *
