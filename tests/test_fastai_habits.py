"What a fastai user types without thinking: it works as in fastai, or says why it cannot"
import importlib
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import cloudpickle
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from fastai.data.transforms import RandomSplitter
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.vision.all import (
    ActivationStats,
    BnFreeze,
    Callback,
    CategoryBlock,
    ChannelsLast,
    CollectDataCallback,
    CSVLogger,
    CutMix,
    DataBlock,
    EarlyStoppingCallback,
    FetchPredsCallback,
    GradientAccumulation,
    GradientClip,
    ImageBlock,
    MCDropoutCallback,
    MixedPrecision,
    MixUp,
    ProgressCallback,
    ReduceLROnPlateau,
    Resize,
    SaveModelCallback,
    ShortEpochCallback,
    ShowGraphCallback,
    TerminateOnNaNCallback,
    get_image_files,
    parent_label,
)
from nbclient import NotebookClient
from ranks import tiny
from torch import nn

import pyramidreid.all
from pyramidreid.core import show_once
from pyramidreid.data.loaders import ReIDDataLoaders
from pyramidreid.models.losses import PyramidLoss
from pyramidreid.training.checkpoints import Checkpoints
from pyramidreid.training.learner import ReIDLearner, pyramid_learner
from pyramidreid.training.metrics import mAP, rank1

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*CUDA', 'ignore:.*GradScaler', 'ignore:.*cuda')

@pytest.fixture(scope='session')
def make_tiny_learner(make_learner):
    "`make_learner` with a network of few channels"
    def make(dls=None, **kwargs): return make_learner(dls, **{'arch':tiny, **kwargs})
    return make

@pytest.fixture(scope='module')
def fitted(make_tiny_learner):
    "A learner after one epoch, for tests that do not change it"
    learn = make_tiny_learner()
    learn.fit(1)
    return learn

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def copied(model): return {k:v.clone() for k,v in model.state_dict().items()}

# get_preds

LOSS_OF_EACH = [lambda learn: learn.get_preds(with_loss=True), lambda learn: learn.get_preds(ds_idx=0, with_loss=True),
                Interpretation.from_learner, ClassificationInterpretation.from_learner]

@pytest.mark.parametrize('ask', LOSS_OF_EACH)
def test_a_loss_of_each_image_is_refused_with_a_pointer(fitted, ask):
    before = copied(fitted.model)
    with pytest.raises(ValueError, match='no loss of single images.*ReIDInterpretation'): ask(fitted)
    assert isinstance(fitted.loss_func, PyramidLoss) and same(copied(fitted.model), before)
    fitted.validate() # still works

class LossWithReduction(PyramidLoss):
    "A loss of one's own that knows a value for each image"
    reduction = 'mean'
    def forward(self, pred, target):
        if isinstance(pred, tuple): return super().forward(pred, target)
        losses = pred.square().sum(1)*2
        return losses.mean() if self.reduction=='mean' else losses

def test_a_loss_with_a_reduction_is_asked(make_tiny_learner):
    learn = make_tiny_learner(loss_func=LossWithReduction(), norm=None)
    emb,_,losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(losses, 2*emb.square().sum(1))
    assert learn.loss_func.reduction=='mean'

def test_get_preds_returns_images_embeddings_and_targets_in_order(fitted):
    images,emb,targets,decoded = fitted.get_preds(with_input=True, with_decoded=True)
    items = fitted.dls.valid.items
    assert images.shape==(len(items),3,48,24)
    torch.testing.assert_close(emb, fitted.embed())
    assert torch.equal(decoded, emb)
    assert targets.tolist()==items[['label','camera','role']].to_numpy().tolist()

def test_get_preds_without_labels(fitted):
    emb,targets = fitted.get_preds(dl=fitted.dls.test_dl(list(fitted.dls.valid.items.fn[:5])))
    torch.testing.assert_close(emb, fitted.embed()[:5])
    assert targets is None

# Trackers: their packages are stood in for, the callbacks are fastai's own

