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

BATCH,CHANNELS,EMB,IDS = 3,5,4,7

def random_map(height, width, dtype=torch.double): return torch.randn(BATCH, CHANNELS, height, width, dtype=dtype)

def level_subsets(n):
    "All sets of levels for a small n; for a larger one each level alone, all, the ends and a few in between"
    if n>3: return [*([level] for level in range(1,n+1)), None, [1,n], [2,n-1], list(range(1,n+1,2))]
    sizes = range(1,n+1)
    return [list(levels) for size in sizes for levels in itertools.combinations(range(1,n+1), size)]

def pair(n_parts, levels=None, dtype=torch.double, drop=0., neck=False):
    "A plain head with random weights, statistics and classifiers, and a fused one with the same"
    args = dict(n_parts=n_parts, emb_sz=EMB, levels=levels, drop=drop, neck=neck)
    plain = PlainPyramidHead(CHANNELS, IDS, **args).to(dtype)
    with torch.no_grad():
        for name,value in itertools.chain(plain.named_parameters(), plain.named_buffers()):
            if 'running_var' in name: value.uniform_(.5, 2)
            elif value.is_floating_point(): value.normal_()
    fused = PyramidHead(CHANNELS, IDS, **args).to(dtype)
    fused.load_state_dict(fuse_state(plain.state_dict()))
    return plain,fused

def check_close(a, b, tol=1e-12): torch.testing.assert_close(a, b, atol=tol, rtol=tol)

def fused_grads(plain):
    "Gradients of the plain head's parameters, with the fused head's names and shapes"
    grads = {name:torch.zeros_like(value) for name,value in plain.state_dict().items()}
    grads.update({name:weight.grad for name,weight in plain.named_parameters()})
    return fuse_state(grads)

def check_same_statistics(plain, fused, tol=1e-12):
    state = fused.state_dict()
    for name,value in fuse_state(plain.state_dict()).items(): check_close(value, state[name], tol)

