"""Head and losses, forward and backward: fused against branch by branch with a loop over anchors, as one would first write it.
`python benchmarks/head.py`; both in one run, alternating, best of several."""
import json,time
import torch
from torch.nn import functional as F
from common import circumstances,markdown,results
from pyramidreid.losses import PyramidLoss
from pyramidreid.pyramid import PlainPyramidHead,PyramidHead,fuse_state

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

if __name__=='__main__':
    import pandas as pd
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    fmap = torch.randn(64,2048,24,8).relu_().to(device).requires_grad_()
    labels = (torch.arange(64)//8).to(device)
    plain,fused = PlainPyramidHead(2048, 751, drop=0.).to(device),PyramidHead(2048, 751, drop=0.).to(device)
    fused.load_state_dict(fuse_state(plain.state_dict()))
    both = PyramidLoss()
    times = dict(plain=[], fused=[])
    for _ in range(6):
        t,p = step(plain, plain_loss, fmap, labels); times['plain'].append(t)
        t,f = step(fused, lambda a,b,y: both((a,b), y), fmap, labels); times['fused'].append(t)
    assert abs(p-f) < 1e-3*abs(p), (p,f)
    best = {k:min(v) for k,v in times.items()}
    note = dict(circumstances(), seconds=best, ratio=best['plain']/best['fused'], loss=dict(plain=p, fused=f))
    results.mkdir(exist_ok=True)
    (results/f'head-{device}.json').write_text(json.dumps(note, indent=1))
    print(markdown(pd.DataFrame({'seconds':{k:f'{v:.3f}' for k,v in best.items()}})), f"\nplain / fused: {note['ratio']:.1f}")