class Writer:
    "Stands in for TensorBoard's `SummaryWriter`; it traces the model as the real one does"
    made = []
    def __init__(self, log_dir=None):
        self.scalars,self.figures,self.closed = [],[],False
        Writer.made.append(self)
    def add_graph(self, model, *inputs):
        training = model.training
        model.train(False)
        try: trace = torch.jit.trace(model, *inputs, strict=True)
        finally: model.train(training)
        torch._C._jit_pass_inline(trace.graph)
        self.nodes = len(list(trace.graph.nodes()))
    def add_scalar(self, name, value, step): self.scalars.append((name, float(value), step))
    def add_figure(self, name, figure, step):
        assert not self.closed
        self.figures.append((name, figure, step))
    def close(self): self.closed = True

@pytest.fixture
def tensorboard(monkeypatch):
    "The module of fastai's TensorBoard callbacks"
    package,writers = types.ModuleType('tensorboard'),types.ModuleType('torch.utils.tensorboard')
    writers.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, 'tensorboard', package)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', writers)
    monkeypatch.setattr(Writer, 'made', [])
    monkeypatch.delitem(sys.modules, 'fastai.callback.tensorboard', raising=False)
    yield importlib.import_module('fastai.callback.tensorboard')
    sys.modules.pop('fastai.callback.tensorboard')

class Wandb(types.ModuleType):
    "Stands in for the package wandb"
    def __init__(self):
        super().__init__('wandb')
        self.run = types.SimpleNamespace(step=0, summary={'epoch':0})
        self.config = types.SimpleNamespace(update=self._update)
        self.logged,self.settings = [],None
        self.Image = lambda image, **kwargs: image
        self.Table = lambda **kwargs: None
    def _update(self, settings, allow_val_change): self.settings = settings
    def log(self, values, step=None): self.logged.append((values, step))
    def watch(self, model, log): self.watched = log

@pytest.fixture
def wandb(monkeypatch):
    "The stand-in for wandb, with fastai's callback"
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, 'wandb', stand_in)
    monkeypatch.delitem(sys.modules, 'fastai.callback.wandb', raising=False)
    stand_in.WandbCallback = importlib.import_module('fastai.callback.wandb').WandbCallback
    yield stand_in
    sys.modules.pop('fastai.callback.wandb')

def ranking_titles(fig): return [ax.get_title() for ax in fig.axes]

def test_tensorboard_with_its_defaults(make_tiny_learner, tensorboard):
    "Given as a class, as fastai allows"
    learn,n_open = make_tiny_learner(),len(plt.get_fignums())
    learn.fit(2, cbs=tensorboard.TensorBoardCallback)
    writer, = Writer.made
    n = len(learn.dls.train)
    assert writer.nodes and writer.closed
    assert [step for name,_,step in writer.scalars if name=='mAP']==[n,2*n]
    last_row = dict(zip(list(learn.recorder.metric_names)[1:], learn.recorder.values[-1]))
    for name in ('valid_loss','id_loss','mAP','rank5'):
        logged = [value for logged_name,value,_ in writer.scalars if logged_name==name]
        assert logged[-1]==pytest.approx(last_row[name])
    (name,fig,step), = writer.figures
    titles = ranking_titles(fig)
    assert (name,step)==('Ranking',2*n) and len(titles)==4*11
    assert all(o.startswith('query') for o in titles[::11]) and any(o[:1]=='✓' for o in titles)
    assert len(plt.get_fignums())==n_open

def test_a_tracker_is_quiet_beside_the_fit(make_tiny_learner, tensorboard):
    learn = make_tiny_learner(cbs=tensorboard.TensorBoardCallback(trace_model=False))
    learn.lr_find(num_it=4, show_plot=False)
    learn.get_preds()
    learn.validate()
    assert not any(writer.figures for writer in Writer.made)
    for _ in range(2): learn.fit(1)
    assert [len(writer.figures) for writer in Writer.made if writer.figures]==[1,1]

def test_without_predictions_to_log_there_is_no_ranking(make_tiny_learner, tensorboard):
    learn = make_tiny_learner()
    learn.fit(1, cbs=tensorboard.TensorBoardCallback(log_preds=False))
    assert not Writer.made[0].figures and Writer.made[0].closed

