"""Training with channels last, `learn.to_channelslast(use_amp=False)`: the numbers of contiguous training within
rounding, and everything around a fit works with it"""
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import load_learner
from fastai.optimizer import SGD
from fastai.torch_core import apply
from fastai.vision.all import set_seed
from ranks import tiny
from torch.nn import functional as F

from pyramidreid.export.model_files import *
from pyramidreid.export.onnx_runtime import Runtime, load_pixels
from pyramidreid.models.losses import PyramidLoss
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.recipes import *

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*legacy')

@pytest.fixture(scope='session')
def make_pair(make_learner):
    "Two equal learners, contiguous and channels last"
    def make(**kwargs):
        contiguous,last = (make_learner(arch=tiny, **kwargs) for _ in range(2))
        last.to_channelslast(use_amp=False)
        return contiguous,last
    return make

@pytest.fixture(scope='module')
def pair(make_pair):
    "The two after one epoch, for tests that do not change them"
    contiguous,last = make_pair()
    for learn in (contiguous,last): train(learn, 'fit')
    return contiguous,last

FITS = dict(fit=lambda learn, **kwargs: learn.fit(1, **kwargs),
            fit_paper=lambda learn, **kwargs: learn.fit_paper(2, .001, .01, **kwargs),
            fit_modern=lambda learn, **kwargs: learn.fit_modern(2, .001, .01, **kwargs)) # with averaged weights

def seed(learn):
    "The same random numbers for each learner"
    set_seed(1)
    learn.dls.train.rng.seed(1)

def train(learn, fit, **kwargs):
    seed(learn)
    FITS[fit](learn, **kwargs)
    return learn

def filters(learn): return [m.weight for m in learn.model.body.modules() if isinstance(m, torch.nn.Conv2d)]

def is_channels_last(learn):
    "Are the filters channels last, those with which the two formats differ?"
    differing = [w for w in filters(learn) if w.shape[1]>1 and w.shape[2]>1]
    assert differing
    return all(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in differing)

def assert_same_weights(got, want, **tolerance):
    got,want = got.model.state_dict(),want.model.state_dict()
    assert got.keys()==want.keys()
    torch.testing.assert_close(got, want, **tolerance)

def assert_equal_weights(got, want): assert_same_weights(got, want, atol=0, rtol=0)

class SmoothLoss(PyramidLoss):
    "The ID loss alone, in double precision: no pair becomes the hardest, and no rule switches, by a rounding"
    part_names = ('id',)
    def _training_parts(self, feats, logits, labels, wanted):
        targets = labels[:,None].expand(logits.shape[:2])
        total = F.cross_entropy(logits.transpose(1, 2), targets, reduction='sum')
        self.parts['id'] = (total/len(labels)).float() # fastai's recorder takes no other

class InDouble(Callback):
    "Images in double precision"
    def before_batch(self): self.learn.xb = tuple(x.double() for x in self.xb)

def losses_of(learn): return torch.stack(list(learn.recorder.losses)).double()

@pytest.mark.parametrize('fit', FITS)
def test_the_same_numbers_in_double_precision(make_pair, fit):
    "Losses of all steps, and weights at the end; `fit_modern` leaves their averages"
    pair = make_pair(loss_func=SmoothLoss(), dynamic=False, cbs=InDouble, metrics=[])
    for learn in pair:
        learn.model.double()
        train(learn, fit)
    contiguous,last = pair
    assert is_channels_last(last) and not is_channels_last(contiguous)
    assert len(last.recorder.losses)>=8
    torch.testing.assert_close(losses_of(last), losses_of(contiguous), atol=0, rtol=1e-6)
    assert_same_weights(last, contiguous, atol=1e-9, rtol=1e-9)

def test_a_step_in_single_precision_differs_by_rounding(make_pair):
    "With both losses; the difference of the weights is the gradient"
    results = []
    for learn in make_pair(dynamic=False, neck=False, opt_func=SGD):
        before = {name: p.detach().clone() for name,p in learn.model.named_parameters()}
        seed(learn)
        learn.fit(1, 1., cbs=StopAfterOne(), wd=0)
        change = torch.cat([(p-before[name]).flatten() for name,p in learn.model.named_parameters()])
        results.append((losses_of(learn), change))
    (got_losses,got),(want_losses,want) = reversed(results)
    torch.testing.assert_close(got_losses, want_losses, atol=0, rtol=1e-6)
    assert want.norm()>0 and (got-want).norm() < 2e-3*want.norm()

class StopAfterOne(Callback):
    order = 90
    def after_batch(self):
        if self.training: raise CancelFitException

def test_save_and_load_in_either_direction(pair, make_learner):
    contiguous,last = pair
    file = last.save('last')
    fresh = make_learner(arch=tiny).load(file)
    assert_equal_weights(fresh, last)
    assert not is_channels_last(fresh)
    torch.testing.assert_close(fresh.embed(), last.embed(), atol=1e-5, rtol=0)
    again = make_learner(arch=tiny)
    again.to_channelslast(use_amp=False)
    again.load(contiguous.save('contiguous'))
    assert_equal_weights(again, contiguous)
    train(again, 'fit')
    assert is_channels_last(again)

