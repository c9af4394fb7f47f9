"""Head and losses, forward and backward: fused against branch by branch with a loop over anchors, as one would first write it.
`python benchmarks/head.py`; both in one run, alternating, best of several. The peak of memory of one step, beyond the map and the weights, is taken
in a process of its own for each."""
import json
import subprocess
import sys
import time

import torch
from common import Peak, circumstances, markdown, results
from torch.nn import functional as F

from pyramidreid.models.losses import PyramidLoss
from pyramidreid.models.pyramid import PlainPyramidHead, PyramidHead, fuse_state


def plain_loss(feats, logits, labels, margin=1.4):
    "Branch by branch; a distance matrix for each, then anchor by anchor"
    total = 0
    for b in range(feats.shape[1]):
        f = F.normalize(feats[:,b], dim=1)
        dist = ((f[:,None]-f[None])**2).sum(-1).clamp(min=1e-12).sqrt()
        same = labels[:,None]==labels[None]
        gaps = [F.relu(dist[i][same[i]].max() - dist[i][~same[i]].min() + margin) for i in range(len(f))]
        total = total + F.cross_entropy(logits[:,b], labels) + torch.stack(gaps).mean()
    return total

def step(head, loss, fmap, labels):
    fmap.grad = None
    head.zero_grad(set_to_none=True)
    start = time.perf_counter()
    value = loss(*head(fmap), labels)
    value.backward()
    if fmap.is_cuda: torch.cuda.synchronize()
    return time.perf_counter()-start,value.item()

def setup():
    "A feature map, labels, and head and loss of either kind with the same weights"
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    fmap = torch.randn(64,2048,24,8).relu_().to(device).requires_grad_()
    plain,fused = PlainPyramidHead(2048, 751, drop=0.).to(device),PyramidHead(2048, 751, drop=0.).to(device)
    fused.load_state_dict(fuse_state(plain.state_dict()))
    both = PyramidLoss()
    return fmap,(torch.arange(64)//8).to(device),dict(plain=(plain,plain_loss), fused=(fused,lambda a,b,y: both((a,b), y)))

def peak_mb(kind):
    "Peak of memory of the third step, MB: on a GPU what was allocated for tensors, on a CPU the process's anonymous memory"
    fmap,labels,kinds = setup()
    for _ in range(2): step(*kinds[kind], fmap, labels)
    fmap.grad = None
    kinds[kind][0].zero_grad(set_to_none=True)
    if fmap.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*kinds[kind], fmap, labels)
        return (torch.cuda.max_memory_allocated()-before)/2**20
    with Peak() as peak: step(*kinds[kind], fmap, labels)
    return peak.mb

if __name__=='__main__':
    import pandas as pd
    if sys.argv[1:]:
        print(peak_mb(sys.argv[1]))
        sys.exit()
    fmap,labels,kinds = setup()
    device = fmap.device.type
    times = dict(plain=[], fused=[])
    for _ in range(6):
        t,p = step(*kinds['plain'], fmap, labels); times['plain'].append(t)
        t,f = step(*kinds['fused'], fmap, labels); times['fused'].append(t)
    assert abs(p-f) < 1e-3*abs(p), (p,f)
    best = {k:min(v) for k,v in times.items()}
    peak = {k:float(subprocess.run([sys.executable,__file__,k], check=True, text=True, stdout=subprocess.PIPE).stdout) for k in kinds}
    note = dict(circumstances(), seconds=best, peak_mb=peak, ratio=best['plain']/best['fused'], loss=dict(plain=p, fused=f))
    results.mkdir(exist_ok=True)
    (results/f'head-{device}.json').write_text(json.dumps(note, indent=1))
    print(markdown(pd.DataFrame({'seconds':{k:f'{v:.3f}' for k,v in best.items()}, 'peak memory, MB':{k:f'{v:.0f}' for k,v in peak.items()}})), f"\nplain / fused: {note['ratio']:.1f}")
