"""Train a light model that pyramidreid ships: an EfficientNet-Lite0 pyramid, in stages of growing images.
`python benchmarks/light_model.py --data DIR [DIR] --weights FILE --run FOLDER [--minutes M]`
Stopped or killed, the same command resumes it, also on another machine to which FOLDER was copied. `--hold-out 0.2`
judges on people held out of the training set: settings are chosen there, and only there. With `--test` the official
test of the first dataset is evaluated, once, at the end, and `--save DIR` writes the model to ship."""
import argparse
import json
import os
import sys
import time
from copy import deepcopy
from datetime import date
from functools import partial
from pathlib import Path

from bodies import multiply_adds
from common import circumstances, hardware, results
from market1501 import callbacks, knob
from report import LIGHT_MODELS

from pyramidreid.evaluation.protocol_card import ReIDResult
from pyramidreid.export.model_cards import RESEARCH_ONLY

# What a model card says about known training data, by the beginning of the folder's name
ABOUT_DATA = {
    'market': "Market-1501 (Zheng et al., ICCV 2015) shows people in front of a supermarket on a campus in Beijing, by "
              "day, mostly young and in summer clothes, from six cameras. A detector of its time (DPM) made the crops, "
              "some of them misaligned. There was little else to learn from: no night, no infrared, few children, "
              "old people or winter clothes.",
    'cuhk03': "CUHK03 (Li et al., CVPR 2014) shows people on a campus in Hong Kong, by day, from pairs of cameras."}

def stage(text):
    "`HEIGHTxWIDTH:EPOCHS[:SCALE[:MIX]]` as (size, epochs, factor of the learning rates, fraction of random batches)"
    try:
        size,epochs,scale,mix = (*text.split(':'), '', '')[:4]
        height,width = map(int, size.split('x'))
        return (height,width),int(epochs),float(scale or 1),float(mix) if mix else None
    except ValueError as e:
        raise argparse.ArgumentTypeError(f'{text!r} is not like 192x96:20, 192x96:20:0.5 or 192x96:20:0.5:0.2') from e

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', type=Path, nargs='+', required=True, help='folders of known datasets; the first is evaluated')
    add('--weights', help='file of ImageNet weights; without it, from scratch')
    add('--start', choices=list(LIGHT_MODELS), help='pretrained model to go on from; its stages and minutes count too')
    add('--run', type=Path, required=True, help='folder for checkpoints, finished stages and image caches')
    add('--stages', type=stage, nargs='+', metavar='HxW:EPOCHS[:SCALE[:MIX]]',
        default=[stage(text) for text in ('96x48:20', '192x96:20:0.5')])
    add('--arch', default='tf_efficientnet_lite0')
    add('--n-parts', type=int, default=6)
    add('--emb-sz', type=int, default=128)
    add('--levels', type=int, nargs='+')
    add('--drop', type=float, default=.2)
    add('--mix', type=float, default=0,
        help='fraction of random batches, which train the ID loss alone; a stage may have its own')
    add('--knobs', type=knob, nargs='*', default=(), metavar='NAME=VALUE', help='arguments of fit_modern')
    add('--tfms-knobs', type=knob, nargs='*', default=(), metavar='NAME=VALUE', help='arguments of strong_tfms')
    add('--hold-out', type=float, help='fraction of the training identities to hold out and evaluate on')
    add('--test', action='store_true', help='evaluate on the official test split, at the very end')
    add('--minutes', type=float, help='stop after the epoch in which this time is over; the same command resumes it')
    add('--steps', type=int, help='stop each stage after so many steps: to try the script')
    add('--threads', type=int, default=os.cpu_count())
    add('--seed', type=int, default=0)
    add('--also', type=Path, nargs='+', default=(), help='other datasets to evaluate on, at the end')
    add('--save', metavar='DIR', help='write the model there in half precision, with its card')
    add('--out', default='light-model', help='name of the result')
    args = parser.parse_args(argv)
    if args.test and args.hold_out: parser.error('--test evaluates the test split, --hold-out other people: choose one')
    if args.save and not args.test: parser.error('--save writes a model with its official test: add --test')
    args.curve = args.checkpoints = None # not these of market1501.py
    return args