def test_the_projector_is_refused(fitted, tensorboard):
    "In fastai 2.8 it also fails with a layer that is given, for images of any kind"
    cbs = list(fitted.cbs)
    for cb in (tensorboard.TensorBoardCallback(projector=True), tensorboard.TensorBoardProjectorCallback()):
        with pytest.raises(ValueError, match='projector.*plot_embeddings'): fitted.add_cb(cb)
    assert list(fitted.cbs)==cbs

EVERY_EPOCH = pytest.param(dict(log='all', log_preds_every_epoch=True), marks=pytest.mark.slow)

@pytest.mark.parametrize('kwargs', [{}, EVERY_EPOCH])
def test_wandb_with_its_defaults(make_tiny_learner, wandb, kwargs, capsys):
    learn = make_tiny_learner()
    learn.fit(2, cbs=wandb.WandbCallback(**kwargs))
    assert 'not able' not in capsys.readouterr().out
    rows = [values for values,_ in wandb.logged if 'mAP' in values]
    assert [row['mAP'] for row in rows]==[row[4] for row in learn.recorder.values]
    assert sum('train_loss' in values for values,_ in wandb.logged)==2*len(learn.dls.train)
    fig, = [values['Ranking'] for values,_ in wandb.logged if 'Ranking' in values]
    assert len(ranking_titles(fig))==4*11
    settings = wandb.settings
    assert (settings['p'],settings['k'],settings['bs'],settings['identities'])==(4,4,16,12)
    assert settings['loss']['margin']==1.4 and settings['backbone']=='tiny' and settings['frozen']=='False'
    assert settings['callbacks']['dynamic_loss_weights']
    assert settings['parameters']==sum(p.numel() for p in learn.model.parameters())

@pytest.mark.parametrize('given', [False,True])
def test_wandb_saves_the_best_model(make_tiny_learner, wandb, monkeypatch, given):
    "fastai asks whether the learner has an attribute `save_model`, which here is always true, as it is a method, too"
    saved = []
    monkeypatch.setattr(sys.modules['fastai.callback.wandb'], 'log_model', lambda path,**kwargs: saved.append(path))
    cbs = [SaveModelCallback('mAP', fname='given')] if given else []
    learn = make_tiny_learner(cbs=[*cbs, wandb.WandbCallback(log_model=True)])
    learn.fit(1)
    assert saved==[learn.path/'models'/('given.pth' if given else 'model.pth')]
    named = make_tiny_learner(cbs=[*cbs, wandb.WandbCallback(log_model=True, model_name='best')])
    assert [cb.fname for cb in named.cbs if isinstance(cb, SaveModelCallback)]==['best']

def test_wandb_needs_a_callback_that_saves(make_tiny_learner, wandb):
    learn = make_tiny_learner()
    with pytest.raises(ValueError, match='SaveModelCallback'): learn.fit(1, cbs=wandb.WandbCallback(log_model=True))

def test_no_other_callback_has_the_name_of_a_method():
    "A callback hides what a learner has under its name"
    classes = [o for o in vars(importlib.import_module('fastai.vision.all')).values() if isinstance(o, type)]
    names = {o.__name__:o().name for o in classes if issubclass(o, Callback) and o.__name__!='Callback' and makes(o)}
    assert len(names)>20
    assert {name for name in names.values() if hasattr(ReIDLearner, name)}=={'save_model'}

def makes(cls):
    "Can a callback be made without arguments?"
    try: cls()
    except TypeError: return False
    return True

@pytest.mark.slow
def test_a_model_can_be_shared_beside_save_model_callback(make_learner, tmp_path):
    "Both are called `learn.save_model`: a name of a folder is for the method, all else for the callback"
    learn = make_learner(cbs=SaveModelCallback('mAP', fname='best'))
    learn.fit(1)
    assert learn.save_model.best>0 and learn.save_model.fname=='best'
    learn.save_model(tmp_path/'shared')
    assert (tmp_path/'shared').is_dir() and any((tmp_path/'shared').iterdir())
    learn.fit(1)
    assert pickle.loads(pickle.dumps(learn.save_model.__class__)) is type(learn.save_model)

