"A learner: its progress table, training, show_results, predict, evaluate, save and load"
import math
import os
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import (
    CrossEntropyLossFlat,
    DisplayedTransform,
    EarlyStoppingCallback,
    Normalize,
    ProgressCallback,
    SaveModelCallback,
    TensorImage,
    load_learner,
    resnet18,
    set_seed,
)
from PIL import Image
from ranks import tiny
from torchvision import models

import pyramidreid.training.learner
from pyramidreid.core import ReIDWarning
from pyramidreid.data.datasets import market_table
from pyramidreid.evaluation import retrieval as evaluation
from pyramidreid.models.backbone import create_backbone, resnet10
from pyramidreid.training import metrics as reid_metrics
from pyramidreid.training.base_learner import *
from pyramidreid.training.dynamic_losses import DynamicLossWeights, LossDynamics
from pyramidreid.training.learner import *
from pyramidreid.training.learner_evaluation import *
from pyramidreid.training.learner_files import *
from pyramidreid.training.progress import *
from pyramidreid.training.recipes import torch_opt

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*CUDA', 'ignore:.*GradScaler', 'ignore:.*cuda')

@pytest.fixture(scope='session')
def table(people): return market_table(people)

@pytest.fixture(scope='session')
def test_table(table): return table[table.split!='train'].reset_index(drop=True)

@pytest.fixture(scope='module')
def make_tiny_learner(make_learner):
    "`make_learner` with a network of few channels"
    def make(dls=None, **kwargs): return make_learner(dls, **{'arch':tiny, **kwargs})
    return make

