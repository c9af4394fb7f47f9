"""Train on Market-1501, or another known data set, by one of the recipes, and write the card of one evaluation at the end.
`PYRAMIDREID_DATA=DIR python benchmarks/market1501.py --recipe modern --weights FILE`
By default the evaluation is the full official test, no image of which is looked at before. `--hold-out 0.2` evaluates on held-out training identities
instead: there, and only there, settings may be chosen. `--curve` follows the test split during the training; nothing is chosen by it either."""
import argparse
import ast
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from common import circumstances, results


def knob(text):
    "`name=value` as a pair"
    name,_,value = text.partition('=')
    try: return name,ast.literal_eval(value)
    except (SyntaxError,ValueError): raise argparse.ArgumentTypeError(f'{text!r} is not name=value, e.g. lr_body=1e-3 or moms=(.95,.85,.95)')

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--data', default=os.environ.get('PYRAMIDREID_DATA'), help='folder that holds the data set')
parser.add_argument('--set', default='Market-1501-v15.09.15', help="the data set's folder below it, e.g. cuhk03-np")
parser.add_argument('--recipe', default='modern', choices=('paper','modern'))
parser.add_argument('--knobs', type=knob, nargs='*', default=(), metavar='NAME=VALUE', help='arguments of the recipe')
parser.add_argument('--tfms', choices=('person','strong'), default='person', help="augmentation")
parser.add_argument('--tfms-knobs', type=knob, nargs='*', default=(), metavar='NAME=VALUE', help='arguments of the augmentation')
parser.add_argument('--arch', default='resnet50', help='a torchvision ResNet, or the name of a timm model')
parser.add_argument('--weights', help='file of ImageNet weights; without it they are downloaded')
parser.add_argument('--size', type=int, nargs=2, default=(384,128), metavar=('H','W'))
parser.add_argument('--epochs', type=int, help="default: the recipe's own number")
parser.add_argument('--hold-out', type=float, help='evaluate on this part of the training identities instead of the test split')
parser.add_argument('--curve', type=int, help='also evaluate after every so many epochs')
parser.add_argument('--fp32', action='store_true', help='no bf16 on a GPU')
parser.add_argument('--compile', action='store_true', help='torch.compile the body and the head')
parser.add_argument('--cache', metavar='memory|FILE', help='decode every image once, and augment in batches on the device')
parser.add_argument('--workers', type=int, default=2, help='processes that load images; none with --cache')
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--checkpoints', help='folder for checkpoints; a run that lies there goes on')
parser.add_argument('--minutes', type=float, help='stop after the epoch in which this time is over; with --checkpoints the next call goes on')
parser.add_argument('--steps', type=int, help='stop after so many steps: to try the script')
parser.add_argument('--save', metavar='DIR', help='save the model there, as learn.save_model does')
parser.add_argument('--out', help='name of the result, default SET-RECIPE-DEVICE')

if __name__=='__main__':
    began = time.perf_counter()
    args = parser.parse_args()
    if not args.data: parser.error('say where the data is: --data, or the environment variable PYRAMIDREID_DATA')
    import torch
    import torchvision
    from fastai.callback.core import CancelFitException, CancelValidException
    from fastai.callback.fp16 import AMPMode, MixedPrecision

    import pyramidreid.all as lib
    cuda = torch.cuda.is_available()
    torch.backends.cudnn.benchmark = cuda

    class Watch(lib.Callback):
        "Seconds of training after each epoch, no validation but for the curve, and the end when it is time"
        order = 95
        def __init__(self): self.seconds,self.stopped = [],False
        def before_train(self): self.at = time.perf_counter()
        def after_train(self): self.seconds.append(time.perf_counter()-self.at + (self.seconds[-1] if self.seconds else 0))
        def after_batch(self):
            if args.steps and self.training and self.train_iter>=args.steps: raise CancelFitException
        def after_epoch(self):
            self.stopped = bool(args.minutes) and self.epoch+1<self.n_epoch and time.perf_counter()-began > 60*args.minutes
            if self.stopped: raise CancelFitException
        def state_dict(self): return dict(seconds=list(self.seconds))
        def load_state_dict(self, sd): self.seconds = sd['seconds']
    class ValidateSometimes(lib.Callback):
        order = -10
        def before_validate(self):
            if not args.curve or (self.epoch+1)%args.curve: raise CancelValidException

    lib.set_seed(args.seed)
    tfms = dict(person=lib.person_tfms, strong=lib.strong_tfms)[args.tfms]
    table = lib.dataset_table(Path(args.data)/args.set)
    dls = lib.ReIDDataLoaders.from_table(table, p=8, k=8, size=args.size, valid_pct=args.hold_out,
        tfms=partial(tfms, **dict(args.tfms_knobs)), cache={None:None,'memory':True}.get(args.cache, args.cache), **({} if args.cache else dict(num_workers=args.workers)))
    watch = Watch()
    cbs = [watch,ValidateSometimes()] + ([MixedPrecision(AMPMode.BF16)] if cuda and not args.fp32 else [])
    if args.checkpoints: cbs.append(lib.Checkpoints(Path(args.checkpoints).absolute(), resume=True))
    learn = lib.pyramid_learner(dls, getattr(lib, args.arch, args.arch), weights=args.weights, cbs=cbs).to_channelslast(use_amp=False)
    if args.compile:
        for part in (learn.model.body,learn.model.head): part.compile()
    fit = dict(paper=learn.fit_paper, modern=partial(learn.fit_modern, **(dict(mixed=False) if args.fp32 else {})))[args.recipe]
    fit(**{**({'n_epoch':args.epochs} if args.epochs else {}), **dict(args.knobs)})
    if watch.stopped: sys.exit(f'Stopped after {len(watch.seconds)} epochs: run the same command again to go on')
    names,history,start = learn.recorder.metric_names[1:-1],learn.dynamic_loss_weights.history,time.perf_counter()
    card = learn.evaluate()
    print(card)
    if args.save: learn.save_model(args.save, card)
    rows = [dict(zip(names, map(float, v))) for v in learn.recorder.values]
    note = dict(circumstances(), recipe=args.recipe, minutes_training=round(watch.seconds[-1]/60,2) if watch.seconds else None,
        minutes_evaluation=round((time.perf_counter()-start)/60,2), steps=len(history), both=round((history.weight_triplet>0).mean(),3),
        random=round((history['mode']=='random').mean(),3), epochs=[{**r, 'seconds':s} for r,s in zip(rows, watch.seconds)], card=json.loads(card.to_json()))
    results.mkdir(exist_ok=True)
    out = args.out or f"{args.set.split('-v')[0].replace('-','').lower()}-{args.recipe}-{'cuda' if cuda else 'cpu'}"
    (results/f'{out}.json').write_text(json.dumps(note))
