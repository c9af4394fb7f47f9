"""Train on Market-1501 and evaluate once, at the end, on its full official test split.
`PYRAMIDREID_DATA=DIR python benchmarks/market1501.py --arch tf_efficientnet_lite0 --weights FILE --size 192 64 --epochs 5`
No image of the test split is looked at before the end, and no checkpoint is chosen by it."""
import argparse,json,os,time
from pathlib import Path
from common import circumstances,results

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--data', default=os.environ.get('PYRAMIDREID_DATA'), help='folder that holds Market-1501-v15.09.15')
parser.add_argument('--arch', default='resnet50', help='a torchvision ResNet, or the name of a timm model')
parser.add_argument('--weights', help='file of ImageNet weights; without it they are downloaded')
parser.add_argument('--size', type=int, nargs=2, default=(384,128), metavar=('H','W'))
parser.add_argument('--epochs', type=int, default=60)
parser.add_argument('--lr', type=float, default=1e-3, help='of the head; the backbone has a quarter')
parser.add_argument('--workers', type=int, default=2)
parser.add_argument('--seed', type=int, default=0)
parser.add_argument('--steps', type=int, help='stop after so many steps: to try the script')
parser.add_argument('--out', default='market1501')

if __name__=='__main__':
    args = parser.parse_args()
    if not args.data: parser.error('say where the data is: --data, or the environment variable PYRAMIDREID_DATA')
    from fastai.callback.core import CancelFitException,CancelValidException
    from pyramidreid.all import Callback,ReIDDataLoaders,pyramid_learner,set_seed
    import torch,torchvision,pyramidreid.all as lib

    class NoValidation(Callback):
        def before_validate(self):
            if not hasattr(self, 'gather_preds'): raise CancelValidException
    class Stop(Callback):
        run_valid = False
        def after_batch(self):
            if args.steps and self.train_iter>=args.steps: raise CancelFitException

    set_seed(args.seed)
    dls = ReIDDataLoaders.from_market(Path(args.data)/'Market-1501-v15.09.15', p=8, k=8, size=args.size, num_workers=args.workers)
    arch = getattr(lib, args.arch, args.arch)
    learn = pyramid_learner(dls, arch, weights=args.weights, metrics=[], cbs=[NoValidation(),Stop()]).to_channelslast(use_amp=torch.cuda.is_available(), **(dict(amp_mode='bf16') if torch.cuda.is_available() else {}))
    start = time.perf_counter()
    learn.fit_one_cycle(args.epochs, slice(args.lr/4, args.lr))
    trained = time.perf_counter()-start
    history = learn.dynamic_loss_weights.history
    epochs = learn.recorder.values
    start = time.perf_counter()
    card = learn.evaluate()
    print(card)
    note = dict(circumstances(), minutes_training=round(trained/60,1),
        minutes_evaluation=round((time.perf_counter()-start)/60,1), steps=len(history), both=round((history.weight_triplet>0).mean(),3),
        random=round((history['mode']=='random').mean(),3), epochs=[[float(v) for v in e] for e in epochs], card=json.loads(card.to_json()))
    results.mkdir(exist_ok=True)
    (results/f'{args.out}.json').write_text(json.dumps(note))
