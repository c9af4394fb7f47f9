"""Train on Market-1501, or another known dataset, by one of the recipes, and write the card of one final evaluation.
`PYRAMIDREID_DATA=DIR python benchmarks/market1501.py --recipe modern --weights FILE`
A run that is not finished leaves what its epochs took in a file of its own, `NAME-unfinished.json`.
By default the evaluation is the full official test, no image of which is used before. `--hold-out 0.2` evaluates on
held-out training identities instead: there, and only there, settings may be chosen. `--curve` follows the test split
during the training; nothing is chosen by it either."""
import argparse
import ast
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from common import circumstances, results

from pyramidreid.core import atomic_write


def knob(text):
    "`name=value` as a pair"
    name,_,value = text.partition('=')
    try: return name, ast.literal_eval(value)
    except (SyntaxError, ValueError) as e:
        raise argparse.ArgumentTypeError(f'{text!r} is not name=value, e.g. lr_body=1e-3 or moms=(.95,.85,.95)') from e

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', default=os.environ.get('PYRAMIDREID_DATA'), help='folder that holds the dataset')
    add('--set', default='Market-1501-v15.09.15', help="the dataset's folder below it, e.g. cuhk03-np")
    add('--recipe', default='modern', choices=('paper','modern'))
    add('--knobs', type=knob, nargs='*', default=(), metavar='NAME=VALUE', help='arguments of the recipe')
    add('--tfms', choices=('person','strong'), default='person', help="augmentation")
    add('--tfms-knobs', type=knob, nargs='*', default=(), metavar='NAME=VALUE', help='arguments of the augmentation')
    add('--arch', default='resnet50', help='a torchvision ResNet, or the name of a timm model')
    add('--weights', help='file of ImageNet weights; without it they are downloaded')
    add('--from-scratch', action='store_true', help='no ImageNet weights')
    add('--size', type=int, nargs=2, default=(384,128), metavar=('H','W'))
    add('--epochs', type=int, help="default: the recipe's own number")
    add('--paper', action='store_true',
        help='the method as published: no BNNeck, dynamic training by its rule; always so with --recipe paper')
    add('--hold-out', type=float, help='evaluate on this fraction of the training identities, not on the test split')
    add('--curve', type=int, help='also evaluate after every so many epochs')
    add('--fp32', action='store_true', help='no bf16 on a GPU')
    add('--compile', action='store_true', help='torch.compile the body and the head')
    add('--cache', metavar='memory|FILE', help='decode every image once, and augment in batches on the device')
    add('--workers', type=int, default=2, help='processes that load images; none with --cache')
    add('--seed', type=int, default=0)
    add('--checkpoints', help='folder for checkpoints; a run found there is resumed')
    add('--minutes', type=float, help='stop after the epoch in which this time is over; --checkpoints resumes it')
    add('--steps', type=int, help='stop after so many steps: to try the script')
    add('--save', metavar='DIR', help='save the model there, as learn.save_model does')
    add('--out', help='name of the result, default SET-RECIPE-DEVICE')
    args = parser.parse_args(argv)
    if not args.data: parser.error('say where the data is: --data, or the environment variable PYRAMIDREID_DATA')
    return args

def is_on_gpu():
    "Will fastai put loaders and models on a GPU?"
    from fastai.torch_core import default_device
    return default_device().type!='cpu'

def result_file(args):
    name = f"{args.set.split('-v')[0].replace('-','').lower()}-{args.recipe}-{'cuda' if is_on_gpu() else 'cpu'}"
    return results/f'{args.out or name}.json'

def unfinished_file(args):
    file = result_file(args)
    return file.with_name(f'{file.stem}-unfinished.json')

def write_unfinished(args, watch):
    "Write what the epochs so far took, and their losses"
    recorder = watch.learn.recorder
    note = dict(circumstances(), recipe=args.recipe, epochs=watch.epoch+1, of=watch.n_epoch, steps=len(recorder.losses),
                seconds=watch.seconds, losses=[float(loss) for loss in recorder.losses[::100]])
    file = unfinished_file(args)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial_file: partial_file.write_text(json.dumps(note))

