"`PyramidHead` against `PlainPyramidHead`, branch by branch: features, logits, gradients, running statistics, ties"
import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyramidreid.models.pyramid import *
from pyramidreid.models.pyramid import _PoolParts

N,C,E,IDS = 3,5,4,7

def subsets(n):
    "All sets of levels for a small n; for a larger one each level alone, all, the ends and a few between"
    if n<=3: return [list(s) for r in range(1,n+1) for s in itertools.combinations(range(1,n+1), r)]
    return [[l] for l in range(1,n+1)] + [None, [1,n], [2,n-1], list(range(1,n+1,2))]

def pair(n, levels, dtype=torch.double, drop=0.):
    "The plain head with random weights, statistics and classifiers, and the fused one with the same"
    plain = PlainPyramidHead(C, IDS, n, E, levels, drop).to(dtype)
    with torch.no_grad():
        for name,p in itertools.chain(plain.named_parameters(), plain.named_buffers()):
            if 'running_var' in name: p.uniform_(.5, 2)
            elif p.is_floating_point(): p.normal_()
    fused = PyramidHead(C, IDS, n, E, levels, drop).to(dtype)
    fused.load_state_dict(fuse_state(plain.state_dict()))
    return plain,fused

def grads_as_state(plain):
    "Gradients of the plain head's parameters, in the fused head's names and shapes"
    sd = {k:torch.zeros_like(v) for k,v in plain.state_dict().items()}
    sd.update({k:p.grad for k,p in plain.named_parameters()})
    return fuse_state(sd)

def compare(fmap, n, levels, train=True, atol=1e-10):
    "Outputs, input gradient, parameter gradients and running statistics of both heads"
    plain,fused = pair(n, levels, fmap.dtype)
    xs = [fmap.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    outs = [m.train(train)(x) for m,x in zip((plain,fused), xs)]
    close = lambda a,b: torch.testing.assert_close(a, b, atol=atol, rtol=atol)
    for a,b in zip(*outs):
        assert a.shape==b.shape
        close(a, b)
    ws = [torch.randn_like(o) for o in outs[0]]
    for out in outs: sum((o*w).sum() for o,w in zip(out, ws)).backward()
    close(xs[0].grad, xs[1].grad)
    want = grads_as_state(plain)
    names = {k for k,_ in fused.named_parameters()}
    assert names <= want.keys()
    for k,p in fused.named_parameters(): close(want[k], p.grad)
    for k,v in fuse_state(plain.state_dict()).items(): close(v, fused.state_dict()[k])
    return outs

@pytest.mark.parametrize('n', range(1,9))
def test_fused_equals_plain(n):
    torch.manual_seed(n)
    for levels in subsets(n):
        for train in (True,False): compare(torch.randn(N, C, 2*n, 3, dtype=torch.double), n, levels, train)

@pytest.mark.parametrize('n', [1,4,6])
@pytest.mark.parametrize('hw', [(1,1),(1,4),(3,1)])
def test_parts_of_one_row_or_one_cell(n, hw):
    torch.manual_seed(0)
    compare(torch.randn(N, C, hw[0]*n, hw[1], dtype=torch.double), n, None)

ties = dict(relu=lambda *s: torch.randint(-3, 3, s).clamp(min=0), zeros=torch.zeros, constant=lambda *s: torch.full(s, 2.5),
            rows=lambda *s: torch.arange(s[2]).view(1,1,-1,1).expand(s)//3)

@pytest.mark.parametrize('n', [1,3,6])
@pytest.mark.parametrize('kind', ties)
def test_ties_send_the_gradient_to_the_same_cell(n, kind):
    "The first of several equal cells is the maximum, in both heads"
    torch.manual_seed(0)
    fmap = ties[kind](N, C, 2*n, 4).double().contiguous()
    plain,fused = pair(n, None)
    for train in (True,False):
        # a batch without any variance turns rounding into values: compare what comes before the batch norm instead
        if train and kind in ('zeros','constant','rows'): continue
        compare(fmap, n, None, train)
    xs = [fmap.clone().requires_grad_() for _ in range(2)]
    h = fmap.shape[2]//n
    windows = [xs[0][:,:,i*h:(i+l)*h] for i,l in plain.windows]
    a = torch.stack([(F.adaptive_avg_pool2d(w, 1) + F.adaptive_max_pool2d(w, 1)).flatten(1) for w in windows])
    b = pool_windows(xs[1], n, fused.levels)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    w = torch.randn_like(a)
    for o in (a,b): (o*w).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, atol=1e-12, rtol=1e-12)

@pytest.mark.parametrize('n', [2,6])
def test_memory_format_does_not_matter(n):
    torch.manual_seed(0)
    fmap = torch.randint(-2, 3, (N,C,2*n,3)).double()
    compare(fmap.to(memory_format=torch.channels_last), n, None)
    torch.manual_seed(1); a = compare(fmap, n, None)[1]
    torch.manual_seed(1); b = compare(fmap.to(memory_format=torch.channels_last), n, None)[1]
    for x,y in zip(a, b): assert torch.equal(x, y)
    compare(torch.randn(N, 2*n, C, 3, dtype=torch.double).transpose(1,2), n, None)

def test_float32_to_rounding():
    torch.manual_seed(0)
    compare(torch.randn(8, C, 12, 4), 6, None, atol=1e-4)

def test_several_steps_keep_the_running_statistics_equal():
    torch.manual_seed(0)
    plain,fused = pair(4, [1,2,4])
    for _ in range(3):
        x = torch.randn(N, C, 8, 2, dtype=torch.double)
        plain(x),fused(x)
    for k,v in fuse_state(plain.state_dict()).items(): torch.testing.assert_close(v, fused.state_dict()[k], atol=1e-12, rtol=1e-12)
    assert fused.bn.num_batches_tracked==3
    x = torch.randn(N, C, 8, 2, dtype=torch.double)
    for a,b in zip(plain.eval()(x), fused.eval()(x)): torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)