CALLBACKS = [
    lambda path: CSVLogger(fname=path/'log.csv'),
    lambda path: ShortEpochCallback(.3),
    lambda path: GradientClip(),
    lambda path: GradientAccumulation(32),
    lambda path: BnFreeze(),
    lambda path: CollectDataCallback(),
    lambda path: ActivationStats(with_hist=True),
    lambda path: TerminateOnNaNCallback(),
    lambda path: ReduceLROnPlateau('mAP'),
    lambda path: EarlyStoppingCallback('mAP', patience=5),
    lambda path: SaveModelCallback('mAP', fname=path/'best'),
    lambda path: SaveModelCallback('mAP', fname=path/'each', every_epoch=True, with_opt=True),
    lambda path: MixedPrecision(),
    lambda path: ChannelsLast(),
    lambda path: FetchPredsCallback(),
    lambda path: [ProgressCallback(),ShowGraphCallback()],
    lambda path: [ProgressCallback(),CSVLogger(fname=path/'log.csv')]]

@pytest.mark.parametrize('make', CALLBACKS)
def test_the_other_callbacks_of_fastai(make_dls, make_tiny_learner, make, tmp_path):
    learn = make_tiny_learner(make_dls(k=8, val_bs=80))
    learn.fit(1, cbs=make(tmp_path))
    assert len(learn.recorder.values)==1
    assert learn.evaluate().mAP>0

def test_dropout_at_prediction(fitted):
    "fastai's `MCDropoutCallback`; the pyramid's dropout acts on the classifiers alone, so embeddings stay as they are"
    torch.testing.assert_close(fitted.get_preds(cbs=MCDropoutCallback())[0], fitted.embed())

# Mixed images, and loaders of another kind

@pytest.mark.parametrize('mixing', [MixUp, MixUp(.4), CutMix(1.)])
def test_mixed_images_are_refused_by_name(make_tiny_learner, mixing):
    name = re.escape(getattr(mixing, '__name__', type(mixing).__name__))
    learn = make_tiny_learner()
    cbs = list(learn.cbs)
    for add in (learn.add_cb, lambda cb: learn.fit(1, cbs=cb), lambda cb: make_tiny_learner(cbs=cb)):
        with pytest.raises(ValueError, match=f'{name} blends images of two people'): add(mixing)
    assert list(learn.cbs)==cbs
    learn.fit(1)

def test_other_loaders_are_refused_at_construction(people):
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=RandomSplitter(seed=0), item_tfms=Resize(32))
    plain = block.dataloaders(people, bs=4, num_workers=0)
    with pytest.raises(ValueError, match='needs ReIDDataLoaders.*not (Image)?DataLoaders.*from_folder'):
        pyramid_learner(plain, tiny, pretrained=False)
    with pytest.raises(ValueError, match='needs ReIDDataLoaders.*not list'): pyramid_learner([1], tiny)

# Arguments of the loaders

REFUSED = [
    (dict(bs=16), 'choose p and k'), (dict(batch_size=16), 'choose p and k'), (dict(shuffle=False), "mode='random'"),
    (dict(val_shuffle=True), 'in order'), (dict(drop_last=True), 'always full'), (dict(dl_type=None), 'PKDataLoader')]

@pytest.mark.parametrize('kwargs,reason', REFUSED)
def test_arguments_without_an_effect_are_refused(make_dls, kwargs, reason):
    (name,_), = kwargs.items()
    with pytest.raises(ValueError, match=f'^{name}=.*{reason}'): make_dls(**kwargs)

@pytest.mark.parametrize('name,hint', [('valid_pc', "; did you mean 'valid_pct'?"), ('nonsense', '')])
def test_unknown_arguments_are_refused(make_dls, name, hint):
    with pytest.raises(TypeError) as e: make_dls(**{name:1})
    assert str(e.value)==f"The loaders take no argument {name!r}{hint}"

