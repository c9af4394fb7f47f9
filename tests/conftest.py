"What several test files share: a few synthetic people, and a small learner trained on them"
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import pytest

matplotlib.use('Agg')
sys.path.append(str(Path(__file__).parents[1]/'benchmarks')) # which have tests, too

from fastai.vision.all import set_seed  # noqa: E402
from toys import quiet  # noqa: E402

from pyramidreid.data.loaders import ReIDDataLoaders  # noqa: E402
from pyramidreid.models.backbone import resnet10  # noqa: E402
from pyramidreid.synth.dataset import synth_persons  # noqa: E402
from pyramidreid.training.learner import pyramid_learner  # noqa: E402

SIZE = (96, 48)
LOADERS = dict(p=4, k=4, size=(48,24), num_workers=0)
LEARNER = dict(pretrained=False, n_parts=3, emb_sz=8, lr=3e-3)

def pytest_configure(config):
    "Most tests need no trained model; those that are about the warning use `pytest.warns`"
    config.addinivalue_line('filterwarnings', 'ignore:This model has not been trained')
    if not hasattr(config, 'workerinput'): use_own_temporary_folder(config)

def use_own_temporary_folder(config):
    "Keep the temporary files of this run and its workers in one folder that goes with it: they come to gigabytes"
    folder = tempfile.TemporaryDirectory(prefix='reid-', ignore_cleanup_errors=True)
    os.environ['TMPDIR'] = tempfile.tempdir = folder.name
    config.add_cleanup(folder.cleanup)

def pytest_runtest_setup(item):
    "Skip slow tests that have not begun by `SLOW_TESTS_UNTIL`, in Unix seconds: `.ci/run` has limited time"
    until = os.environ.get('SLOW_TESTS_UNTIL')
    if until and item.get_closest_marker('slow') and time.time()>float(until):
        pytest.skip('the time for slow tests is over')

@pytest.fixture(scope='session')
def people(tmp_path_factory):
    "Folder in Market's layout: 12 training and 6 test people, 4 cameras, 4 distractors, 2 junk images"
    path = tmp_path_factory.mktemp('data')/'people'
    return synth_persons(path=path, n_train=12, n_test=6, size=SIZE, distractors=4, junk=2)

@pytest.fixture(scope='session')
def make_dls(people):
    "`make_dls(**kwargs)`: fresh loaders of `people`, 4×4 to a batch, without workers"
    def make(**kwargs): return ReIDDataLoaders.from_market(people, **{**LOADERS, **kwargs})
    return make

@pytest.fixture(scope='session')
def make_learner(make_dls, tmp_path_factory):
    "`make_learner(dls=None, **kwargs)`: a fresh untrained learner in a folder of its own, quiet"
    def make(dls=None, arch=resnet10, **kwargs):
        set_seed(0)
        dls = make_dls() if dls is None else dls
        settings = {**LEARNER, 'path': tmp_path_factory.mktemp('learner'), **kwargs}
        return quiet(pyramid_learner(dls, arch, **settings))
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
def interruptible():
    "Ctrl-C reaches tests started in the background, too, where a process and its children ignore it by default"
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