def copied(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def column(learn, name): return [row[list(learn.recorder.metric_names).index(name)-1] for row in learn.recorder.values]
def titles(): return [ax.get_title() for ax in plt.gcf().axes]
def embed_by_hand(learn, dl):
    learn.model.eval()
    with torch.no_grad(): return torch.cat([learn.model(b[0]).as_subclass(torch.Tensor) for b in dl])

# The progress table

class PartsSpy(Callback):
    "Parts of every training batch, and whether it was P×K"
    order,run_valid = 90,False
    def __init__(self): self.seen = []
    def before_batch(self): self.pk = self.yb[0][:,0].unique(return_counts=True)[1].tolist()==[4]*4
    def after_batch(self): self.seen.append((self.epoch, self.pk, {o:v.item() for o,v in self.loss_func.parts.items()}))

@pytest.mark.parametrize('dynamic', [True,False])
def test_columns_of_the_parts(make_tiny_learner, dynamic):
    "Mean of the batches' ID losses, and of the P×K batches' triplet losses"
    learn = make_tiny_learner(dynamic=dynamic, cbs=PartsSpy())
    learn.fit(2)
    losses,metrics = ['train_loss','valid_loss','id_loss','triplet_loss'],['mAP','rank1','rank5']
    assert list(learn.recorder.metric_names)==['epoch',*losses,*metrics,'time']
    for epoch in range(2):
        batches = [(pk,parts) for seen_epoch,pk,parts in learn.parts_spy.seen if seen_epoch==epoch]
        assert len(batches)==len(learn.dls.train)
        id_losses = [parts['id'] for _,parts in batches]
        triplet_losses = [parts['triplet'] for pk,parts in batches if pk] or [np.nan]
        assert column(learn, 'id_loss')[epoch]==pytest.approx(np.mean(id_losses), rel=1e-5)
        assert column(learn, 'triplet_loss')[epoch]==pytest.approx(np.mean(triplet_losses), rel=1e-5, nan_ok=True)
    if dynamic: assert not all(pk for _,pk,_ in learn.parts_spy.seen)

class Table:
    "Stands in for fastprogress's master bar: keeps the rows that are written"
    def __init__(self): self.rows = []
    def write(self, row, table=False): self.rows.append(row)
    def update(self, *args): pass
    def on_iter_end(self): pass

def test_a_loss_that_was_not_measured_is_a_dash_in_the_table(make_tiny_learner):
    "The table shows `–`, the recorder holds NaN; also after `no_bar`, which puts fastai's own callback back"
    learn = make_tiny_learner()
    learn.add_cb(ProgressCallback)
    with learn.no_bar(): assert not hasattr(learn, 'progress')
    assert [type(cb) for cb in learn.cbs if isinstance(cb, ProgressCallback)]==[ReIDProgress]
    learn.progress.mbar = table = Table()
    learn.progress._write_stats([0, 1.5, math.nan, None, '00:01'])
    assert table.rows==[['0','1.500000','–','None','00:01']]

def test_the_recorder_keeps_nan(make_dls, make_tiny_learner):
    class AlwaysRandom(DynamicLossWeights):
        name = 'dynamic_loss_weights'
        def after_loss(self):
            super().after_loss()
            self.dls.train.mode = self.dynamics.mode = 'random'
    learn = make_tiny_learner(make_dls(k=2), dynamic=AlwaysRandom())
    learn.fit(1)
    assert math.isnan(column(learn, 'triplet_loss')[0])

def test_random_batches_by_choice_have_a_triplet_column(make_dls, make_tiny_learner):
    "With dynamic=False the triplet loss is trained on them, so the table shows it"
    learn = make_tiny_learner(make_dls(mode='random'), dynamic=False)
    learn.fit(1)
    assert math.isfinite(column(learn, 'triplet_loss')[0])

def test_metrics_are_those_of_evaluate(trained):
    res = trained.evaluate()
    for name in ('mAP','rank1','rank5'): assert column(trained, name)[-1]==pytest.approx(getattr(res, name), abs=1e-6)
    values = dict(zip(list(trained.recorder.metric_names)[2:-1], trained.validate()))
    assert values['mAP']==pytest.approx(res.mAP, abs=1e-6)

OWN_METRICS = [([],[]), (reid_metrics.rank1,['rank1']), ([reid_metrics.mAP(distance='euclidean')],['mAP_euclidean'])]

@pytest.mark.parametrize('metrics,names', OWN_METRICS)
def test_metrics_of_ones_own(make_tiny_learner, metrics, names):
    learn = make_tiny_learner(metrics=metrics)
    assert [m.name for m in learn.metrics]==['id_loss','triplet_loss']+names

def test_training_improves(make_learner):
    learn = make_learner()
    before = learn.evaluate().mAP
    learn.fit_one_cycle(4, 3e-3)
    assert column(learn, 'id_loss')[-1]<column(learn, 'id_loss')[0]
    assert learn.evaluate().mAP>before

def test_the_default_is_what_measured_best(make_tiny_learner):
    "A BNNeck, and P×K and random batches in turn: both losses on the former, the ID loss alone on the latter"
    learn = make_tiny_learner()
    learn.fit(2)
    history = learn.dynamic_loss_weights.history
    assert learn.model.head.neck and len(history)>=4
    assert list(history['mode'])==[('pk','random')[i%2] for i in range(len(history))]
    assert list(history.weight_triplet)==[float(i%2==0) for i in range(len(history))]
    assert set(history.weight_id)=={1.}

def test_the_paper_s_method(make_tiny_learner):
    learn = make_tiny_learner(neck=False, dynamic=True)
    assert not learn.model.head.neck and type(learn.dynamic_loss_weights.dynamics) is LossDynamics

def test_a_callback_of_one_s_own_takes_the_place_of_the_default(make_tiny_learner):
    learn = make_tiny_learner(cbs=DynamicLossWeights(weighting='paper'))
    assert learn.dynamic_loss_weights.dynamics.weighting=='paper'
    assert len([cb for cb in learn.cbs if isinstance(cb, DynamicLossWeights)])==1

@pytest.mark.parametrize('dynamic', ['gate','Mix',''])
def test_other_names_of_dynamic_training_are_refused(make_tiny_learner, dynamic):
    with pytest.raises(ValueError, match="choose 'mix', True for the paper's rule"): make_tiny_learner(dynamic=dynamic)

def test_a_loss_without_parts_is_refused_with_a_reason(make_learner):
    with pytest.raises(ValueError, match='parts'): make_learner(loss_func=CrossEntropyLossFlat()).fit(1)

# show_results

def test_show_results(trained):
    n = len(plt.get_fignums())
    assert trained.show_results(max_n=3, k=4, seed=0) is None
    assert len(plt.get_fignums())==n+1
    t = titles()
    assert len(t)==3*5 and all(o.startswith('query') for o in t[::5])
    rest = [o for i,o in enumerate(t) if i%5]
    assert all(o[0] in '✓✗' and 'pid' in o for o in rest)
    for row in range(3): # Ticks are right, and nobody is found in the images of the query's own camera
        pid,cam = t[5*row].split('pid ')[1].split(' · c')
        for title in t[5*row+1:5*row+5]:
            shown_pid,shown_cam = title.split('pid ')[1].split(' · c')
            assert (title[0]=='✓')==(shown_pid==pid) and shown_pid!='-1'
            assert (shown_pid,shown_cam)!=(pid,cam)

def test_show_results_chooses_queries_by_seed(trained):
    def shown(**kwargs):
        trained.show_results(max_n=3, k=4, **kwargs)
        return titles()
    first = shown(seed=0)
    assert shown(seed=0)==first
    assert any(shown()!=first for _ in range(4))

def test_show_results_with_more_than_there_is(trained):
    trained.show_results(max_n=1000, k=2)
    assert sum(o.startswith('query') for o in titles())==24
    trained.show_results(max_n=1, k=10**4)
    assert len(titles())==1+6*4*2+4-2 # All but the junk and the two of the query's own camera

def test_show_results_before_training(make_tiny_learner):
    learn = make_tiny_learner()
    with pytest.raises(ValueError, match='not been trained'): learn.show_results()
    assert not plt.get_fignums()

@pytest.mark.parametrize('split,message', [('query','no gallery'), ('gallery','no query')])
def test_show_results_needs_queries_and_a_gallery(trained, test_table, split, message):
    dl = trained.dls.test_dl(test_table[test_table.split==split], with_labels=True)
    with pytest.raises(ValueError, match=message): trained.show_results(dl=dl)

def test_show_results_of_training_images(trained):
    with pytest.raises(ValueError, match='no query'): trained.show_results(ds_idx=0)

def test_show_results_needs_labels(trained, test_table):
    for images in (test_table, list(test_table.fn[:3])):
        dl = trained.dls.test_dl(images)
        with pytest.raises(ValueError, match='no labels.*with_labels=True'): trained.show_results(dl=dl)

def test_show_results_of_a_query_without_any_candidate(trained, test_table):
    "Its person was seen by its own camera only, and all others are junk"
    query = test_table[test_table.split=='query'].iloc[:1]
    pid,cam = query.pid.iloc[0],query.cam.iloc[0]
    gallery = test_table[test_table.split=='gallery']
    own = gallery[(gallery.pid==pid) & (gallery.cam==cam)]
    junk = test_table[test_table.pid==-1]
    assert len(own)+len(junk)>=3
    trained.show_results(dl=trained.dls.test_dl(pd.concat([query,own,junk]), with_labels=True))
    assert titles()[0].startswith('query')

# predict

def test_predict_an_embedding(trained, test_table):
    fn = test_table.fn[0]
    want = embed_by_hand(trained, trained.dls.test_dl([fn]))[0]
    for o in (fn, str(fn), Image.open(fn), np.array(Image.open(fn))):
        emb = trained.predict(o)
        assert emb.shape==(6*8,) and emb.norm().item()==pytest.approx(1., abs=1e-5)
        torch.testing.assert_close(emb, want)

def test_predict_in_a_gallery(trained, test_table):
    g = test_table[test_table.split=='gallery'].reset_index(drop=True).assign(shelf=lambda d: range(len(d)))
    fn = g.fn[5]
    emb = trained.embed(trained.dls.test_dl(g))
    sim = emb@emb[5]
    best = sim.argsort(descending=True)[:4]
    for gallery in (g, list(g.fn), trained.dls.test_dl(g), trained.dls.test_dl(g, with_labels=True)):
        res = trained.predict(fn, gallery=gallery, k=4)
        assert res.fn.tolist()==[g.fn[i] for i in best.tolist()] and res.fn[0]==fn and list(res.index)==[0,1,2,3]
        assert res.similarity.tolist()==pytest.approx(sim[best].tolist(), abs=1e-5)
        assert res.similarity[0]==pytest.approx(1, abs=1e-5)
    res = trained.predict(fn, gallery=g, k=4)
    assert res.shelf.tolist()==best.tolist() and {'pid','cam'} <= set(res)
    assert len(trained.predict(fn, gallery=g, k=10**6))==len(g)
    images = [Image.open(f) for f in g.fn[:6]]
    assert trained.predict(fn, gallery=images, k=1).fn[0] is images[5]

def test_predict_a_list(trained, test_table):
    "Each its own embedding; with a gallery each its own table; of nothing (0, D)"
    fns = test_table.fn[:3].tolist()
    want = torch.stack([trained.predict(fn) for fn in fns])
    images = [np.array(Image.open(fn)) for fn in fns]
    rows = [row for _,row in test_table[:3].iterrows()]
    for items in (fns, tuple(fns), test_table.fn[:3], test_table[:3], images, np.stack(images), rows):
        torch.testing.assert_close(trained.predict(items), want)
    torch.testing.assert_close(trained.predict(rows[1]), want[1])
    tables = trained.predict(fns, gallery=test_table, k=2)
    assert len(tables)==3
    for table,fn in zip(tables, fns): pd.testing.assert_frame_equal(table, trained.predict(fn, gallery=test_table, k=2))
    assert trained.predict([fns[0]]).shape==(1,6*8) and len(trained.predict([fns[0]], gallery=test_table, k=1))==1
    assert trained.predict([]).shape==(0,6*8) and trained.predict([], gallery=test_table)==[]

def test_embed_nothing_and_a_list(trained, test_table):
    dls,want = trained.dls,trained.embed(trained.dls.test_dl(test_table[:3]))
    for items in ([], dls.test_dl([]), test_table[:0], dls.test_dl(test_table[:0], with_labels=True)):
        for flip in (False,True):
            emb = trained.embed(items, flip)
            assert emb.shape==(0,6*8) and emb.dtype==torch.float32
    for items in (test_table.fn[:3], test_table[:3], [row for _,row in test_table[:3].iterrows()]):
        torch.testing.assert_close(trained.embed(items), want)

@pytest.mark.parametrize('crop', [np.zeros((0,24,3), np.uint8), Image.new('RGB', (0,48))], ids=['array','pil'])
def test_an_empty_crop_is_named_by_its_position(trained, test_table, crop):
    items = [*test_table.fn[:2], crop]
    for embed in (trained.predict, trained.embed):
        with pytest.raises(ValueError, match='^image 2 has no pixels'): embed(items)
    with pytest.raises(ValueError, match='^image 0 has no pixels'): trained.predict(crop)
    with pytest.raises(ValueError, match='^image 2 has no pixels'): trained.predict(test_table.fn[0], gallery=items)

def test_predict_errors(trained, tmp_path):
    image = np.zeros((48,24,3), np.uint8)
    for gallery in ([], pd.DataFrame(dict(fn=[]))):
        with pytest.raises(ValueError, match='gallery is empty'): trained.predict(image, gallery=gallery)
    (tmp_path/'x.jpg').write_text('not an image')
    with pytest.raises(OSError, match='x.jpg'): trained.predict(tmp_path/'x.jpg')
    with pytest.raises(OSError, match='nobody.jpg'): trained.predict(tmp_path/'nobody.jpg')

# embed and evaluate

def test_embed_keeps_the_order(trained, test_table):
    of_files,of_table = trained.dls.test_dl(list(test_table.fn), bs=7),trained.dls.test_dl(trained.dls.train.items)
    for dl in (trained.dls.valid, of_files, of_table):
        torch.testing.assert_close(trained.embed(dl), embed_by_hand(trained, dl), atol=1e-5, rtol=1e-4)
    assert trained.embed(trained.dls.train).shape==(len(trained.dls.train_ds),48)
    torch.testing.assert_close(trained.embed(), trained.get_preds()[0])

def test_evaluate_by_hand(trained):
    items,emb = trained.dls.valid.items,trained.embed()
    q,g = ((items.split==s).to_numpy() for s in ('query','gallery'))
    pids,cams = items.pid.to_numpy(),items.cam.to_numpy()
    want = evaluation.evaluate(emb[q], emb[g], pids[q], pids[g], cams[q], cams[g])
    res = trained.evaluate()
    assert (res.mAP,res.rank1,res.n_junk,res.n_distractor)==(want.mAP,want.rank1,2,4) and res.cameras
    card = repr(res)
    for o in ('resnet10','48×24','n_parts=3','6 branches','48-d','norm=branch','people','cosine'): assert o in card
    assert trained.evaluate(distance='euclidean').distance=='euclidean'
    assert trained.evaluate(about={'a':1}).about=={**trained.evaluate().about, 'a':1}

@pytest.fixture(scope='session')
def evaluate_table(trained):
    "Evaluate a table with the trained learner"
    return lambda table: trained.evaluate(trained.dls.test_dl(table, with_labels=True))

@pytest.fixture(scope='session')
def other_people(table):
    "Training people as queries and gallery"
    some = table[(table.split=='train') & (table.pid<9)]
    return some.assign(split=['query' if i%3==0 else 'gallery' for i in range(len(some))])

def test_evaluate_another_table(trained, test_table, evaluate_table, other_people):
    assert evaluate_table(test_table).mAP==pytest.approx(trained.evaluate().mAP, abs=1e-6)
    res,n_query = evaluate_table(other_people),len(other_people)//3
    assert res.n_query==n_query and res.n_gallery==len(other_people)-n_query and 0<res.mAP<=1

def test_evaluate_does_not_depend_on_names_and_order(evaluate_table, other_people):
    want = evaluate_table(other_people).mAP
    named = other_people.assign(pid=[f'person {pid}' for pid in other_people.pid])
    assert evaluate_table(named).mAP==pytest.approx(want)
    assert evaluate_table(other_people.iloc[::-1]).mAP==pytest.approx(want, abs=1e-6)

def test_evaluate_without_cameras(evaluate_table, other_people):
    res = evaluate_table(other_people.assign(cam=None))
    assert not res.cameras and res.mAP!=evaluate_table(other_people).mAP

def test_evaluate_needs_queries_and_labels(trained, other_people):
    with pytest.raises(ValueError, match='no query'): trained.evaluate(trained.dls.train)
    with pytest.raises(ValueError, match='no labels'): trained.evaluate(trained.dls.test_dl(other_people))

def test_unknown_cameras_exclude_nobody(trained, test_table):
    "The ranking that is shown agrees with the one that is scored"
    t = test_table.assign(cam=[c if i%2 else None for i,c in enumerate(test_table.cam)])
    dl = trained.dls.test_dl(t, with_labels=True)
    emb,q,g = trained.embed(dl),(t.split=='query').to_numpy(),(t.split=='gallery').to_numpy()
    res = trained.evaluate(dl)
    from pyramidreid.evaluation.plots import rank_gallery
    ranked = rank_gallery(emb[q], emb[g], dl.items[q], dl.items[g], 10**4)
    first = ranked[ranked.right].groupby('query')['rank'].min()
    assert [first.get(i, 0) for i in range(q.sum())]==res.first_rank.tolist()

def recorded(learn):
    "What the recorder holds"
    rec = learn.recorder
    return [list(map(list, rec.values)), list(rec.losses), list(rec.lrs), list(rec.iters), list(rec.metric_names)]

def callback_names(learn): return [type(cb).__name__ for cb in learn.cbs.sorted('order')]

def dynamic_state(learn):
    cb = learn.dynamic_loss_weights
    return cb.state_dict(),len(cb.steps),learn.dls.train.mode

def test_looking_does_not_disturb_training(make_tiny_learner, test_table):
    learn = make_tiny_learner()
    learn.fit(1)
    recorder,state,cbs = learn.recorder,copied(learn.model),callback_names(learn)
    before,dynamic = recorded(learn),dynamic_state(learn)
    learn.evaluate()
    learn.embed()
    learn.show_results(max_n=1, k=2)
    learn.predict(test_table.fn[0], gallery=test_table)
    with pytest.raises(OSError): learn.predict('nobody.jpg')
    assert learn.recorder is recorder and callback_names(learn)==cbs and recorded(learn)==before
    assert same(state, learn.model.state_dict()) and dynamic_state(learn)==dynamic
    recorder.plot_loss()
    learn.fit(1)
    assert len(learn.recorder.values)==1 and not same(state, learn.model.state_dict())

class Follow(Callback):
    "A callback that evaluates after every epoch, as one would write to follow another dataset"
    order = 70
    def __init__(self): self.seen,self.busy,self.nested = [],False,0
    def after_epoch(self):
        self.nested += self.busy
        if self.busy: return
        self.busy = True
        self.seen.append(self.learn.evaluate().mAP)
        self.busy = False

def test_evaluate_from_a_callback(make_tiny_learner):
    "Evaluating is not an epoch of training: it must not call the callbacks, or this one would call itself for ever"
    learn = make_tiny_learner(cbs=[Follow(),SaveModelCallback(monitor='mAP')])
    given = learn.dls.train.mode
    learn.fit(3)
    assert learn.follow.seen==pytest.approx(column(learn, 'mAP'), abs=1e-6) and len(learn.recorder.values)==3
    assert learn.follow.nested==0 and learn.save_model.best==max(learn.follow.seen)
    assert len(learn.dynamic_loss_weights.steps)==3*len(learn.dls.train) and learn.dls.train.mode==given
    best = learn.evaluate().mAP
    assert learn.save_model.best==pytest.approx(best, abs=1e-6) # fastai's get_preds would have started the search anew

# export, save and load

def test_export_and_load_learner(trained, test_table, tmp_path):
    emb,res,dls = trained.embed(),trained.evaluate(),trained.dls
    old_path,trained.path = trained.path,tmp_path
    try: trained.export()
    finally: trained.path = old_path
    assert trained.dls is dls and torch.equal(trained.embed(), emb)
    n_bytes = sum(v.numel()*v.element_size() for v in trained.model.state_dict().values())
    assert (tmp_path/'export.pkl').stat().st_size<1.5*n_bytes
    loaded = load_learner(tmp_path/'export.pkl')
    assert isinstance(loaded, ReIDLearner) and loaded.arch_name=='resnet10' and loaded.model.trained
    torch.testing.assert_close(loaded.embed(loaded.dls.test_dl(test_table)), emb)
    torch.testing.assert_close(loaded.predict(test_table.fn[0]), emb[0])
    assert loaded.predict(test_table.fn[0], gallery=list(test_table.fn), k=1).fn[0]==test_table.fn[0]
    dl = loaded.dls.test_dl(test_table, with_labels=True)
    assert loaded.evaluate(dl).mAP==pytest.approx(res.mAP, abs=1e-6)
    assert loaded.evaluate(dl).about==res.about
    loaded.show_results(dl=dl, max_n=1, k=3)
    assert titles()[0].startswith('query')

def test_a_loaded_learner_without_images_says_so(trained, tmp_path):
    old_path,trained.path = trained.path,tmp_path
    try: trained.export('e.pkl')
    finally: trained.path = old_path
    loaded = load_learner(tmp_path/'e.pkl')
    for f in (loaded.evaluate, loaded.show_results):
        with pytest.raises(ValueError, match='test_dl'): f()

def perturb(learn):
    with torch.no_grad():
        for p in learn.model.parameters(): p.add_(1.)

def opt_tensors(learn): return [{k:v for k,v in learn.opt.state[p].items()} for p in learn.model.parameters()]

@pytest.mark.parametrize('with_opt', [True,False])
def test_save_and_load(make_tiny_learner, with_opt):
    learn = make_tiny_learner(dynamic=True)
    learn.fit(1)
    state,opt,dynamic = copied(learn.model),learn.opt.state_dict(),learn.dynamic_loss_weights.state_dict()
    f = learn.save('here', with_opt=with_opt)
    assert f==learn.path/'models'/'here.pth' and f.exists()
    perturb(learn)
    learn.dynamic_loss_weights.dynamics.reset()
    assert learn.load('here') is learn
    assert same(learn.model.state_dict(), state) and learn.dynamic_loss_weights.state_dict()==dynamic
    other = make_tiny_learner(dynamic=True, path=learn.path)
    other.load('here', with_opt=with_opt)
    assert same(other.model.state_dict(), state) and other.dynamic_loss_weights.state_dict()==dynamic
    assert other.model.trained
    torch.testing.assert_close(other.embed(), learn.embed())
    if with_opt:
        got = other.opt.state_dict()
        assert [dict(h) for h in got['hypers']]==[dict(h) for h in opt['hypers']]
        torch.testing.assert_close(list(got['state']), list(opt['state']), rtol=0, atol=0)
    other.fit(1)
    assert not same(other.model.state_dict(), state)

def test_load_takes_what_save_returned(make_tiny_learner):
    "A path with the ending .pth, whether the learner's folder is relative or absolute"
    learn = make_tiny_learner()
    state = copied(learn.model)
    file = learn.save('w')
    perturb(learn)
    assert same(learn.load(file).model.state_dict(), state)
    perturb(learn)
    assert same(learn.load(str(file)).model.state_dict(), state)
    perturb(learn)
    assert same(learn.load('w.pth').model.state_dict(), state)

def fitted_and_compiled(learn):
    "Compiled after the fit, since compiling takes longer than the fit"
    learn.fit(1)
    learn.model = torch.compile(learn.model, backend='eager')
    return learn

def test_a_compiled_model_has_the_files_of_a_plain_one(make_tiny_learner):
    "Weights, optimizer and history go from a compiled model to a plain one and back"
    learn = fitted_and_compiled(make_tiny_learner())
    learn.save('compiled')
    plain = make_tiny_learner(path=learn.path).load('compiled')
    assert plain.model.trained and plain.model.history==learn.model._orig_mod.history
    assert same(plain.model.state_dict(), learn.model._orig_mod.state_dict())
    perturb(plain)
    plain.save('plain')
    assert same(learn.load('plain').model._orig_mod.state_dict(), plain.model.state_dict())
    assert 'OptimizedModule' not in learn.summary()
    assert learn.gather_args()['parameters']==plain.gather_args()['parameters']

@pytest.mark.parametrize('classifier', [True,False])
def test_files_of_compiled_models_by_earlier_versions_are_read(make_tiny_learner, classifier):
    "Their names begin with _orig_mod."
    learn = fitted_and_compiled(make_tiny_learner())
    file = learn.path/'models'/'earlier.pth'
    file.parent.mkdir(exist_ok=True)
    torch.save(dict(model=learn.model.state_dict()), file)
    plain = make_tiny_learner(path=learn.path).load('earlier', classifier=classifier)
    body = {name:v for name,v in learn.model._orig_mod.state_dict().items() if 'classify' not in name}
    assert plain.model.trained and same({name:plain.model.state_dict()[name] for name in body}, body)

@pytest.mark.parametrize('opt', [torch.optim.SGD, torch.optim.AdamW])
def test_load_moves_the_model_before_it_makes_the_optimizer(make_tiny_learner, monkeypatch, opt):
    "Its state goes to the device of the weights, which a fit would move away from it"
    learn = make_tiny_learner(opt_func=torch_opt(opt))
    learn.fit(1)
    learn.save('w')
    other,steps = make_tiny_learner(opt_func=torch_opt(opt), path=learn.path),[]
    create_opt,to = other.create_opt,other.model.to
    def logged_to(device):
        steps.append(device)
        return to(device)
    monkeypatch.setattr(other.model, 'to', logged_to)
    monkeypatch.setattr(other, 'create_opt', lambda: (steps.append('optimizer'), create_opt()))
    other.load('w')
    assert steps==[learn.dls.device,'optimizer']

def test_a_learner_that_has_not_started_can_be_saved(make_tiny_learner):
    learn = make_tiny_learner()
    state = copied(learn.model)
    learn.save('start')
    perturb(learn)
    assert same(learn.load('start').model.state_dict(), state) and not learn.model.trained

def test_load_errors(make_tiny_learner, tmp_path):
    learn = make_tiny_learner()
    with pytest.raises(FileNotFoundError, match='nothing.pth'): learn.load('nothing')
    f = learn.save('whole')
    torch.save(learn.model.state_dict(), learn.path/'models'/'bare.pth')
    with pytest.raises(ValueError, match='bare.pth'): learn.load('bare')
    state = copied(learn.model)
    data = f.read_bytes()
    (learn.path/'models'/'cut.pth').write_bytes(data[:len(data)//2])
    with pytest.raises((RuntimeError,OSError)): learn.load('cut')
    assert same(state, learn.model.state_dict())
    with pytest.raises(RuntimeError, match='head'): make_tiny_learner(n_parts=1, path=learn.path).load('whole')
    static = make_tiny_learner(dynamic=False, path=learn.path)
    assert same(static.load('whole').model.state_dict(), state)
    static.save('static')
    learn.load('static')

def test_load_runs_no_code(make_tiny_learner, tmp_path):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'pwned'),))
    learn = make_tiny_learner()
    learn.save('x')
    torch.save(dict(model=learn.model.state_dict(), opt=Evil()), learn.path/'models'/'evil.pth')
    with pytest.raises(ValueError, match='more than tensors and plain values'): learn.load('evil')
    assert not (tmp_path/'pwned').exists()

