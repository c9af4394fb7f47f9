"""Head and losses, forward and backward: fused, compared with a loop over branches and anchors, as one first writes it.
`python benchmarks/head.py`; both in one run, alternating, best of several. The peak memory of one step, beyond the map
and the weights, is taken in a process of its own for each."""
import json
import subprocess
import sys
import time

import torch
from common import Peak, circumstances, markdown, results
from torch.nn import functional as F

from pyramidreid.models.losses import PyramidLoss
from pyramidreid.models.pyramid import PlainPyramidHead, PyramidHead, fuse_state

N_IDS,CHANNELS = 751,2048
REPEATS = 6

def plain_loss(feats, logits, labels, margin=1.4):
    "Branch by branch: a distance matrix for each, then anchor by anchor"
    total = 0
    for b in range(feats.shape[1]):
        unit = F.normalize(feats[:,b], dim=1)
        dist = ((unit[:,None]-unit[None])**2).sum(-1).clamp(min=1e-12).sqrt()
        same = labels[:,None]==labels[None]
        gaps = []
        for i in range(len(unit)):
            farthest_positive,nearest_negative = dist[i][same[i]].max(),dist[i][~same[i]].min()
            gaps.append(F.relu(farthest_positive - nearest_negative + margin))
        total = total + F.cross_entropy(logits[:,b], labels) + torch.stack(gaps).mean()
    return total

def step(head, loss, fmap, labels, amp=False):
    "One forward and backward pass: seconds, and the loss"
    fmap.grad = None
    head.zero_grad(set_to_none=True)
    start = time.perf_counter()
    with torch.autocast(fmap.device.type, torch.bfloat16, enabled=amp): value = loss(*head(fmap), labels)
    value.backward()
    if fmap.device.type!='cpu': torch.get_device_module(fmap.device).synchronize()
    return time.perf_counter()-start, value.item()

def setup(device=None, batch=64, channels=CHANNELS):
    "A feature map, labels, and head and loss of either kind with the same weights; on a GPU if there is one"
    torch.manual_seed(0)
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    fmap = torch.randn(batch, channels, 24, 8).relu_().to(device).requires_grad_()
    labels = (torch.arange(batch)//8).to(device)
    plain = PlainPyramidHead(channels, N_IDS, drop=0.).to(device)
    fused = PyramidHead(channels, N_IDS, drop=0.).to(device)
    fused.load_state_dict(fuse_state(plain.state_dict()))
    pyramid_loss = PyramidLoss()
    def fused_loss(feats, logits, labels): return pyramid_loss((feats, logits), labels)
    return fmap,labels,dict(plain=(plain, plain_loss), fused=(fused, fused_loss))

def peak_mb(kind, amp=False, **sizes):
    "Peak memory of the third step, MB: on a GPU what tensors take, on a CPU the process's anonymous memory"
    fmap,labels,kinds = setup(**sizes)
    head,loss = kinds[kind]
    for _ in range(2): step(head, loss, fmap, labels, amp)
    fmap.grad = None
    head.zero_grad(set_to_none=True)
    if fmap.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(head, loss, fmap, labels, amp)
        return (torch.cuda.max_memory_allocated()-before)/2**20
    with Peak() as peak: step(head, loss, fmap, labels, amp)
    return peak.mb

def peak_in_process(kind):
    "`peak_mb` in a fresh process"
    command = [sys.executable, __file__, kind]
    return float(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout)

def compare(amp=False, tolerance=1e-3, **sizes):
    "Best seconds and the loss of each kind, which must agree; the two alternate"
    fmap,labels,kinds = setup(**sizes)
    times,losses = {kind: [] for kind in kinds},{}
    for _ in range(REPEATS):
        for kind,(head,loss) in kinds.items():
            seconds,losses[kind] = step(head, loss, fmap, labels, amp)
            times[kind].append(seconds)
    assert abs(losses['plain']-losses['fused']) < tolerance*abs(losses['plain']), losses
    return fmap.device.type, {kind: min(values) for kind,values in times.items()}, losses

def main():
    import pandas as pd
    if sys.argv[1:]: return print(peak_mb(sys.argv[1]))
    device,seconds,losses = compare()
    peaks = {kind: peak_in_process(kind) for kind in seconds}
    ratio = seconds['plain']/seconds['fused']
    note = dict(circumstances(), seconds=seconds, peak_mb=peaks, ratio=ratio, loss=losses)
    results.mkdir(exist_ok=True)
    (results/f'head-{device}.json').write_text(json.dumps(note, indent=1))
    table = pd.DataFrame({'seconds': {kind: f'{v:.3f}' for kind,v in seconds.items()},
                          'peak memory, MB': {kind: f'{v:.0f}' for kind,v in peaks.items()}})
    print(markdown(table), f'\nplain / fused: {ratio:.1f}')

if __name__=='__main__': main()