def compare(fmap, n_parts, levels=None, train=True, tol=1e-10, neck=False):
    "Compare outputs, input gradient, parameter gradients and running statistics of both heads; the fused outputs"
    plain,fused = pair(n_parts, levels, fmap.dtype, neck=neck)
    plain_in,fused_in = (fmap.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    plain_out,fused_out = plain.train(train)(plain_in),fused.train(train)(fused_in)
    for a,b in zip(plain_out, fused_out):
        assert a.shape==b.shape
        check_close(a, b, tol)
    weights = [torch.randn_like(o) for o in plain_out]
    for out in (plain_out,fused_out): sum((o*w).sum() for o,w in zip(out, weights)).backward()
    check_close(plain_in.grad, fused_in.grad, tol)
    want = fused_grads(plain)
    for name,weight in fused.named_parameters(): check_close(want[name], weight.grad, tol)
    check_same_statistics(plain, fused, tol)
    return fused_out

# The fused head equals the plain one

@pytest.mark.parametrize('train', [True,False])
@pytest.mark.parametrize('n', range(1,9))
def test_fused_equals_plain(n, train):
    torch.manual_seed(n)
    for levels in level_subsets(n): compare(random_map(2*n, 3), n, levels, train)

@pytest.mark.parametrize('train', [True,False])
@pytest.mark.parametrize('n', [1,2,3,6])
def test_fused_equals_plain_with_a_neck(n, train):
    torch.manual_seed(n)
    for levels in level_subsets(n): compare(random_map(2*n, 3), n, levels, train, neck=True)

@pytest.mark.parametrize('train', [True,False])
def test_a_neck_classifies_the_normed_features(train):
    torch.manual_seed(0)
    _,fused = pair(3, neck=True)
    x = random_map(6, 2)
    feats,logits = fused.train(train)(x)
    normed = fused.features(x) if not train else fused.bn(feats.flatten(1)).view_as(feats)
    assert (feats<0).any() and (normed<0).any()
    check_close(logits, torch.einsum('nbe,bei->nbi', normed, fused.classify.weight), tol=1e-10)
    check_close(feats, torch.einsum('bnc,bce->nbe', pool_windows(x, 3, [1,2,3]), fused.reduce.weight)
                + fused.reduce.bias, tol=1e-10)

@pytest.mark.parametrize('n', [1,4,6])
@pytest.mark.parametrize('rows,width', [(1,1),(1,4),(3,1)])
def test_parts_of_one_row_or_one_cell(n, rows, width):
    torch.manual_seed(0)
    compare(random_map(rows*n, width), n)

def relu_map(shape): return torch.randint(-3, 3, shape).clamp(min=0)
def zero_map(shape): return torch.zeros(shape)
def constant_map(shape): return torch.full(shape, 2.5)
def row_map(shape): return torch.arange(shape[2]).view(1,1,-1,1).expand(shape)//3

maps_with_ties = [relu_map, zero_map, constant_map, row_map]

def tied_map(make, n): return make((BATCH,CHANNELS,2*n,4)).double().contiguous()

@pytest.mark.parametrize('n', [1,3,6])
@pytest.mark.parametrize('make', maps_with_ties)
def test_heads_agree_on_ties_in_evaluation(n, make):
    torch.manual_seed(0)
    compare(tied_map(make, n), n, train=False)

@pytest.mark.parametrize('n', [1,3,6])
def test_heads_agree_on_ties_in_training(n):
    "Not on the other maps: batch norm turns a batch without variance into rounding noise"
    torch.manual_seed(0)
    compare(tied_map(relu_map, n), n)

def adaptive_pool(fmap, n, windows):
    "Pooled windows by torch's own layers"
    rows = fmap.shape[2]//n
    crops = [fmap[:,:,first*rows:(first+length)*rows] for first,length in windows]
    return torch.stack([(F.adaptive_avg_pool2d(o, 1) + F.adaptive_max_pool2d(o, 1)).flatten(1) for o in crops])

@pytest.mark.parametrize('n', [1,3,6])
@pytest.mark.parametrize('make', maps_with_ties)
def test_ties_send_the_gradient_to_the_same_cell(n, make):
    "The first of several equal cells is the maximum, as in torch's max pooling"
    torch.manual_seed(0)
    fmap = tied_map(make, n)
    a_in,b_in = fmap.clone().requires_grad_(),fmap.clone().requires_grad_()
    a,b = adaptive_pool(a_in, n, pyramid_windows(n)),pool_windows(b_in, n, range(1,n+1))
    check_close(a, b)
    weights = torch.randn_like(a)
    for pooled in (a,b): (pooled*weights).sum().backward()
    check_close(a_in.grad, b_in.grad)

@pytest.mark.parametrize('n', [2,6])
def test_memory_format_does_not_matter(n):
    torch.manual_seed(0)
    fmap = torch.randint(-2, 3, (BATCH,CHANNELS,2*n,3)).double()
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        results.append(compare(fmap.to(memory_format=memory_format), n))
    for a,b in zip(*results): assert torch.equal(a, b)
    transposed = torch.randn(BATCH, 2*n, CHANNELS, 3, dtype=torch.double).transpose(1,2)
    compare(transposed, n)

def test_float32_to_rounding():
    torch.manual_seed(0)
    compare(torch.randn(8, CHANNELS, 12, 4), 6, tol=1e-4)

def test_several_steps_keep_the_running_statistics_equal():
    torch.manual_seed(0)
    plain,fused = pair(4, [1,2,4])
    for _ in range(3):
        x = random_map(8, 2)
        plain(x)
        fused(x)
    check_same_statistics(plain, fused)
    assert fused.bn.num_batches_tracked==3
    x = random_map(8, 2)
    for a,b in zip(plain.eval()(x), fused.eval()(x)): check_close(a, b, tol=1e-10)

# Parts of the head

def test_dropout_acts_before_the_classifiers_only():
    torch.manual_seed(0)
    _,fused = pair(3, drop=0.5)
    x = random_map(6, 2)
    (feats,logits),(feats_again,logits_again) = fused(x),fused(x)
    assert torch.equal(feats, feats_again) and not torch.equal(logits, logits_again)
    fused.eval()
    assert torch.equal(fused(x)[1], fused(x)[1])

def distinct_values(*shape): return torch.randperm(torch.Size(shape).numel()).double().view(shape).requires_grad_()

@pytest.mark.parametrize('n,shape', [(1,(2,2,3,2)), (2,(2,3,4,2)), (6,(1,2,6,1))])
def test_gradients_of_pooling(n, shape):
    torch.manual_seed(0)
    x = distinct_values(*shape)
    assert torch.autograd.gradcheck(lambda x: _PoolParts.apply(x, n), (x,))
    assert torch.autograd.gradcheck(lambda x: pool_windows(x, n, list(range(1,n+1))), (x,))

def test_pool_parts_with_one_output_unused():
    x = distinct_values(1,2,4,3)
    mean,_ = _PoolParts.apply(x, 2)
    mean.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1/6))
    x.grad = None
    _,top = _PoolParts.apply(x, 2)
    top.sum().backward()
    assert x.grad.sum()==4 and set(x.grad.unique().tolist())=={0.,1.}

