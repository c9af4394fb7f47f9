"""What `test_fakegpu.py` runs on the pretend GPU, a case in each process: `cases.py NAME PEOPLE FOLDER`.
With `CASES_DEVICE=cuda` they run on a real one: `benchmarks/gpu.py` does that."""
import importlib
import os
import sys
from functools import partial
from pathlib import Path

DEVICE = os.environ.get('CASES_DEVICE', 'fakegpu')
IS_FAKE = DEVICE=='fakegpu'
gpu = importlib.import_module('fakegpu' if IS_FAKE else 'realgpu') # First: the library is imported after the device

import torch  # noqa: E402

sys.path.append(str(Path(__file__).parents[1])) # for toys

import matplotlib  # noqa: E402

matplotlib.use('Agg')

from fastai.callback.core import Callback  # noqa: E402
from fastai.callback.training import GradientAccumulation  # noqa: E402
from fastai.optimizer import OptimWrapper  # noqa: E402
from fastai.vision.all import set_seed  # noqa: E402
from toys import quiet  # noqa: E402

from pyramidreid.data.loaders import ReIDDataLoaders  # noqa: E402
from pyramidreid.evaluation import ranking  # noqa: E402
from pyramidreid.evaluation.distances import Distances  # noqa: E402
from pyramidreid.evaluation.retrieval import evaluate, evaluate_distances  # noqa: E402
from pyramidreid.explain.interpretation import ReIDInterpretation  # noqa: E402
from pyramidreid.explain.matching_bands import *  # noqa: E402
from pyramidreid.explain.suspect_labels import *  # noqa: E402
from pyramidreid.export.model_files import *  # noqa: E402
from pyramidreid.export.onnx_runtime import Runtime  # noqa: E402
from pyramidreid.gallery.gallery import Gallery  # noqa: E402
from pyramidreid.models.backbone import resnet10  # noqa: E402
from pyramidreid.training.checkpoints import Checkpoints, FiniteLoss  # noqa: E402
from pyramidreid.training.dynamic_losses import KnownSmoothLoss  # noqa: E402
from pyramidreid.training.learner import pyramid_learner  # noqa: E402
from pyramidreid.training.recipes import *  # noqa: E402
from pyramidreid.training.threshold_calibration import *  # noqa: E402

gpu.make_default()

def learner(people, path, progress=False, num_workers=0, **kwargs):
    "A small learner on the device"
    set_seed(0)
    dls = ReIDDataLoaders.from_market(people, p=4, k=4, size=(48,24), num_workers=num_workers)
    learn = pyramid_learner(dls, resnet10, pretrained=False, n_parts=3, emb_sz=8, lr=3e-3, path=path, **kwargs)
    assert learn.dls.device.type==DEVICE
    return learn if progress else quiet(learn)

def model_device(learn): return next(learn.model.parameters()).device.type

def sorts_on_device(seen): return sum(n for name,n in seen.counts.items() if name.startswith('aten::sort'))

def card(result): return str(result),*numbers(result)
def numbers(result): return result.ap.tolist(),result.cmc.tolist(),result.n_tied

# The pretend GPU computes with the CPU's kernels, so its numbers are equal. A real one rounds in another way

def close(got, want, **kwargs):
    "Are two tensors equal within rounding? On a real GPU within 1e-4"
    if not IS_FAKE: kwargs = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, want, **kwargs)

def same_card(got, want):
    "Are two cards equal, whatever distances they are of? On a real GPU two images may change places, if hardly any do"
    if IS_FAKE: return numbers(got)==numbers(want)
    return abs(got.mAP-want.mAP)<1e-3 and got.n_query_valid==want.n_query_valid

def same_weights(got, want):
    "Are two weights equal? A real GPU may add up the gradients of a pooling in another order: within one per cent"
    if IS_FAKE: return torch.equal(got, want)
    got,want = got.double(),want.double()
    return bool((got-want).norm() <= .01*want.norm()+1e-6)

# Ranking

def some_embeddings():
    "Queries and gallery with many equal distances, and ids that leave out some of them"
    g = torch.Generator().manual_seed(3)
    query,gallery = [torch.randint(-2, 3, (n,4), generator=g).float()+.5 for n in (30,200)]
    pids = [torch.randint(0, 12, (len(o),), generator=g) for o in (query,gallery)]
    cams = [torch.randint(0, 3, (len(o),), generator=g) for o in (query,gallery)]
    pids[1][::9] = -1
    return query,gallery,*pids,*cams