def test_arguments_with_an_effect(make_dls):
    dls = make_dls(val_bs=5, pin_memory=False, device='cpu')
    assert dls.valid.bs==5 and dls.train.bs==16 and dls.test_dl(list(dls.valid.items.fn[:7]), bs=3).bs==3

def test_vocab_is_the_people_trained_on(fitted, people, tmp_path):
    trained_on = sorted({int(file.name.split('_')[0]) for file in (people/'bounding_box_train').glob('*.jpg')})
    dls = fitted.dls
    assert list(dls.vocab)==trained_on and len(dls.vocab)==dls.c==12
    assert [dls.vocab.o2i[pid] for pid in dls.train.items.pid]==dls.train.items.label.tolist()

# Grids of images

def grid_of(fig):
    "Titles of a figure's axes, by row and column"
    rows = {}
    for ax in fig.axes: # in the order in which they were made, row by row
        rows.setdefault(ax.get_subplotspec().rowspan.start, []).append(ax.get_title())
    return list(rows.values())

def pids_of(titles): return {title.split(' · ')[0] for title in titles}

GRIDS = [(dict(nrows=2, ncols=3), [3,3]), (dict(nrows=3), [4,4,4]), (dict(ncols=2), [2,2,2,2]),
         (dict(nrows=2, ncols=3, max_n=5), [3,2]), (dict(nrows=4, ncols=4), [4,4,4,4]),
         (dict(nrows=9, ncols=9), [4,4,4,4])]

@pytest.mark.parametrize('kwargs,shape', GRIDS)
def test_the_grid_of_a_training_batch(make_dls, kwargs, shape):
    "One person in each row"
    make_dls().show_batch(**kwargs, figsize=(5,4))
    grid = grid_of(plt.gcf())
    assert [len(row) for row in grid]==shape and plt.gcf().get_size_inches().tolist()==[5,4]
    assert all(len(pids_of(row))==1 for row in grid) and len(set.union(*map(pids_of, grid)))==len(grid)

PLAIN_GRIDS = [(dict(nrows=2, ncols=3), [3,3]), (dict(nrows=1, ncols=4), [4]), (dict(nrows=2, max_n=7), [4,3]),
               (dict(ncols=5, max_n=7), [5,2]), (dict(max_n=9), [5,4]), (dict(nrows=7, ncols=7), [7]*7)]

@pytest.mark.parametrize('kwargs,shape', PLAIN_GRIDS)
def test_the_grid_of_a_validation_batch(make_dls, kwargs, shape):
    "In their own order"
    dls = make_dls()
    dls.valid.show_batch(**kwargs)
    grid = grid_of(plt.gcf())
    assert [len(row) for row in grid]==shape
    pids = [title.split(' · ')[0] for row in grid for title in row]
    assert pids==[f'pid {pid}' if pid!=-1 else 'pid junk' for pid in dls.valid.items.pid[:sum(shape)]]

@pytest.mark.parametrize('kwargs', [dict(nrows=0), dict(ncols=-1), dict(max_n=0)])
def test_an_impossible_grid_is_named(make_dls, kwargs):
    (name,value), = kwargs.items()
    with pytest.raises(ValueError, match=f'^{name}={value}'): make_dls().show_batch(**kwargs)

def test_the_grid_of_results(fitted):
    fitted.show_results(nrows=2, ncols=4, figsize=(6,3), seed=0)
    grid = grid_of(plt.gcf())
    assert [len(row) for row in grid]==[4,4] and plt.gcf().get_size_inches().tolist()==[6,3]
    assert all(row[0].startswith('query') and row[1][0] in '✓✗' for row in grid)
    with pytest.raises(ValueError, match='ncols=1'): fitted.show_results(ncols=1)

def test_results_of_the_first_queries(fitted):
    items = fitted.dls.valid.items
    queries = items[items.split=='query'].pid.tolist()
    fitted.show_results(nrows=3, ncols=2, shuffle=False)
    assert [row[0] for row in grid_of(plt.gcf())]==[
        f'query\npid {pid} · c{cam}' for pid,cam in zip(queries[:3], items[items.split=='query'].cam[:3])]