@pytest.mark.parametrize('height,n,rows', [(24,6,4), (7,7,1), (3,1,3)])
def test_part_height(height, n, rows): assert part_height(height, n)==rows

@pytest.mark.parametrize('height,n,stride', [(23,6,16), (25,6,16), (4,6,16), (0,6,16), (7,4,32)])
def test_an_uneven_height_names_image_heights_that_fit(height, n, stride):
    with pytest.raises(ValueError, match=f'H={height} .*n_parts={n} ') as e: part_height(height, n, stride)
    advice = re.search(r'Use images of height ([\d or]+)', str(e.value))[1]
    heights = [int(o) for o in advice.split(' or ')]
    assert all(o>0 and o%stride==0 and (o//stride)%n==0 for o in heights)
    assert any(o>=height*stride for o in heights)

@pytest.mark.parametrize('head', [PyramidHead,PlainPyramidHead])
def test_a_map_that_does_not_divide_is_refused(head):
    with pytest.raises(ValueError, match='H=10.*n_parts=6'): head(CHANNELS, IDS, 6, EMB)(random_map(10, 3))

def test_windows():
    assert pyramid_windows(3)==[(0,1),(1,1),(2,1),(0,2),(1,2),(0,3)]
    assert [len(pyramid_windows(n)) for n in (1,6,8)]==[1,21,36]
    assert pyramid_windows(6,[1])==[(i,1) for i in range(6)]
    assert pyramid_windows(6,[6])==[(0,6)]

def test_levels_are_sorted_and_distinct_python_integers():
    assert pyramid_windows(4,[3,1,3])==pyramid_windows(4,[1,3])
    head = PyramidHead(4, 2, 3, 4, levels=np.array([2,1]))
    assert head.levels==[1,2] and all(type(level) is int for level in head.levels) # for model.json

@pytest.mark.parametrize('n,levels', [(0,None), (3,[0,1]), (3,[4]), (3,[])])
def test_impossible_windows(n, levels):
    with pytest.raises(ValueError, match='n_parts=0' if levels is None else re.escape(f'levels={levels}')):
        pyramid_windows(n, levels)

def test_initialisation_of_the_classifiers():
    "N(0, 0.001²) with bias 0"
    torch.manual_seed(0)
    head = PyramidHead(64, 50, 4, 32)
    assert not head.classify.bias.any()
    assert head.classify.weight.std().item()==pytest.approx(.001, rel=.05)
    assert head.classify.weight.mean().abs()<1e-4

# Embedding

def test_embedding_norms():
    torch.manual_seed(0)
    feats = torch.rand(BATCH, 6, EMB)*torch.arange(1,7)[:,None]
    by_branch,whole,raw = (join_branches(feats, norm) for norm in ('branch','whole',None))
    torch.testing.assert_close(raw, feats.flatten(1))
    torch.testing.assert_close(whole, raw/raw.norm(dim=1, keepdim=True))
    torch.testing.assert_close(by_branch.norm(dim=1), torch.ones(BATCH))
    torch.testing.assert_close(by_branch.view(BATCH,6,EMB).norm(dim=2), torch.full((BATCH,6), 6**-.5))

def test_similarity_is_the_mean_over_branches():
    torch.manual_seed(0)
    feats = torch.rand(BATCH, 6, EMB)
    emb = join_branches(feats)
    mean = F.cosine_similarity(feats[:1], feats[1:], dim=-1).mean(-1)
    torch.testing.assert_close((emb[0]*emb[1:]).sum(-1), mean)

def test_unknown_norms():
    feats = torch.rand(BATCH, 6, EMB)
    with pytest.raises(ValueError, match="'length'.*'branch'.*'whole'"): join_branches(feats, 'length')

@pytest.mark.parametrize('norm', ['branch','whole',None])
def test_embedding_of_dead_branches_is_finite(norm):
    "ReLU may leave a branch, or a whole image, at zero"
    feats = torch.rand(BATCH, 6, EMB)
    feats[0,2] = 0.
    feats[1] = 0.
    feats.requires_grad_()
    emb = join_branches(feats, norm)
    emb.sum().backward()
    assert emb.isfinite().all() and not emb[1].any()
    assert feats.grad.isfinite().all()

def test_embedding_of_half_precision_features_is_float32():
    assert join_branches(torch.rand(BATCH, 6, EMB).half(), 'branch').dtype==torch.float32

# The model

def tiny_net(levels=None, **kwargs):
    body = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=4, padding=1))
    return PyramidNet(body, IDS, 2, EMB, levels, **kwargs)

