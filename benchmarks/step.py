"""One training step taken apart: backbone, head, losses, backward through each, optimizer. pyramidreid's head and
losses, those one first writes (branch by branch, a loop over anchors), and the backbone with the smallest of heads, in
one run on the same images.
`python benchmarks/step.py`; on a GPU in float32 and under bf16 autocast, on a CPU in float32."""
import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

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

class Clock:
    "Seconds since the last `lap`, with all work on the device done"
    def __init__(self, device): self.cuda,self.laps = device=='cuda',{}
    def sync(self):
        if self.cuda: torch.cuda.synchronize()
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

def measure(kind, args, device, amp, compiled=False):
    "Median seconds of each lap, and the peak of GPU memory in MB"
    torch.manual_seed(0)
    body = create_backbone(args.arch, pretrained=False, size=tuple(args.size))
    body = body.to(device, memory_format=torch.channels_last).train()
    x = torch.randn(args.batch, 3, *args.size, device=device).contiguous(memory_format=torch.channels_last)
    y = (torch.arange(args.batch)//args.k).to(device)
    with torch.no_grad(): nf = body(x[:2]).shape[1]
    head,loss = head_and_loss(kind, nf, args.ids)
    head = head.to(device)
    opt = torch.optim.SGD([*body.parameters(), *head.parameters()], 1e-3, .9)
    if compiled: body,head = torch.compile(body),torch.compile(head)
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup): step(Clock(device), body, head, loss, opt, x, y, amp)
    clock = Clock(device)
    for _ in range(args.steps): step(clock, body, head, loss, opt, x, y, amp)
    laps = {name: float(torch.tensor(seconds).median()) for name,seconds in clock.laps.items()}
    row = {**laps, 'step': sum(laps.values())}
    if device=='cuda': row['peak_mb'] = torch.cuda.max_memory_allocated()/2**20
    return row

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
    return parser.parse_args()

def cases(device, compiled_too):
    "Kind, mixed precision and compilation of each case"
    for amp in (False, True) if device=='cuda' else (False,):
        for kind in ('backbone alone', 'pyramidreid', 'plain'):
            yield kind,amp,False
            if compiled_too and kind!='plain': yield kind,amp,True

def main():
    import pandas as pd
    import torchvision
    args = parse()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.steps is None: args.steps = 20 if device=='cuda' else 3
    if args.warmup is None: args.warmup = 5 if device=='cuda' else 1
    args.arch = getattr(torchvision.models, args.arch, args.arch)
    rows = {}
    for kind,amp,compiled in cases(device, args.compile):
        name = f"{kind}, {'bf16' if amp else 'fp32'}" + (', compiled' if compiled else '')
        rows[name] = measure(kind, args, device, amp, compiled)
        print(name, {k: round(v, 4) for k,v in rows[name].items()}, flush=True)
    results.mkdir(exist_ok=True)
    (results/f'step-{device}.json').write_text(json.dumps(dict(circumstances(), seconds=rows), indent=1))
    print(markdown(pd.DataFrame(rows).T.map(lambda v: f'{v:.4g}')))

if __name__=='__main__': main()