def test_dropout_acts_before_the_classifiers_only():
    torch.manual_seed(0)
    _,fused = pair(3, None, drop=0.5)
    x = torch.randn(N, C, 6, 2, dtype=torch.double)
    (f1,l1),(f2,l2) = fused(x),fused(x)
    assert torch.equal(f1, f2) and not torch.equal(l1, l2)
    fused.eval()
    assert torch.equal(fused(x)[1], fused(x)[1])

def test_pool_parts_gradcheck():
    torch.manual_seed(0)
    for n,shape in ((1,(2,2,3,2)), (2,(2,3,4,2)), (6,(1,2,6,1))):
        x = torch.randperm(torch.Size(shape).numel()).double().view(shape).requires_grad_() # no ties
        assert torch.autograd.gradcheck(lambda x: _PoolParts.apply(x, n), (x,))
        assert torch.autograd.gradcheck(lambda x: pool_windows(x, n, list(range(1,n+1))), (x,))

def test_pool_parts_with_one_output_unused():
    x = torch.randperm(24).double().view(1,2,4,3).requires_grad_()
    mean,top = _PoolParts.apply(x, 2)
    mean.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1/6))
    x.grad = None
    _PoolParts.apply(x, 2)[1].sum().backward()
    assert x.grad.sum()==4 and set(x.grad.unique().tolist())=={0.,1.}

def test_embedding_norms():
    torch.manual_seed(0)
    feats = torch.rand(N, 6, E)*torch.arange(1,7)[:,None]
    by_branch,whole,raw = (embedding(feats, o) for o in ('branch','whole',None))
    torch.testing.assert_close(raw, feats.flatten(1))
    for e in (by_branch,whole): torch.testing.assert_close(e.norm(dim=1), torch.ones(N))
    torch.testing.assert_close(by_branch.view(N,6,E).norm(dim=2), torch.full((N,6), 6**-.5))
    torch.testing.assert_close(whole, raw/raw.norm(dim=1, keepdim=True))
    cosines = F.cosine_similarity(feats[:1], feats[1:], dim=-1).mean(-1)
    torch.testing.assert_close((by_branch[0]*by_branch[1:]).sum(-1), cosines)
    with pytest.raises(ValueError, match="'length'.*'branch'.*'whole'"): embedding(feats, 'length')

def test_embedding_of_dead_branches_is_finite():
    "ReLU may leave a branch, or a whole image, at zero"
    feats = torch.rand(N, 6, E)
    feats[0,2],feats[1] = 0.,0.
    feats.requires_grad_()
    for norm in ('branch','whole',None):
        e = embedding(feats, norm)
        assert e.isfinite().all() and not e[1].any()
    assert embedding(feats.half(), 'branch').dtype==torch.float32