def ranks_on_the_device(people, path):
    "The same card as on the CPU; of distances as they are, of whole numbers, and with images at infinity and masked"
    query,gallery,*ids = some_embeddings()
    own = Distances(query, gallery, device=DEVICE)[:].cpu()
    want = evaluate(query, gallery, *ids, progress_bar=False) if IS_FAKE else evaluate_distances(own, *ids)
    with gpu.watch() as seen: got = evaluate(query, gallery, *ids, device=DEVICE, progress_bar=False)
    assert numbers(got)==numbers(want) and sorts_on_device(seen) and want.n_tied
    dist = (query[:,None]-gallery).square().sum(-1)
    far = dist.masked_fill(torch.rand(dist.shape)<.1, torch.inf)
    for given in (dist, dist.long(), far, dist.half()):
        mask = torch.rand(dist.shape)<.1
        got,want = (evaluate_distances(o, *ids, mask=mask) for o in (given.to(DEVICE), given))
        assert card(got)==card(want)

def ranks_on_the_cpu_without_double_precision(people, path):
    "As on MPS"
    own,ranking._WITHOUT_DOUBLE = ranking._WITHOUT_DOUBLE,('mps',DEVICE)
    try: ranks_on_the_cpu(people, path)
    finally: ranking._WITHOUT_DOUBLE = own

def ranks_on_the_cpu(people, path):
    query,gallery,*ids = some_embeddings()
    own = Distances(query, gallery, device=DEVICE)[:].cpu()
    want = evaluate(query, gallery, *ids, progress_bar=False) if IS_FAKE else evaluate_distances(own, *ids)
    with gpu.watch() as seen: got = evaluate(query, gallery, *ids, device=DEVICE, progress_bar=False)
    assert numbers(got)==numbers(want) and not sorts_on_device(seen)
    dist = (query[:,None]-gallery).square().sum(-1).long()
    assert card(evaluate_distances(dist.to(DEVICE), *ids))==card(evaluate_distances(dist, *ids))
    ranks = torch.tensor([[0,2,-1]])
    for got,want in zip(ranking.ranking_scores(ranks.to(DEVICE)), ranking.ranking_scores(ranks)):
        assert got.device.type=='cpu' and torch.equal(got, want)
    learn = learner(people, path)
    with gpu.watch() as seen:
        learn.fit(1)
        learn.evaluate()
    assert 0<learn.recorder.values[-1][4]<=1 and not sorts_on_device(seen)

# Before a fit

def uses_the_device_before_any_fit(people, path):
    "Each of these moves the model first; `evaluate` ranks on the device, too"
    first = learner(people, path)
    first.fit(1)
    file,want = first.save('first'),first.embed()
    image = first.dls.valid.items.fn.iloc[0]
    uses = dict(embed=lambda o: o.embed(), predict=lambda o: o.predict(image), evaluate=lambda o: o.evaluate(),
                show_results=lambda o: o.show_results(), to_rank=lambda o: o.to_rank(), summary=lambda o: o.summary(),
                predict_in=lambda o: o.predict(image, o.dls.valid), rerank=lambda o: o.evaluate(rerank=True))
    for name,use in uses.items():
        learn = learner(people, path).load(file.stem, with_opt=False)
        with gpu.watch() as seen: use(learn)
        if name!='summary': assert model_device(learn)==DEVICE and seen.launches>50, name
        if name=='evaluate': assert sorts_on_device(seen)
        close(learn.embed(), want)
    assert same_card(first.evaluate(), first.evaluate(device='cpu'))

def loads_before_the_first_fit(people, path):
    "Optimizers of torch: their state, and the weights they train, lie on the device"
    for opt in (torch.optim.SGD, torch.optim.AdamW):
        opt_func = partial(OptimWrapper, opt=opt)
        first = learner(people, path, opt_func=opt_func)
        first.fit(1)
        again = learner(people, path, opt_func=opt_func).load(first.save(opt.__name__).stem)
        again.fit(1)
        assert model_device(again)==DEVICE and finite(again) and again.recorder.values[-1][4]>0, opt.__name__

# Waits

class Watched(Callback):
    "Watches the training steps of an epoch, from the second on; `kinds` are counts for each step"
    order,run_valid = 99,False
    def __init__(self, skip=1): self.skip,self.watch,self.n = skip,None,0
    def after_batch(self):
        if self.iter+1==self.skip: self.watch = gpu.watch().__enter__()
        elif self.watch: self.n += 1
        if self.iter+1==self.n_iter and self.watch: self.watch.__exit__(None, None, None)