def training_table(args, lib):
    "The training images of all datasets, and the queries and gallery of the first"
    tables = [lib.dataset_table(folder) for folder in args.data]
    return lib.join_tables(*tables, valid=0) if len(tables)>1 else tables[0]

def make_loaders(args, lib, size):
    tfms = partial(lib.strong_tfms, **{'pad':0, 'colour':0, 'erase':.2, **dict(args.tfms_knobs)})
    held = f'-without-{args.hold_out}' if args.hold_out else ''
    cache = args.run.absolute()/f'{size[0]}x{size[1]}{held}.cache'
    return lib.ReIDDataLoaders.from_table(
        training_table(args, lib), p=8, k=8, size=size, valid_pct=args.hold_out, tfms=tfms, cache=cache)

def where_trained(torch):
    "The machine that trains a stage, as its table and its card name it"
    threads = '' if torch.cuda.is_available() else f', {torch.get_num_threads()} threads'
    return hardware()+threads

def make_learner(args, lib, number, cbs):
    "The learner of a stage, before anything is trained"
    size,_,_,mix = args.stages[number]
    if mix is None: mix = args.mix
    model = dict(pretrained=args.start) if args.start else dict(
        arch=getattr(lib, args.arch, args.arch), pretrained=False, weights=args.weights, n_parts=args.n_parts,
        emb_sz=args.emb_sz, levels=args.levels, neck=True)
    dynamic = lib.MixedBatches(mix, seed=args.seed) if mix else False
    learn = lib.pyramid_learner(
        make_loaders(args, lib, size), **model, drop=args.drop, dynamic=dynamic, metrics=[], cbs=cbs)
    learn.path = args.run.absolute()
    return learn.to_channelslast(use_amp=False)

def fit_stage(args, lib, number, began):
    "Train one stage, from the weights of the one before; return the learner, its seconds, and whether it was stopped"
    _,epochs,scale,_ = args.stages[number]
    lib.set_seed(args.seed+number)
    watch,sometimes = callbacks(args, began)
    checkpoints = lib.Checkpoints(f'checkpoints-{number+1}', keep=1, resume=True)
    learn = make_learner(args, lib, number, [watch, sometimes, checkpoints])
    if number: learn.load(f'stage-{number}', with_opt=False)
    rates = dict(lr_body=.01, lr_head=.1) | dict(args.knobs)
    rates.update({name: scale*rates[name] for name in ('lr_body','lr_head')})
    with learn.no_bar(): learn.fit_modern(epochs, **{'frozen_epochs':int(number==0), **rates})
    if not watch.stopped: learn.save(f'stage-{number+1}', with_opt=False)
    seconds = watch.seconds[-1] if watch.seconds else 0. # None were counted if --steps ended the stage
    return learn,seconds,watch.stopped

def cost(learn, size):
    "Parameters and multiply-adds of an embedding, in which the identity classifiers have no part"
    counted = [p.numel() for name,p in learn.model.named_parameters() if 'classify' not in name]
    return dict(parameters=sum(counted), macs=multiply_adds(deepcopy(learn.model).eval(), size))

def with_onnx(learn, args):
    "As `learn.embed`, by onnxruntime, which is twice as fast on a CPU"
    import torch

    from pyramidreid.export.onnx_runtime import Runtime
    from pyramidreid.images import load_pixels
    from pyramidreid.models.pyramid import join_branches
    head,norm = learn.model.head,learn.model.norm
    runtime = Runtime(learn.to_onnx(args.run/'model.onnx'), threads=args.threads)
    def embed(dl, flip=False):
        rows,files = [],dl.items.fn.tolist()
        for first in range(0, len(files), 64):
            pixels = load_pixels(files[first:first+64], runtime.size)
            row = runtime.run(pixels)
            if flip: row = (row+runtime.run(pixels[:, :, ::-1].copy()))/2
            rows.append(torch.from_numpy(row))
        rows = torch.cat(rows)
        return join_branches(rows.view(len(rows), len(head.windows), -1), norm) if flip else rows
    return embed