def test_part_height():
    assert part_height(24, 6)==4 and part_height(7, 7)==1 and part_height(3, 1)==3
    for h,n,stride in ((23,6,16), (25,6,16), (4,6,16), (0,6,16), (7,4,32)):
        with pytest.raises(ValueError) as e: part_height(h, n, stride)
        msg = str(e.value)
        assert f'H={h}' in msg and f'n_parts={n}' in msg
        heights = [int(o) for o in re.search(r'height ([\d or]+)', msg.split('Use images of')[1])[1].split(' or ')]
        assert heights and all(o>0 and (o//stride)%n==0 for o in heights)
        assert any(o>=h*stride for o in heights)

@pytest.mark.parametrize('make', [PyramidHead,PlainPyramidHead])
def test_a_map_that_does_not_divide_is_refused(make):
    with pytest.raises(ValueError, match='H=10.*n_parts=6'): make(C, IDS, 6, E)(torch.randn(N,C,10,3))

def test_windows():
    assert pyramid_windows(3)==[(0,1),(1,1),(2,1),(0,2),(1,2),(0,3)]
    assert [len(pyramid_windows(n)) for n in (1,6,8)]==[1,21,36]
    assert pyramid_windows(6,[1])==[(i,1) for i in range(6)] and pyramid_windows(6,[6])==[(0,6)]
    assert pyramid_windows(4,[3,1,3])==pyramid_windows(4,[1,3])
    assert all(type(l) is int for l in PyramidHead(4, 2, 3, 4, levels=np.array([2,1])).levels) # model.json wants them so
    for n,levels in ((0,None), (3,[0,1]), (3,[4]), (3,[])):
        with pytest.raises(ValueError, match=r'n_parts|levels'): pyramid_windows(n, levels)

def test_initialisation_as_designed():
    "Classifiers N(0, 0.001²) with bias 0"
    torch.manual_seed(0)
    head = PyramidHead(64, 50, 4, 32)
    assert not head.classify.bias.any() and head.classify.weight.std().item()==pytest.approx(.001, rel=.05)
    assert head.classify.weight.mean().abs()<1e-4

class Body(nn.Conv2d):
    def __init__(self): super().__init__(3, C, 3, stride=4, padding=1)

def test_net_returns_features_and_logits_in_training_and_the_embedding_in_evaluation():
    torch.manual_seed(0)
    net = PyramidNet(nn.Sequential(Body()), IDS, 2, E, [1,2], norm='whole')
    x = torch.randn(N,3,16,8)
    assert not net.trained
    feats,logits = net(x)
    assert (feats.shape,logits.shape)==((N,3,E),(N,3,IDS)) and net.trained and net.stride==4
    emb = net.eval()(x)
    assert emb.shape==(N,3*E)
    torch.testing.assert_close(emb, embedding(net.head.features(net.body(x)), 'whole'))
    net.check_size(16)
    with pytest.raises(ValueError, match='H=5'): net.check_size(20)

def test_bf16_autocast_trains():
    "Under autocast on the CPU: right types, finite gradients, and close to float32"
    torch.manual_seed(0)
    net = PyramidNet(nn.Sequential(Body()), IDS, 2, E, drop=0.)
    x = torch.randn(8,3,16,8)
    full = net(x)[0]
    with torch.autocast('cpu', torch.bfloat16): feats,logits = net(x)
    (feats.float().sum() + logits.float().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype==torch.float32 for p in net.parameters())
    assert (feats.float()-full).abs().max()<.2

@pytest.mark.parametrize('train', [True,False])
def test_head_compiles_as_one_graph(train):
    "No part of it falls back to Python, and features, logits and gradients stay"
    torch.manual_seed(0)
    head = pair(3, None, torch.float)[1].train(train)
    compiled,x = torch.compile(head, fullgraph=True, backend='aot_eager'),torch.randn(N, C, 6, 2)
    def run(f):
        inp = x.clone().requires_grad_()
        head.zero_grad()
        outs = f(inp)
        outs = outs if isinstance(outs, tuple) else (outs,)
        sum((o*torch.arange(o.numel()).view_as(o).cos()).sum() for o in outs).backward()
        return *outs,inp.grad,*(p.grad for p in head.parameters() if p.grad is not None)
    for a,b in zip(run(head), run(compiled), strict=True): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
