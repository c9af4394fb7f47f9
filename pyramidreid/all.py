"""Everything a notebook needs: `from pyramidreid.all import *` gives all of fastai.vision and the names below.
What is not among them is imported from its room, e.g. `from pyramidreid.data.sampler import pk_idxs`."""
from fastai.vision.all import *

# Imported for the methods that they add to a learner