def embed_once(learn, embed):
    "Let a learner remember the embeddings of a loader: re-ranking and pairs of cameras need the same ones again"
    known = {}
    def remembered(dl, flip=False):
        if (dl,flip) not in known: known[dl,flip] = embed(dl, flip)
        return known[dl,flip]
    learn.embed = remembered

def evaluated(learn):
    "The protocol cards: as it is, with mirrored images, and re-ranked too"
    ways = {'plain': {}, 'flip': dict(flip=True), 'flip, re-ranked': dict(flip=True, rerank=True)}
    return {name: learn.evaluate(**way) for name,way in ways.items()}

def train(args, lib, began):
    "Train the stages that are not finished; return the last learner, and of each stage its seconds and its machine"
    import torch
    file = args.run/'stages.json'
    finished = json.loads(file.read_text()) if file.exists() else []
    for number in range(len(finished), len(args.stages)):
        learn,seconds,stopped = fit_stage(args, lib, number, began)
        if stopped: sys.exit(f'Stopped in stage {number+1}: run the same command again to resume')
        finished.append(dict(seconds=seconds, hardware=where_trained(torch), date=str(date.today())))
        file.write_text(json.dumps(finished))
        print(f'stage {number+1}: {seconds/60:.1f} minutes', flush=True)
    learn = make_learner(args, lib, len(args.stages)-1, [])
    learn.load(f'stage-{len(args.stages)}', with_opt=False)
    embed_once(learn, learn.embed if torch.cuda.is_available() else with_onnx(learn, args))
    return learn,finished

def all_cards(learn, args):
    "The protocol cards of the final evaluation by name, those of the other datasets included"
    cards = evaluated(learn)
    if args.also:
        learn.evaluate_on({other.name: other for other in args.also}, path=args.run)
        cards |= {other.name: ReIDResult.from_json(args.run/f'{other.name}.json') for other in args.also}
    for name,card in cards.items(): print(name, card, sep='\n', flush=True)
    return cards

def write_model(learn, cards, args, note, lib):
    "Write the model to ship, with its card"
    sizes = ', '.join(f'{height}×{width}' for height,width,*_ in note['stages'])
    minutes,machines = sum(note['minutes']),', '.join(dict.fromkeys(note['trained_on']))
    stages = 'stages' if len(note['stages'])>1 else 'a stage'
    training = (f"`{note['command']}`: {minutes:.{0 if minutes>20 else 1}f} minutes on {machines} ({note['date']}), "
                f"in {stages} of {sizes} pixels.")
    known = [text for name,text in ABOUT_DATA.items() for folder in args.data if folder.name.lower().startswith(name)]
    cameras = lib.evaluate_cameras(**learn.to_rank())
    learn.save_pretrained(
        args.save, card=cards['plain'], licence=RESEARCH_ONLY, cards=cards, cameras=cameras, training=training,
        data=' '.join(known))

def training_note(args, finished):
    "What was trained, with what a pretrained model to start from had been before"
    about,before = circumstances(),dict(stages=[], minutes=[], trained_on=[])
    if args.start:
        before = json.loads((results/f'{LIGHT_MODELS[args.start]}.json').read_text())
        about['command'] = f"{before['command']} && {about['command']}"
    return dict(
        about, stages=before['stages']+[[*size, epochs, scale] for size,epochs,scale,_ in args.stages],
        minutes=before['minutes']+[round(stage['seconds']/60, 1) for stage in finished],
        trained_on=before['trained_on']+[stage['hardware'] for stage in finished])

def main(argv=None):
    args,began = parse(argv),time.perf_counter()
    import torch

    import pyramidreid.all as lib
    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    learn,finished = train(args, lib, began)
    note = training_note(args, finished) | cost(learn, args.stages[-1][0])
    if args.test or args.hold_out:
        cards = all_cards(learn, args)
        note['cards'] = {name: json.loads(card.to_json()) for name,card in cards.items()}
    (results/f'{args.out}.json').write_text(json.dumps(note))
    if args.save: write_model(learn, cards, args, note, lib)

if __name__=='__main__': main()