def waits_of_a_step(learn, fit=lambda learn, cbs: learn.fit(1, cbs=cbs), cbs=()):
    "Numbers of waits and of copies per step"
    watched = Watched()
    fit(learn, [watched, FiniteLoss(), *cbs])
    seen,n = watched.watch,watched.n
    assert n>3
    seen.show(per=n)
    return seen.n_waits()/n,seen.n('H2D async')/n if IS_FAKE else None

def waits_once_in_a_step(people, path):
    "The losses are read once, with progress bar, `FiniteLoss` and dynamic training, and without"
    for kwargs in ({}, dict(dynamic=False)):
        for num_workers in (0,1):
            waits,copies = waits_of_a_step(learner(people, path, progress=True, num_workers=num_workers, **kwargs))
            assert waits==1 and (copies is None or copies>=2), (kwargs, num_workers, waits, copies)

WATCHED = dict(fit_one_cycle=lambda learn, cbs: learn.fit_one_cycle(1, 3e-3, cbs=cbs),
               fit_paper=lambda learn, cbs: learn.fit_paper(1, .001, .01, cbs=cbs),
               fit_modern=lambda learn, cbs: learn.fit_modern(1, .001, .01, frozen_epochs=0, cbs=cbs))

def waits_of_every_recipe(people, path):
    "One in a step for the losses, also with gradient accumulation and with metrics of training"
    for name,fit in WATCHED.items():
        assert waits_of_a_step(learner(people, path, progress=True), fit)[0]==1, name
    accumulates = GradientAccumulation(n_acc=32) # Two batches to a step
    assert waits_of_a_step(learner(people, path, progress=True), cbs=[accumulates])[0]==1

def waits_of_evaluation(people, path):
    "None for the forward passes: one copy to the device, and one of the embeddings from it, in each batch"
    learn = learner(people, path)
    learn.embed()
    n = len(learn.dls.valid)
    with gpu.watch() as seen: learn.embed()
    seen.show(per=n)
    assert seen.n_waits()==n
    if IS_FAKE: assert seen.n('D2H')==n and seen.n('H2D async')==2*n
    with gpu.watch() as seen: learn.evaluate()
    seen.show(per=n) # The waits of the ranking

class TwoRanks:
    "Exchanges of two equal ranks, through a library that knows this device only, as NCCL does"
    def all_reduce(self, x):
        assert x.device.type==DEVICE, 'No backend type associated with device type cpu'
        x.mul_(2)
    def all_gather(self, out, x):
        assert x.device.type==DEVICE, 'No backend type associated with device type cpu'
        for o in out: o.copy_(x)

def waits_with_two_ranks(people, path):
    "The recorder takes the mean over the ranks that was read with the losses, and exchanges nothing on the CPU"
    for kwargs in ({}, dict(dynamic=False)):
        alone = learner(people, path, **kwargs)
        alone.fit(1, cbs=FiniteLoss())
        learn,ranks = learner(people, path, progress=True, **kwargs),TwoRanks()
        learn.recorder.smooth_loss.__class__ = KnownSmoothLoss # As `Ranks` does
        learn.recorder.train_metrics = True
        learn.metrics = []
        own = torch.distributed.all_reduce,torch.distributed.all_gather
        torch.distributed.all_reduce,torch.distributed.all_gather = ranks.all_reduce,ranks.all_gather
        os.environ['WORLD_SIZE'] = '2'
        try: waits,_ = waits_of_a_step(learn)
        finally:
            del os.environ['WORLD_SIZE']
            torch.distributed.all_reduce,torch.distributed.all_gather = own
        assert waits==1, (kwargs, waits)
        for got,want in zip(learn.recorder.losses, alone.recorder.losses): close(got, want)

# Recipes

def finite(learn): return all(v.isfinite().all() for v in learn.model.state_dict().values())

RECIPES = dict(fit=lambda learn, **kwargs: learn.fit(2, **kwargs),
               fit_one_cycle=lambda learn, **kwargs: learn.fit_one_cycle(2, 3e-3, **kwargs),
               fine_tune=lambda learn, **kwargs: learn.fine_tune(1, 3e-3, **kwargs),
               fit_paper=lambda learn, **kwargs: learn.fit_paper(2, .001, .01, **kwargs),
               fit_modern=lambda learn, **kwargs: learn.fit_modern(2, .001, .01, **kwargs))

def trains_by_every_recipe(people, path):
    "A fit, an evaluation, `save`, `load` and `export` after it"
    for name,fit in RECIPES.items():
        learn = learner(people, path)
        fit(learn)
        result = learn.evaluate()
        assert 0<result.mAP<=1 and finite(learn) and learn.recorder.values[-1][4]>0, name
        emb = learn.embed()
        again = learner(people, path).load(learn.save(name).stem)
        close(again.embed(), emb)
        learn.export(f'{name}.pkl')