@pytest.mark.parametrize('error', [OSError('disk full'),KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file_whole(make_tiny_learner, monkeypatch, error):
    learn = make_tiny_learner()
    f = learn.save('kept')
    data,state = f.read_bytes(),copied(learn.model)
    perturb(learn)
    def fail(obj, path, **kwargs):
        with open(path, 'wb') as o: o.write(b'half a fi')
        raise error
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', fail)
        with pytest.raises(type(error)): learn.save('kept')
        with pytest.raises(type(error)): learn.save('fresh')
    assert f.read_bytes()==data and [o.name for o in f.parent.iterdir()]==['kept.pth']
    assert same(learn.load('kept').model.state_dict(), state)

# Training with fastai's methods

def convs(m): return [o.weight.detach().clone() for o in m.modules() if isinstance(o, torch.nn.Conv2d)]
def equal(a, b): return [torch.equal(x, y) for x,y in zip(a, b)]

def test_freeze_and_unfreeze(make_tiny_learner):
    learn = make_tiny_learner()
    body,head = convs(learn.model.body),learn.model.head.reduce.weight.detach().clone()
    learn.freeze()
    learn.fit(1)
    assert all(equal(body, convs(learn.model.body))) and not torch.equal(head, learn.model.head.reduce.weight)
    learn.unfreeze()
    learn.fit(1)
    assert not any(equal(body, convs(learn.model.body)))

def test_fine_tune(make_tiny_learner):
    class Frozen(Callback):
        def __init__(self): self.seen = []
        def before_train(self): self.seen.append(next(self.model.body.parameters()).requires_grad)
    learn = make_tiny_learner(cbs=Frozen())
    learn.fine_tune(1, base_lr=2e-3)
    assert learn.frozen.seen==[False,True] and len(learn.dynamic_loss_weights.steps)==2*len(learn.dls.train)

def test_discriminative_learning_rates(make_tiny_learner):
    "Adam moves a weight by about its learning rate: each group by its own"
    learn = make_tiny_learner()
    groups = [[p for p in g] for g in learn.splitter(learn.model)]
    before = [[p.detach().clone() for p in g] for g in groups]
    learn.fit(1, slice(1e-6,1e-2))
    moved = [max((p-q).abs().max().item() for p,q in zip(g, b)) for g,b in zip(groups, before)]
    assert [h['lr'] for h in learn.opt.hypers]==pytest.approx([1e-6,1e-4,1e-2])
    for m,lr in zip(moved, (1e-6,1e-4,1e-2)): assert lr/2<m<lr*3*len(learn.dls.train)
    learn.fit_one_cycle(1, slice(1e-5,1e-3))
    assert learn.opt.hypers[0]['lr']<learn.opt.hypers[-1]['lr']

def test_lr_find(make_tiny_learner):
    learn = make_tiny_learner()
    learn.fit(1)
    state,dynamic,n = copied(learn.model),learn.dynamic_loss_weights.state_dict(),len(learn.dynamic_loss_weights.steps)
    res = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-8<res.valley<10 and same(state, learn.model.state_dict())
    assert learn.dynamic_loss_weights.state_dict()==dynamic and len(learn.dynamic_loss_weights.steps)==n
    learn.fit(1, res.valley)

def test_lr_find_first(make_tiny_learner):
    learn = make_tiny_learner()
    learn.lr_find(num_it=6, show_plot=False)
    assert not learn.model.trained
    with pytest.raises(ValueError, match='not been trained'): learn.show_results()

@pytest.mark.parametrize('kind', ['to_fp16','to_bf16'])
def test_mixed_precision(make_tiny_learner, kind):
    learn = getattr(make_tiny_learner(), kind)()
    learn.fit(1)
    mAP = column(learn, 'mAP')[0]
    assert math.isfinite(mAP) and learn.evaluate().mAP==pytest.approx(mAP, abs=.05)
    learn.to_fp32().fit(1)

def test_gradient_accumulation(make_tiny_learner):
    learn = make_tiny_learner(cbs=GradientAccumulation(32))
    learn.fit(1)
    assert math.isfinite(column(learn, 'id_loss')[0])

def test_save_the_best_by_mAP(make_tiny_learner):
    learn = make_tiny_learner(cbs=SaveModelCallback(monitor='mAP', fname='best'))
    learn.fit(3)
    assert (learn.path/'models'/'best.pth').exists()
    best = max(column(learn, 'mAP'))
    assert learn.save_model.best==best and learn.evaluate().mAP==pytest.approx(best, abs=1e-6)

def test_early_stopping_by_mAP(make_tiny_learner):
    learn = make_tiny_learner(cbs=EarlyStoppingCallback(monitor='mAP', min_delta=2., patience=1))
    learn.fit(5)
    assert len(learn.recorder.values)==2

def test_batches_of_one_size_only(make_dls, make_tiny_learner):
    "A dataset smaller than a batch still gives one"
    dls = make_dls(p=8, k=24)
    learn = make_tiny_learner(dls)
    learn.fit(1)
    assert len(dls.train)==1 and len(learn.dynamic_loss_weights.steps)==1

# The model

BRANCHES = [(dict(n_parts=1),1), (dict(n_parts=3),6), (dict(levels=[1]),3), (dict(levels=[3]),1),
            (dict(levels=[3,1]),4)]

@pytest.mark.parametrize('kw,branches', BRANCHES)
def test_parts_and_levels(make_tiny_learner, kw, branches):
    learn = make_tiny_learner(**{'emb_sz':5, **kw})
    assert learn.embed(learn.dls.test_dl(learn.dls.valid.items[:2])).shape==(2,5*branches)
    assert len(learn.model.head.windows)==branches
    feats,logits = learn.model.train()(learn.dls.one_batch()[0])
    assert feats.shape[1:]==(branches,learn.model.head.bn.num_features//branches) and logits.shape[1:]==(branches,12)

def test_norms(make_tiny_learner):
    def embed(norm):
        learn = make_tiny_learner(norm=norm)
        return learn.embed(learn.dls.test_dl(learn.dls.valid.items[:3]))
    emb = {norm:embed(norm) for norm in ('branch','whole',None)}
    assert torch.allclose(emb['branch'].view(3,6,8).norm(dim=-1), torch.tensor(6**-.5))
    assert torch.allclose(emb['whole'], emb[None]/emb[None].norm(dim=-1, keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="norm='no'"): make_tiny_learner(norm='no')

def test_the_paper_s_pyramid(make_dls, make_learner):
    learn = make_learner(make_dls(size=(96,48)), n_parts=6, emb_sz=128)
    assert learn.model.head.bn.num_features==21*128 and learn.model.head.classify.weight.shape==(21,128,12)
    assert learn.model.head.drop.p==.2

def test_dynamic_of_ones_own(make_tiny_learner):
    cb = DynamicLossWeights(weighting='normalized', delta=.3)
    learn = make_tiny_learner(dynamic=cb)
    assert learn.dynamic_loss_weights is cb
    learn.fit(1)
    assert len(cb.steps)==len(learn.dls.train)

def test_dynamic_training_given_among_the_callbacks(make_tiny_learner):
    "It takes the place of the default one"
    cb = DynamicLossWeights(weighting='normalized')
    learn = make_tiny_learner(cbs=cb)
    assert [c for c in learn.cbs if isinstance(c, DynamicLossWeights)]==[cb]

def test_a_height_that_does_not_fit(make_dls, make_learner):
    with pytest.raises(ValueError) as e: make_learner(make_dls(size=(64,32)), n_parts=3)
    msg = str(e.value)
    assert 'H=4' in msg and 'n_parts=3' in msg and '48' in msg and '96' in msg
    with pytest.raises(ValueError, match='n_parts=0'): make_learner(n_parts=0)
    with pytest.raises(ValueError, match='levels'): make_learner(levels=[4])

@pytest.mark.parametrize('n_parts,fits', [(4,True),(3,False)])
def test_a_height_that_is_not_a_multiple_of_the_stride(make_dls, make_learner, n_parts, fits):
    "56 rows become 4 in the feature map, and that is what counts"
    dls = make_dls(size=(56,32))
    if fits: assert make_learner(dls, n_parts=n_parts).evaluate().mAP>0
    else:
        with pytest.raises(ValueError, match='H=4'): make_learner(dls, n_parts=n_parts)

def test_wrong_archs(make_learner):
    with pytest.raises(ValueError, match='vit_b_16'): make_learner(arch=models.vit_b_16)
    with pytest.raises(ValueError, match='pretrained=False'): make_learner(pretrained=True)

def test_unknown_and_unfit_timm_archs(make_learner):
    with pytest.raises((RuntimeError,ValueError), match='resnet_of_nobody'): make_learner(arch='resnet_of_nobody')
    with pytest.raises(ValueError, match='test_vit'): make_learner(arch='test_vit')

def test_a_timm_arch(make_dls, make_learner, test_table, tmp_path):
    learn = make_learner(arch='test_resnet', path=tmp_path)
    learn.fit(1)
    assert learn.arch_name=='test_resnet' and 'test_resnet' in repr(learn.evaluate())
    learn.export()
    fn = test_table.fn[0]
    torch.testing.assert_close(load_learner(tmp_path/'export.pkl').predict(fn), learn.predict(fn))

def test_weights_from_a_file(make_learner, tmp_path):
    torch.manual_seed(9)
    sd = resnet10().state_dict()
    torch.save(sd, tmp_path/'w.pth')
    learn = make_learner(weights=tmp_path/'w.pth')
    assert torch.equal(learn.model.body[0].weight, sd['conv1.weight'])
    with pytest.raises(ValueError, match='w.pth.*does not fit'): make_learner(arch=resnet18, weights=tmp_path/'w.pth')

def test_images_are_normalised_once(make_dls, make_learner):
    def n_normalize(dl): return sum(isinstance(tfm, Normalize) for tfm in dl.after_batch.fs)
    dls = make_dls()
    for _ in range(2): make_learner(dls)
    for dl in (dls.train, dls.valid, dls.test_dl(dls.valid.items[:1])): assert n_normalize(dl)==1
    dls = make_dls()
    make_learner(dls, normalize=False)
    assert n_normalize(dls.train)==0

def test_loaders_of_another_backbone_are_noticed(make_dls, monkeypatch, tmp_path):
    "They normalise as the first learner's backbone expects; weights from scratch do not mind"
    weights = tmp_path/'w.pth'
    torch.save(models.resnet18().state_dict(), weights)
    dls = make_dls(size=(96,48))
    pyramid_learner(dls, resnet10, pretrained=False)
    learner = pyramidreid.training.learner
    monkeypatch.setattr(learner, 'backbone_stats', lambda arch: ([.5]*3,[.5]*3))
    body = create_backbone(models.resnet18, pretrained=False)
    monkeypatch.setattr(learner, 'create_backbone', lambda *args: body) # in place of a download
    with pytest.warns(ReIDWarning, match=r'resnet18 was trained with \[\[0.5, .*make new loaders for this one'):
        pyramid_learner(dls, models.resnet18)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kwargs in (dict(pretrained=False), dict(weights=weights), dict(normalize=False)):
            pyramid_learner(dls, models.resnet18, **kwargs)

def test_another_transform_with_mean_and_std_does_not_normalise(make_dls, make_learner):
    class Noise(DisplayedTransform):
        order,split_idx,mean,std = 20,0,0.,.1
        def encodes(self, x:TensorImage): return x
    dls = make_dls()
    dls.add_tfms([Noise()], 'after_batch')
    make_learner(dls)
    assert sum(isinstance(tfm, Normalize) for tfm in dls.train.after_batch.fs)==1

def test_seeds(make_dls, make_tiny_learner):
    def run():
        set_seed(3)
        dls = make_dls()
        learn = make_tiny_learner(dls)
        set_seed(4)
        learn.fit(1)
        return learn
    a,b = run(),run()
    assert a.dynamic_loss_weights.history.equals(b.dynamic_loss_weights.history)
    assert same(a.model.state_dict(), b.model.state_dict())
