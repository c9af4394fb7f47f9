"""One training step taken apart: backbone, head, losses, backward through each, optimizer. pyramidreid's head and
losses, those one first writes (branch by branch, a loop over anchors), and the backbone with the smallest of heads, in
one run on the same images.
`python benchmarks/step.py`; on a GPU in float32 and under bf16 autocast, on a CPU in float32.
`python benchmarks/step.py --formats` compares the two memory formats of images instead: whole steps of several
backbones and sizes, contiguous and channels last in turn, and their ratio; on a CPU the processor's time."""
import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import circumstances, markdown, results
from head import plain_loss
from torch import nn

from pyramidreid.models.backbone import create_backbone
from pyramidreid.models.losses import PyramidLoss
from pyramidreid.models.pyramid import PlainPyramidHead, PyramidHead


class MeanHead(nn.Module):
    "The smallest of heads: mean over the map, and one classifier"
    def __init__(self, nf, n_ids):
        super().__init__()
        self.fc = nn.Linear(nf, n_ids)
    def forward(self, fmap): return (self.fc(fmap.mean((2,3))),)

def synchronise(device):
    "Wait until all work on the device is done"
    if device!='cpu': torch.get_device_module(device).synchronize()

class Clock:
    "Seconds since the last `lap`, with all work on the device done"
    def __init__(self, device): self.device,self.laps = device,{}
    def sync(self): synchronise(self.device)
    def start(self):
        self.sync()
        self.at = time.perf_counter()
    def lap(self, name):
        self.sync()
        now = time.perf_counter()
        self.laps.setdefault(name, []).append(now-self.at)
        self.at = now

def step(clock, body, head, loss, opt, x, y, amp):
    "One training step, with a lap for each of its pieces"
    clock.start()
    with torch.autocast(x.device.type, torch.bfloat16) if amp else nullcontext():
        fmap = body(x)
        clock.lap('backbone')
        cut = fmap.detach().requires_grad_()
        out = head(cut)
        clock.lap('head')
        value = loss(*out, y)
    clock.lap('losses')
    value.backward()
    clock.lap('backward, head and losses')
    fmap.backward(cut.grad)
    clock.lap('backward, backbone')
    opt.step()
    opt.zero_grad(set_to_none=True)
    clock.lap('optimizer')

def head_and_loss(kind, nf, n_ids):
    "Head and loss of a `kind` of step"
    if kind=='plain': return PlainPyramidHead(nf, n_ids), plain_loss
    if kind=='backbone alone': return MeanHead(nf, n_ids), nn.functional.cross_entropy
    pyramid_loss = PyramidLoss()
    return PyramidHead(nf, n_ids), lambda feats,logits,y: pyramid_loss((feats, logits), y)

PRECISIONS = ('fp32','tf32','bf16')
FORMATS = {'contiguous': torch.contiguous_format, 'channels last': torch.channels_last}

def set_precision(precision):
    "Let a GPU compute products of float32 in TF32, or not"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision=='tf32'

def prepare(kind, args, device, memory_format='channels last', compiled=False):
    "Body, head, loss, optimizer, images and labels of a `kind` of step"
    torch.manual_seed(0)
    memory_format = FORMATS[memory_format]
    body = create_backbone(args.arch, pretrained=False, size=tuple(args.size))
    body = body.to(device).to(memory_format=memory_format).train()
    x = torch.randn(args.batch, 3, *args.size).to(device).contiguous(memory_format=memory_format)
    y = (torch.arange(args.batch)//args.k).to(device)
    with torch.no_grad(): nf = body(x[:2]).shape[1]
    head,loss = head_and_loss(kind, nf, args.ids)
    head = head.to(device)
    opt = torch.optim.SGD([*body.parameters(), *head.parameters()], 1e-3, .9)
    if compiled: body,head = torch.compile(body),torch.compile(head)
    return body,head,loss,opt,x,y

def measure(kind, args, device, precision='fp32', memory_format='channels last', compiled=False):
    "Median seconds of each lap, and the peak of GPU memory in MB"
    set_precision(precision)
    pieces,amp = prepare(kind, args, device, memory_format, compiled),precision=='bf16'
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup): step(Clock(device), *pieces, amp)
    clock = Clock(device)
    for _ in range(args.steps): step(clock, *pieces, amp)
    laps = {name: median(seconds) for name,seconds in clock.laps.items()}
    row = {**laps, 'step': sum(laps.values())}
    if device=='cuda': row['peak_mb'] = torch.cuda.max_memory_allocated()/2**20
    return row