class Stop(Callback):
    "Ctrl-C in the second epoch, inside of autocast if there is one"
    order = 9
    def after_pred(self):
        if self.training and self.epoch==1: raise KeyboardInterrupt

def resumes(people, path):
    "With every recipe: the same weights as without the interrupt"
    for name in ('fit_one_cycle','fit_paper','fit_modern'):
        whole = learner(people, path)
        RECIPES[name](whole, cbs=Checkpoints(f'whole_{name}'))
        cut = learner(people, path) # It sets the seed
        try: RECIPES[name](cut, cbs=[Checkpoints(name), Stop()])
        except KeyboardInterrupt: pass
        else: raise AssertionError('not interrupted')
        again = learner(people, path)
        RECIPES[name](again, cbs=Checkpoints(name, resume=True))
        weights = again.model.state_dict()
        for key,v in whole.model.state_dict().items(): assert same_weights(weights[key], v), (name, key)

class Spoil(Callback):
    "The loss is not finite at the third step"
    order = -8
    def after_loss(self):
        if self.training and self.train_iter==2: self.learn.loss = self.loss*float('nan')

def is_tidy(learn):
    "Is neither autocast nor `FiniteLoss` left over?"
    return not (torch.is_autocast_enabled(DEVICE) or learn._grab_cbs(FiniteLoss)) and model_device(learn)==DEVICE

def leaves_autocast(people, path):
    "After Ctrl-C, and after a loss that is not finite: later evaluations compute in single precision"
    for i,(cb,error) in enumerate([(Stop(),KeyboardInterrupt), (Spoil(),FloatingPointError)]):
        learn = learner(people, path)
        try: RECIPES['fit_modern'](learn, cbs=[Checkpoints(f'tidy{i}'), cb])
        except error: pass
        else: raise AssertionError(f'no {error.__name__}')
        assert is_tidy(learn)
        on_cpu = learner(people, path)
        on_cpu.dls.to(torch.device('cpu'))
        on_cpu.model.load_state_dict({name:v.cpu() for name,v in learn.model.state_dict().items()})
        close(learn.embed(), on_cpu.embed())
        assert model_device(on_cpu)=='cpu'

# After a fit

def files_hold_the_model(people, path):
    "ONNX, `.pt2` and a model folder of a model on the device give what it embeds; a gallery embeds on the device"
    learn = learner(people, path)
    learn.fit(1)
    images = learn.dls.valid.items.iloc[:20]
    want = learn.embed(learn.dls.test_dl(images))
    learn.to_onnx(path/'m.onnx')
    learn.to_exported(path/'m.pt2')
    embedders = [Runtime(path/'m.onnx'), load_embedder(learn.save_model(path/'m'))]
    for embedder in embedders:
        close(torch.tensor(embedder.embed(images.fn)), want, atol=2e-5, rtol=0)
    assert model_device(learn)==DEVICE
    with gpu.watch() as seen: gallery = Gallery.from_learner(learn, images[['fn']])
    assert seen.launches>50
    found = gallery.search(images.fn.iloc[3], k=5).similarity
    nearest = (want @ want[3]).sort(descending=True)[0][:5]
    close(torch.tensor(found.tolist()), nearest, atol=2e-5, rtol=0)
    gallery.save(path/'g')
    assert len(Gallery.load(path/'g', learn))==20

def explains_and_calibrates(people, path):
    "What looks at single images, or at all of them"
    learn = learner(people, path)
    learn.fit_one_cycle(2, 3e-3)
    learn.calibrate()
    query,gallery = (learn.dls.valid.items.fn[learn.dls.valid.items.role==role].iloc[0] for role in (1,2))
    learn.explain(query, gallery)
    interp = ReIDInterpretation.from_learner(learn)
    interp.plot_worst(n=2, k=3)
    interp.label_errors()
    assert model_device(learn)==DEVICE

CASES = [ranks_on_the_device, ranks_on_the_cpu_without_double_precision, uses_the_device_before_any_fit,
         loads_before_the_first_fit, waits_once_in_a_step, waits_of_every_recipe, waits_of_evaluation,
         waits_with_two_ranks, trains_by_every_recipe, resumes, leaves_autocast, files_hold_the_model,
         explains_and_calibrates]

def run(name, people, folder): {case.__name__:case for case in CASES}[name](Path(people), Path(folder))

if __name__=='__main__':
    run(*sys.argv[1:])
    print(f'{sys.argv[1]}: passed')