def test_show_results_of_a_loader(fitted):
    "fastai's own `dl.show_results`, which gets a batch and what the model returned"
    batch = fitted.dls.valid.one_batch()
    fitted.dls.valid.show_results(batch, fitted.embed()[:len(batch[0])], max_n=3)
    assert len(plt.gcf().axes)==3

# Figures in notebooks

def run_cells(*sources):
    "Number of pictures that Jupyter shows below each cell"
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=300, kernel_name='python3').execute()
    return [sum('image/png' in output.get('data', {}) for output in cell.outputs) for cell in notebook.cells]

DRAW = """
import matplotlib.pyplot as plt
from pyramidreid.core import show_once
def draw(once=show_once):
    fig,ax = plt.subplots(figsize=(1,1))
    return once(fig)
"""

def test_a_figure_is_shown_once():
    "However the cell is written; without `show_once` the last line of a cell shows it twice"
    habits = {'draw(lambda fig: fig)':2, 'draw()':1, 'draw();':1, 'draw()\nNone':1, 'for _ in range(2): draw()':2,
              'fig = draw()':1, 'fig':1, 'fig = draw()\nfig':1, 'display(draw())':1, 'plt.ioff()\ndraw()':1,
              "import io,pickle\nfig.savefig(io.BytesIO())\npickle.loads(pickle.dumps(draw()))\nNone":0}
    assert run_cells(DRAW, *habits)==[0,*habits.values()]

def test_a_figure_stays_open_for_scripts():
    fig = show_once(plt.figure())
    assert plt.gcf() is fig and plt.get_fignums()==[fig.number]

def test_no_function_returns_a_bare_figure():
    "All of them go through `show_once`; the command line's own pictures are written to files"
    package = Path(pyramidreid.__file__).parent
    bare = [f'{file.name}: {line.strip()}' for file in package.rglob('*.py') for line in file.read_text().splitlines()
            if re.match(r'\s*return fig$', line) and file.parent.name!='cli' and file.name!='core.py']
    assert bare==[]
    assert sum('return show_once(fig)' in file.read_text() for file in package.rglob('*.py'))>=7

@pytest.mark.slow
def test_the_library_s_figures_are_shown_once():
    setup = """
from pyramidreid.all import *
learn = example_learner()
people = synth_persons(n_train=4, n_test=2, size=(96,48))
with learn.no_bar(), learn.no_logging(): learn.fit(1)
interp = ReIDInterpretation.from_learner(learn)
query = learn.dls.valid.items.fn.iloc[0]"""
    plots = ['learn.dynamic_loss_weights.plot()', 'interp.plot_worst(n=2, k=3)', 'interp.plot_embeddings()',
             'interp.plot_camera_pairs()', 'learn.explain(query, query).plot()', 'doctor(people).plot()',
             'contact_sheet(people, n=2)', 'learn.show_results(seed=0)', 'learn.dls.show_batch()']
    assert run_cells(setup, *plots)==[0]+[1]*len(plots)

# Numbers of weights

def n_weights(model): return sum(p.numel() for p in model.parameters())
def total(summary, what='Total params'):
    return int(re.search(rf'^{what}: ([\d,]+)$', summary, re.M)[1].replace(',', ''))

def rows(summary):
    "Layer and number of weights of each row that has some"
    found = re.findall(r'^(\S+|\(not run\))\s+(?:[\dx ]+ )?\s+([\d,]+)  (?:True|False|partly)$', summary, re.M)
    return [(layer,int(n.replace(',', ''))) for layer,n in found]

def test_summary_counts_every_weight(fitted):
    summary = fitted.summary()
    assert total(summary)==n_weights(fitted.model)==sum(n for _,n in rows(summary))
    assert total(summary, 'Total trainable params')==total(summary)
    branches,emb_sz,ids = fitted.model.head.classify.weight.shape
    assert ('BranchLinear', branches*ids*emb_sz) in rows(summary) # After a BNNeck, without bias
    for text in ('1 x 3 x 48 x 24', 'PyramidLoss', 'DynamicLossWeights', 'Model unfrozen'): assert text in summary