def test_training_goes_on_from_a_file_of_either_format(make_learner, pair):
    "Weights and the optimizer's state are of the other format then"
    _,last = pair
    file = last.save('of_last')
    content = torch.load(file, weights_only=True)
    contiguous = file.with_name('of_last_contiguous.pth')
    torch.save(apply(lambda x: x.contiguous() if isinstance(x, torch.Tensor) else x, content), contiguous)
    results = []
    for name in (file, contiguous):
        learn = make_learner(arch=tiny)
        learn.to_channelslast(use_amp=False)
        results.append(train(learn.load(name), 'fit'))
        assert is_channels_last(learn)
    assert_same_weights(*results, atol=1e-6, rtol=1e-6)

def some_images(learn):
    "Eight images of the validation set, and their embeddings"
    images = learn.dls.valid.items.iloc[:8]
    return images,learn.embed(learn.dls.test_dl(images))

def test_a_pickled_learner_and_a_model_folder(pair, tmp_path, monkeypatch):
    "They embed as the learner does. fastai's `load_learner` makes it contiguous for a CPU"
    _,last = pair
    monkeypatch.setattr(last, 'path', tmp_path)
    images,want = some_images(last)
    last.export('learner.pkl')
    for on_cpu in (True,False):
        learn = load_learner(tmp_path/'learner.pkl', cpu=on_cpu)
        assert is_channels_last(learn)==bool(learn._grab_cbs(ChannelsLast))==(not on_cpu)
        torch.testing.assert_close(learn.embed(last.dls.test_dl(images)), want, atol=1e-5, rtol=0)
    embedder = load_embedder(last.save_model(tmp_path/'m'), arch=tiny)
    torch.testing.assert_close(torch.as_tensor(embedder.embed(images.fn)), want, atol=2e-5, rtol=0)
    assert is_channels_last(last)

@pytest.mark.slow
def test_exported_programs(pair, tmp_path):
    "ONNX and `.pt2` embed as the learner does"
    pytest.importorskip('onnxruntime')
    _,last = pair
    images,want = some_images(last)
    found = Runtime(last.to_onnx(tmp_path/'m.onnx')).embed(images.fn)
    torch.testing.assert_close(torch.as_tensor(found), want, atol=2e-5, rtol=0)
    program = torch.export.load(last.to_exported(tmp_path/'m.pt2')).module()
    pixels = torch.from_numpy(load_pixels(images.fn, (48,24)))
    torch.testing.assert_close(program(pixels), want, atol=2e-5, rtol=0)
    assert is_channels_last(last)

class Interrupt(Checkpoints):
    "Ctrl-C in the second epoch, after the first has been written"
    def before_batch(self):
        if self.training and self.epoch==1: raise KeyboardInterrupt

@pytest.mark.parametrize('fit', [pytest.param('fit_paper', marks=pytest.mark.slow), 'fit_modern'])
def test_resumed_runs_end_with_identical_weights(make_pair, fit, tmp_path):
    _,whole = make_pair()
    _,cut = make_pair()
    _,again = make_pair()
    train(whole, fit, cbs=Checkpoints(tmp_path/'whole'))
    with pytest.raises(KeyboardInterrupt): train(cut, fit, cbs=Interrupt(tmp_path/'cut'))
    train(again, fit, cbs=Checkpoints(tmp_path/'cut', resume=True))
    assert_equal_weights(again, whole)
    assert is_channels_last(again)

def test_back_to_contiguous(make_pair):
    _,last = make_pair()
    train(last, 'fit')
    want = last.embed()
    last.to_contiguous()
    assert not is_channels_last(last) and not last._grab_cbs(ChannelsLast)
    torch.testing.assert_close(last.embed(), want, atol=1e-5, rtol=0)

def assert_close_start(got, want):
    "The first loss is equal within rounding; a step of Adam, which divides small gradients by small ones, enlarges it"
    torch.testing.assert_close(losses_of(got)[:1], losses_of(want)[:1], atol=0, rtol=1e-4)
    torch.testing.assert_close(losses_of(got)[:2], losses_of(want)[:2], atol=0, rtol=1e-2)

@pytest.mark.slow
def test_compiled(make_pair):
    contiguous,last = make_pair()
    for part in (last.model.body, last.model.head): part.compile()
    for learn in (contiguous,last): train(learn, 'fit')
    assert is_channels_last(last)
    assert_close_start(last, contiguous)

@pytest.mark.slow
def test_depthwise_convolutions(make_learner):
    "The same numbers with EfficientNet-Lite0"
    pair = [make_learner(arch='tf_efficientnet_lite0') for _ in range(2)]
    pair[1].to_channelslast(use_amp=False)
    for learn in pair: train(learn, 'fit')
    assert is_channels_last(pair[1])
    assert_close_start(pair[1], pair[0])