def test_net_returns_features_and_logits_in_training():
    net = tiny_net()
    assert not net.trained and net.stride==4
    feats,logits = net(torch.randn(BATCH,3,16,8))
    assert feats.shape==(BATCH,3,EMB) and logits.shape==(BATCH,3,IDS)
    assert net.trained

def test_net_returns_the_embedding_in_evaluation():
    torch.manual_seed(0)
    net = tiny_net([1,2], norm='whole').eval()
    x = torch.randn(BATCH,3,16,8)
    emb = net(x)
    assert emb.shape==(BATCH,3*EMB)
    torch.testing.assert_close(emb, join_branches(net.head.features(net.body(x)), 'whole'))

def test_net_checks_the_image_height():
    net = tiny_net()
    net.check_size(16)
    with pytest.raises(ValueError, match='H=5'): net.check_size(20)

def test_bf16_autocast_trains():
    "Under autocast on the CPU: right types, finite gradients, and close to float32"
    torch.manual_seed(0)
    net = tiny_net(drop=0.)
    x = torch.randn(8,3,16,8)
    full = net(x)[0]
    with torch.autocast('cpu', torch.bfloat16): feats,logits = net(x)
    (feats.float().sum() + logits.float().sum()).backward()
    grads = [weight.grad for weight in net.parameters()]
    assert all(grad is not None and grad.isfinite().all() and grad.dtype==torch.float32 for grad in grads)
    assert (feats.float()-full).abs().max()<.2

def outputs_and_grads(run, head, x):
    "Outputs of `run`, which runs `head`, and the gradients of the input and all weights"
    x = x.clone().requires_grad_()
    head.zero_grad()
    outs = run(x)
    sum((out*torch.arange(out.numel()).view_as(out).cos()).sum() for out in outs).backward()
    return [*outs, x.grad, *(weight.grad for weight in head.parameters() if weight.grad is not None)]

@pytest.mark.slow
@pytest.mark.parametrize('neck', [False,True])
@pytest.mark.parametrize('train', [True,False])
def test_head_compiles_as_one_graph(train, neck):
    "No part of it falls back to Python, and features, logits and gradients stay the same"
    torch.manual_seed(0)
    _,head = pair(3, dtype=torch.float, neck=neck)
    head.train(train)
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    x = random_map(6, 2, torch.float)
    for a,b in zip(outputs_and_grads(head, head, x), outputs_and_grads(compiled, head, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