def test_summary_of_a_frozen_model_and_of_weights_that_are_not_run(make_tiny_learner):
    learn = make_tiny_learner()
    learn.model.scale,learn.model.unused = nn.Parameter(torch.zeros(3,5)),nn.Linear(3, 5)
    learn.freeze()
    summary = learn.summary()
    assert total(summary)==n_weights(learn.model) and {('PyramidNet',15),('(not run)',20)} <= set(rows(summary))
    frozen = total(summary, 'Total non-trainable params')
    assert frozen==sum(p.numel() for p in learn.model.parameters() if not p.requires_grad)>0
    assert 'Model frozen up to parameter group #2' in summary

def test_summary_disturbs_nothing(make_tiny_learner):
    "fastai's one runs `before_fit` of all callbacks"
    learn = make_tiny_learner(cbs=[SaveModelCallback('mAP'),Checkpoints()])
    learn.fit(1)
    before,best,steps = copied(learn.model),learn.save_model.best,len(learn.dynamic_loss_weights.steps)
    learn.summary()
    assert same(copied(learn.model), before) and learn.save_model.best==best
    assert len(learn.dynamic_loss_weights.steps)==steps and len(learn.recorder.values)==1

# Names of metrics

def test_a_metric_of_another_distance_has_its_own_name(make_tiny_learner):
    metrics = [mAP,mAP('euclidean'),rank1('euclidean')]
    learn = make_tiny_learner(metrics=metrics, norm=None, cbs=SaveModelCallback('mAP_euclidean'))
    learn.fit(1)
    names = list(learn.recorder.metric_names)[1:-1]
    assert names[-3:]==['mAP','mAP_euclidean','rank1_euclidean']
    values = dict(zip(names, learn.recorder.values[-1]))
    euclidean = learn.evaluate(distance='euclidean')
    assert values['mAP']==pytest.approx(learn.evaluate().mAP, abs=1e-6)
    assert values['mAP_euclidean']==pytest.approx(euclidean.mAP, abs=1e-6)
    assert values['rank1_euclidean']==pytest.approx(euclidean.rank1, abs=1e-6)
    assert values['mAP']!=values['mAP_euclidean']
    again = pickle.loads(pickle.dumps(metrics[1]))
    assert (again.name,again.distance)==('mAP_euclidean','euclidean')

def test_an_unknown_distance_of_a_metric():
    with pytest.raises(ValueError, match="distance='cos'"): mAP('cos')

# Loading for other people

@pytest.fixture(scope='module')
def fewer_people(people):
    "Loaders of eight of the twelve training people"
    from pyramidreid.data.datasets import market_table
    table = market_table(people)
    train = table.split=='train'
    kept = table.pid[train].unique()[:8]
    return ReIDDataLoaders.from_table(table[~train | table.pid.isin(kept)], p=4, k=4, size=(48,24), num_workers=0)

def without_classifiers(state): return {k:v for k,v in state.items() if not k.startswith('head.classify')}

def test_other_people_are_named_with_a_way_out(fitted, make_tiny_learner, fewer_people):
    fitted.save('twelve')
    learn = make_tiny_learner(fewer_people, path=fitted.path)
    before = copied(learn.model)
    for kwargs in ({}, dict(strict=False), dict(with_opt=False)):
        with pytest.raises(ValueError, match='on 12 identities.*learner have 8.*classifier=False') as e:
            learn.load('twelve', **kwargs)
        assert 'twelve.pth' in str(e.value)
    assert same(copied(learn.model), before)