def compare_formats(args, device, precision='fp32'):
    """Median seconds of a whole step in each memory format, which alternate, and the ratio of the two. On a CPU the
    processor's time, which other programs disturb less"""
    set_precision(precision)
    clock = time.process_time if device=='cpu' else time.perf_counter
    steps = {name: prepare('pyramidreid', args, device, name) for name in FORMATS}
    seconds = {name: [] for name in FORMATS}
    for i in range(args.warmup+args.steps):
        for name,pieces in steps.items():
            start = clock()
            step(Clock(device), *pieces, precision=='bf16')
            if i>=args.warmup: seconds[name].append(clock()-start)
    row = {name: median(values) for name,values in seconds.items()}
    return {**row, 'ratio': row['contiguous']/row['channels last']}

def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='resnet50', help='a torchvision ResNet, or the name of a timm model')
    parser.add_argument('--size', type=int, nargs=2, default=(384,128), metavar=('H','W'))
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--k', type=int, default=8, help='images of each identity')
    parser.add_argument('--ids', type=int, default=751)
    parser.add_argument('--steps', type=int, help='measured steps: 20 on a GPU, 3 on a CPU')
    parser.add_argument('--warmup', type=int, help='steps before: 5 on a GPU, 1 on a CPU')
    parser.add_argument('--compile', action='store_true', help='with torch.compile, too')
    parser.add_argument('--formats', action='store_true', help='compare memory formats for several backbones')
    return parser.parse_args()

def cases(device, compiled_too):
    "Kind, precision and compilation of each case"
    for precision in ('fp32','bf16') if device=='cuda' else ('fp32',):
        for kind in ('backbone alone', 'pyramidreid', 'plain'):
            yield kind,precision,False
            if compiled_too and kind!='plain': yield kind,precision,True

def measure_pieces(args, device):
    "The pieces of each kind of step, by name"
    for kind,precision,compiled in cases(device, args.compile):
        name = f'{kind}, {precision}' + (', compiled' if compiled else '')
        yield name,measure(kind, args, device, precision, compiled=compiled)

def measure_formats(args, device):
    "The memory formats of each backbone and size, by name"
    for size in ((96,48), (384,128)):
        for arch in ('resnet18', 'resnet50', 'tf_efficientnet_lite0'):
            one = argparse.Namespace(**{**vars(args), 'size': size, 'arch': architecture(arch)})
            yield f'{arch}, {size[0]}×{size[1]}',compare_formats(one, device)

def architecture(name):
    "A torchvision ResNet, or the name of a timm model"
    import torchvision
    return getattr(torchvision.models, name, name)

def main():
    import pandas as pd
    args = parse()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.steps is None: args.steps = 20 if device=='cuda' else 3
    if args.warmup is None: args.warmup = 5 if device=='cuda' else 1
    args.arch = architecture(args.arch)
    rows,results_file = {},results/f"step-{'formats-' if args.formats else ''}{device}.json"
    results.mkdir(exist_ok=True)
    for name,row in (measure_formats if args.formats else measure_pieces)(args, device):
        rows[name] = row
        print(name, {k: round(v, 4) for k,v in row.items()}, flush=True)
        results_file.write_text(json.dumps(dict(circumstances(), batch=args.batch, seconds=rows), indent=1))
    print(markdown(pd.DataFrame(rows).T.map(lambda v: f'{v:.4g}')))

if __name__=='__main__': main()