def callbacks(args, began):
    "What watches the time, and what leaves out validation"
    from fastai.callback.core import Callback, CancelFitException, CancelValidException

    class Watch(Callback):
        "Seconds of training after each epoch, and the end when it is time"
        order = 95
        def __init__(self): self.seconds,self.stopped = [],False
        def before_train(self): self.at = time.perf_counter()
        def after_train(self):
            before = self.seconds[-1] if self.seconds else 0
            self.seconds.append(time.perf_counter()-self.at + before)
        def after_batch(self):
            if args.steps and self.training and self.train_iter>=args.steps: raise CancelFitException
        def after_epoch(self):
            if args.checkpoints: write_unfinished(args, self)
            unfinished = self.epoch+1<self.n_epoch
            self.stopped = bool(args.minutes) and unfinished and time.perf_counter()-began > 60*args.minutes
            if self.stopped: raise CancelFitException
        def state_dict(self): return dict(seconds=list(self.seconds))
        def load_state_dict(self, sd): self.seconds = sd['seconds']

    class ValidateSometimes(Callback):
        "No validation but for the curve"
        order = -10
        def before_validate(self):
            if not args.curve or (self.epoch+1)%args.curve: raise CancelValidException

    return Watch(),ValidateSometimes()

def make_loaders(args, lib):
    tfms = lib.person_tfms if args.tfms=='person' else lib.strong_tfms
    loading = dict(cache=True if args.cache=='memory' else args.cache) if args.cache else dict(num_workers=args.workers)
    table = lib.dataset_table(Path(args.data)/args.set)
    tfms = partial(tfms, **dict(args.tfms_knobs))
    return lib.ReIDDataLoaders.from_table(
        table, p=8, k=8, size=args.size, valid_pct=args.hold_out, tfms=tfms, **loading)

def make_learner(args, lib, cbs):
    from fastai.callback.fp16 import AMPMode, MixedPrecision
    cbs = list(cbs)
    if is_on_gpu() and not args.fp32: cbs.append(MixedPrecision(AMPMode.BF16))
    if args.checkpoints: cbs.append(lib.Checkpoints(Path(args.checkpoints).absolute(), resume=True))
    arch = getattr(lib, args.arch, args.arch)
    pretrained = not args.from_scratch
    method = dict(neck=False, dynamic=True) if args.paper or args.recipe=='paper' else {}
    learn = lib.pyramid_learner(
        make_loaders(args, lib), arch, pretrained=pretrained, weights=args.weights, cbs=cbs, **method)
    learn = learn.to_channelslast(use_amp=False)
    if args.compile:
        for part in (learn.model.body, learn.model.head): part.compile()
    return learn

def fit(learn, args):
    settings = dict(args.knobs)
    if args.epochs: settings['n_epoch'] = args.epochs
    if args.recipe=='paper': return learn.fit_paper(**settings)
    if args.fp32: settings.setdefault('mixed', False)
    learn.fit_modern(**settings)

def main(argv=None):
    began = time.perf_counter()
    args = parse(argv)
    import torch

    import pyramidreid.all as lib
    torch.backends.cudnn.benchmark = is_on_gpu()
    lib.set_seed(args.seed)
    watch,sometimes = callbacks(args, began)
    learn = make_learner(args, lib, [watch, sometimes])
    fit(learn, args)
    if watch.stopped: sys.exit(f'Stopped after {len(watch.seconds)} epochs: run the same command again to resume')
    metric_names = learn.recorder.metric_names[1:-1]
    epochs = [dict(zip(metric_names, map(float, values))) for values in learn.recorder.values]
    history,start = learn.dynamic_loss_weights.history,time.perf_counter()
    card = learn.evaluate()
    print(card)
    if args.save: learn.save_model(args.save, card)
    epochs = [{**row, 'seconds': seconds} for row,seconds in zip(epochs, watch.seconds)]
    note = dict(
        circumstances(), recipe=args.recipe,
        minutes_training=round(watch.seconds[-1]/60, 2) if watch.seconds else None,
        minutes_evaluation=round((time.perf_counter()-start)/60, 2), steps=len(history),
        both=round((history.weight_triplet>0).mean(), 3), random=round((history['mode']=='random').mean(), 3),
        epochs=epochs, card=json.loads(card.to_json()))
    results.mkdir(exist_ok=True)
    result_file(args).write_text(json.dumps(note))
    unfinished_file(args).unlink(missing_ok=True)

if __name__=='__main__': main()
