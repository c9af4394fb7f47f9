"""Train and evaluate on one GPU, on several, or on several machines:

    accelerate launch examples/several_gpus.py --data Market-1501-v15.09.15 --recipe modern --epochs 60
    accelerate launch --num_processes 4 examples/several_gpus.py --data Market-1501-v15.09.15
    accelerate launch --multi_gpu --num_processes 2 examples/several_gpus.py --cpu --arch resnet10 \\
        --no-pretrained --size 96 48 --epochs 2
    python examples/several_gpus.py --epochs 2

Without --data, it trains on synthetic people. All machines need the same files; to resume a run, --out must be on a
disk that all of them see."""
import argparse
from pathlib import Path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add,yes_or_no = parser.add_argument,argparse.BooleanOptionalAction
    add('--data', type=Path, help='folder of a known dataset; without it, synthetic people')
    add('--out', type=Path, default=Path('several_gpus'), help='folder for checkpoints, weights and card')
    add('--arch', default='resnet50', help='name of a ResNet or of a timm model')
    add('--pretrained', action=yes_or_no, default=True)
    add('--size', type=int, nargs=2, default=(384,128), metavar=('HEIGHT','WIDTH'))
    add('--n-parts', type=int, default=6)
    add('--p', type=int, default=8, help='identities in a batch of each process')
    add('--k', type=int, default=8, help='images of each identity')
    add('--recipe', choices=('paper','modern','one_cycle'), default='paper')
    add('--epochs', type=int, default=120)
    add('--lr', type=float, default=3.5e-4, help='learning rate for --recipe one_cycle')
    add('--sync-bn', action=yes_or_no, help='batch norm over all processes; the default is yes on GPUs')
    add('--over-ranks', action=yes_or_no, default=True, help='hardest positives and negatives among all processes')
    add('--bf16', action='store_true', help='mixed precision; the modern recipe always uses it')
    add('--resume', action='store_true', help='resume from the newest checkpoint in --out')
    add('--num-workers', type=int, help='number of workers of each process')
    add('--seed', type=int, default=0)
    add('--cpu', action='store_true')
    return parser.parse_args()

def make_learner(args, data, out):
    "Loaders and learner as the arguments have them"
    import pyramidreid.all as pr
    workers = {} if args.num_workers is None else dict(num_workers=args.num_workers)
    dls = pr.ReIDDataLoaders.from_table(pr.dataset_table(data), path=out, p=args.p, k=args.k, size=tuple(args.size),
                                        device='cpu' if args.cpu else None, **workers)
    arch = getattr(pr, args.arch, args.arch)
    learn = pr.pyramid_learner(dls, arch, pretrained=args.pretrained, n_parts=args.n_parts, path=out)
    return learn.to_bf16() if args.bf16 and args.recipe!='modern' else learn

def train(learn, args):
    "Run the recipe"
    from pyramidreid.training.checkpoints import Checkpoints
    cbs = Checkpoints(resume=args.resume)
    if args.recipe=='paper': learn.fit_paper(args.epochs, cbs=cbs)
    elif args.recipe=='modern': learn.fit_modern(args.epochs, cbs=cbs)
    else: learn.fit_one_cycle(args.epochs, args.lr, cbs=cbs)

def main():
    args = parse_arguments()
    import pyramidreid.all as pr
    from pyramidreid.core import require_extra
    state = require_extra('accelerate', 'dist').PartialState(cpu=args.cpu) # The processes meet, and each gets its GPU
    out = args.out.absolute()
    pr.set_seed(args.seed+state.process_index)
    with state.main_process_first(): data = args.data or pr.synth_persons(path=out/'people', n_train=60, n_test=40)
    learn = make_learner(args, data, out)
    sync_bn = not args.cpu if args.sync_bn is None else args.sync_bn
    with learn.distrib_ctx(sync_bn=sync_bn, over_ranks=args.over_ranks, cpu=args.cpu):
        train(learn, args)
        card = learn.evaluate()
        learn.save(out/'weights')
    if state.is_main_process:
        card.to_json(out/'card.json')
        print(card)
    state.destroy_process_group()

if __name__=='__main__': main()
