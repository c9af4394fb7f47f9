"BNNeck: heads with `neck=True` against a second version, and everything that describes, keeps or exports their models"
import json
import pickle
import re

import numpy as np
import pytest
import torch
from fastai.vision.all import resnet18, set_seed
from safetensors.torch import load_file
from toys import quiet
from torch.nn import functional as F

import pyramidreid.gallery.gallery as gallery_module
from pyramidreid.core import ReIDWarning
from pyramidreid.export.model_files import describe_model, learner_from, load_embedder, read_description
from pyramidreid.export.onnx_runtime import Runtime
from pyramidreid.gallery.gallery import Gallery
from pyramidreid.models.backbone import resnet10
from pyramidreid.models.fingerprints import fingerprint, learner_fingerprint
from pyramidreid.models.pyramid import PyramidHead, PyramidNet, has_neck, pool_windows
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.recipes import *

# ---- the head

class NeckOfTheBenchmark(PyramidHead):
    "The first version, which `benchmarks/weighting.py` measured: a head with biases that are not trained"
    def reduced(self, fmap): return self.reduce(pool_windows(fmap, self.n_parts, self.levels)).transpose(0,1)
    def normed(self, x): return self.bn(x.flatten(1)).view_as(x)
    def features(self, fmap): return self.normed(self.reduced(fmap))
    def forward(self, fmap):
        x = self.reduced(fmap)
        return x,self.classify(self.drop(self.normed(x)).transpose(0,1)).transpose(0,1)

def add_neck(learn):
    head = learn.model.head
    head.__class__ = NeckOfTheBenchmark
    head.bn.bias.requires_grad_(False)
    head.classify.bias.requires_grad_(False)

@pytest.mark.parametrize('dynamic', [False,True])
def test_training_gives_the_weights_of_the_benchmark_s_neck(make_learner, dynamic):
    first,neck = make_learner(dynamic=dynamic),make_learner(dynamic=dynamic, neck=True)
    add_neck(first)
    for learn in (first,neck):
        set_seed(1)
        learn.fit_one_cycle(1)
    weights = first.model.state_dict()
    for name in ('head.bn.bias','head.classify.bias'): assert not weights.pop(name).any()
    found = neck.model.state_dict()
    assert list(found)==list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
    assert torch.equal(neck.embed(), first.embed())