def test_all_but_the_classifiers_can_be_loaded(fitted, make_tiny_learner, fewer_people):
    file = fitted.save('twelve')
    learn = make_tiny_learner(fewer_people, path=fitted.path)
    own = {k:v for k,v in copied(learn.model).items() if k.startswith('head.classify')}
    dynamic = learn.dynamic_loss_weights.state_dict()
    assert learn.load('twelve', classifier=False) is learn
    assert same(without_classifiers(copied(learn.model)), without_classifiers(fitted.model.state_dict()))
    assert all(torch.equal(learn.model.state_dict()[k], v) for k,v in own.items())
    assert learn.opt is None and learn.dynamic_loss_weights.state_dict()==dynamic and learn.model.trained
    torch.testing.assert_close(learn.embed(), fitted.embed())
    learn.fit(1)
    for path in (file, str(file), 'twelve.pth'): learn.load(path, classifier=False)

def test_the_best_model_can_be_loaded_for_other_people(make_tiny_learner, fewer_people):
    source = make_tiny_learner(cbs=SaveModelCallback('mAP', fname='best', with_opt=True))
    source.fit(1)
    learn = make_tiny_learner(fewer_people, path=source.path)
    with pytest.raises(ValueError, match='classifier=False'): learn.load('best')
    learn.load('best', classifier=False)
    torch.testing.assert_close(learn.embed(), source.embed())

def test_a_checkpoint_can_be_loaded(make_tiny_learner, fewer_people):
    "With dynamic training by a learner of the same people, without classifiers by others"
    source = make_tiny_learner()
    source.fit(2, cbs=Checkpoints())
    newest = sorted((source.path/'checkpoints').glob('*.pth'))[-1]
    again = make_tiny_learner().load(newest)
    assert same(copied(again.model), copied(source.model))
    assert again.dynamic_loss_weights.state_dict()==source.dynamic_loss_weights.state_dict()
    assert [h['lr'] for h in again.opt.hypers]==[h['lr'] for h in source.opt.hypers]
    learn = make_tiny_learner(fewer_people)
    with pytest.raises(ValueError, match='classifier=False'): learn.load(newest)
    learn.load(newest, classifier=False)
    torch.testing.assert_close(learn.embed(), source.embed())

def test_only_the_classifiers_may_differ(fitted, make_tiny_learner, fewer_people):
    fitted.save('twelve')
    learn = make_tiny_learner(fewer_people, path=fitted.path, n_parts=1)
    with pytest.raises(RuntimeError, match='head'): learn.load('twelve', classifier=False)
    torch.save({'model':without_classifiers(fitted.model.state_dict())}, fitted.path/'models'/'shared.pth')
    with pytest.raises(RuntimeError, match='head.classify'): make_tiny_learner(path=fitted.path).load('shared')
    same_shape = make_tiny_learner(fewer_people, path=fitted.path).load('shared', classifier=False)
    torch.testing.assert_close(same_shape.embed(), fitted.embed())

# A loaded learner has all methods

def methods(): return [name for name in vars(ReIDLearner) if not name.startswith('_')]

def test_unpickling_brings_the_rooms(fitted, monkeypatch):
    data = cloudpickle.dumps(fitted)
    monkeypatch.delitem(sys.modules, 'pyramidreid.all')
    pickle.loads(data)
    assert 'pyramidreid.all' in sys.modules

ONLY_FASTAI = """
import sys
from fastai.vision.all import *
learn = load_learner(sys.argv[1])
print(*(name for name in sys.argv[2:] if not hasattr(type(learn), name)))
files = get_image_files(sys.argv[1].rsplit('/', 1)[0])
print(learn.explain(files[0], files[0]).cosine>.99)
"""

@pytest.mark.slow
def test_load_learner_where_only_fastai_was_imported(fitted, tmp_path):
    path,fitted.path = fitted.path,tmp_path
    try: fitted.export('learner.pkl')
    finally: fitted.path = path
    (tmp_path/'a.jpg').write_bytes(Path(fitted.dls.valid.items.fn.iloc[0]).read_bytes())
    names = methods()
    assert {'evaluate','show_results','save_model','to_onnx','fit_modern','explain','summary'} <= set(names)
    command = [sys.executable, '-W', 'ignore', '-c', ONLY_FASTAI, tmp_path/'learner.pkl', *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()==['','True'], done.stderr
