"What several test files share: a few synthetic people, and a small learner trained on them"
import signal
import sys
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import pytest
from fastai.vision.all import set_seed
from toys import quiet

from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.models.backbone import resnet10
from pyramidreid.synth.dataset import synth_persons
from pyramidreid.training.learner import pyramid_learner

SIZE = (96,48)

@pytest.fixture(scope='session')
def people(tmp_path_factory):
    "Folder in Market's layout: 12 training and 6 test people, 4 cameras, 4 distractors, 2 junk images"
    return synth_persons(path=tmp_path_factory.mktemp('data')/'people', n_train=12, n_test=6, size=SIZE, distractors=4, junk=2)

@pytest.fixture(scope='session')
def make_dls(people):
    "`make_dls(**kwargs)`: fresh loaders of `people`, 4×4 to a batch, without workers"
    def make(**kwargs): return ReIDDataLoaders.from_market(people, **{**dict(p=4, k=4, size=(48,24), num_workers=0), **kwargs})
    return make

@pytest.fixture(scope='session')
def make_learner(make_dls, tmp_path_factory):
    "`make_learner(dls=None, **kwargs)`: a fresh untrained learner in a folder of its own, quiet"
    def make(dls=None, **kwargs):
        set_seed(0)
        learn = pyramid_learner(make_dls() if dls is None else dls, kwargs.pop('arch', resnet10),
                                **{**dict(pretrained=False, n_parts=3, emb_sz=8, path=tmp_path_factory.mktemp('learner'), lr=3e-3), **kwargs})
        return quiet(learn)
    return make

@pytest.fixture(scope='session')
def trained(make_learner):
    "A learner after one short epoch, for tests that do not change it"
    learn = make_learner()
    learn.fit(1)
    return learn

@pytest.fixture(autouse=True)
def _close_figures():
    yield
    import matplotlib.pyplot as plt
    plt.close('all')

@pytest.fixture(scope='session', autouse=True)
def heard():
    "Ctrl-C is heard also where the tests were started in the background, which makes a process and its children deaf to it"
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
