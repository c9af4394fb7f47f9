"P×K batches for any labels, and a mode that acts on the very next batch, with and without workers"
import random
from collections import Counter

import pytest
from fastai.vision.all import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy

from pyramidreid.data.sampler import *

labelled = st.lists(st.integers(-1,9), min_size=2, max_size=60).filter(lambda ls: len({l for l in ls if l>=0})>=2)

def loader(labels, **kwargs): return PKDataLoader(Toy(labels), **{**dict(p=3, k=2, shuffle=True, num_workers=0), **kwargs})
def batches(dl): return [(x.tolist(),y.tolist()) for x,y in dl]

def check_pk(idxs, labels, p, k):
    "P people with K images each, side by side; an image twice only for people who have too few"
    assert len(idxs)==p*k
    groups = [idxs[i:i+k] for i in range(0,p*k,k)]
    people = [{labels[i] for i in g} for g in groups]
    assert all(len(o)==1 for o in people) and len(set.union(*people))==p and -1 not in set.union(*people)
    for g in groups:
        own = labels.count(labels[g[0]])
        c = Counter(g)
        if own>=k: assert len(c)==k
        else: assert len(c)==own and max(c.values())-min(c.values())<=1

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pk_idxs(data):
    labels = data.draw(labelled)
    n_ids = len({l for l in labels if l>=0})
    p,k,n,seed = data.draw(st.integers(1,n_ids)),data.draw(st.integers(1,6)),data.draw(st.integers(1,8)),data.draw(st.integers(0,99))
    idxs = pk_idxs(labels, p, k, n, random.Random(seed))
    assert len(idxs)==n*p*k and idxs==pk_idxs(labels, p, k, n, random.Random(seed))
    for b in range(n): check_pk(idxs[b*p*k:(b+1)*p*k], labels, p, k)
    # people: nobody is far ahead. Every pile of people is used up, but for fewer than p who are left over
    seen = Counter(labels[i] for i in idxs[::k])
    left_over = n//max(1,n_ids//p)+1
    assert max(seen.values()) - min(seen.get(l,0) for l in labels if l>=0) <= left_over

@settings(max_examples=60, deadline=None)
@given(st.integers(1,4), st.integers(1,4), st.integers(1,4), st.integers(1,3), st.integers(0,99))
def test_even_coverage_when_everything_divides(p, k, people_in_p, images_in_k, seed):
    "Over an epoch every person, and every image, comes equally often"
    n_ids,each = p*people_in_p,k*images_in_k
    labels = [l for l in range(n_ids) for _ in range(each)]
    idxs = pk_idxs(labels, p, k, people_in_p*images_in_k, random.Random(seed))
    assert sorted(idxs)==list(range(len(labels)))

@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(), min_size=1, max_size=12, unique=True), st.lists(st.integers(1,15), min_size=1, max_size=20), st.integers(0,99))
def test_turns(items, takes, seed):
    "What is taken together is distinct, as far as there is enough; short takes use up the pile"
    turns = ShuffledDeck(items, random.Random(seed))
    for k in takes:
        res = turns.take(k)
        c = Counter(res)
        assert len(res)==k and set(res)<=set(items)
        assert len(c)==min(k,len(items)) and max(c.values())-min(c.get(o,0) for o in items if k>=len(items) or o in c)<=1

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_loader(data):
    "Every batch of an epoch is P×K in one mode, and made of distinct images in the other"
    labels = data.draw(labelled.map(lambda ls: [abs(l) for l in ls]).filter(lambda ls: len(set(ls))>1))
    p,k = data.draw(st.integers(1,len(set(labels)))),data.draw(st.integers(1,5))
    dl = loader(labels, p=p, k=k)
    assert len(dl)==max(1, len(labels)//(p*k))
    got = batches(dl)
    assert len(got)==len(dl)
    for x,y in got:
        check_pk(x, labels, p, k)
        assert y==[labels[i] for i in x]
    dl.mode = 'random'
    got = batches(dl)
    assert len(got)==len(dl)
    flat = [i for x,_ in got for i in x]
    if len(labels)>=p*k:
        for x,_ in got: assert len(set(x))==p*k
        assert len(set(flat))==len(flat) # an epoch without a repetition
    else: assert Counter(flat).keys()==set(range(len(labels)))

def test_random_mode_gives_every_image_the_same_chance():
    labels = [0]*1 + [1]*3 + [2]*20
    dl = loader(labels, p=3, k=2, mode='random')
    c = Counter(i for _ in range(300) for x,_ in batches(dl) for i in x)
    assert set(c.values())=={300} # 24 images, 4 batches of 6

big = [l for l in range(16) for _ in range(8)]
def is_pk(y, p=2, k=4): return sorted(Counter(y).values())==[k]*p
def chance(y): return len(set(y))>3 # of 8 random images of 16 people: three or fewer people are next to impossible

@pytest.mark.parametrize('num_workers', [0,2])
def test_the_mode_acts_on_the_very_next_batch(num_workers):
    "Workers prepare batches ahead; the switch must not wait for those"
    set_seed(1)
    dl = loader(big, p=2, k=4, num_workers=num_workers)
    plan = ['pk','random','random','pk','random','pk','pk','pk','random','random','pk','random','pk','random','pk','random']
    assert len(dl)==len(plan)
    got,dl.mode = [],plan[0]
    for (x,y),following in zip(dl, plan[1:]+['pk']):
        got.append(y.tolist())
        dl.mode = following
    assert len(got)==len(plan)
    assert [is_pk(y) for y in got]==[m=='pk' for m in plan]
    assert [chance(y) for y in got]==[m=='random' for m in plan]

def test_a_switch_repeats_no_image_within_a_mode():
    "The batches of each mode go on where that mode stopped, also when others came between"
    set_seed(0)
    dl,seen = loader(big, p=2, k=4, mode='random'),[]
    for i,(x,y) in enumerate(dl):
        if dl.mode=='random': seen += x.tolist()
        dl.mode = 'pk' if i%2 else 'random'
    assert len(seen)>40 and len(set(seen))==len(seen)

@pytest.mark.parametrize('mode', ['pk','random'])
def test_seeds(mode):
    def epochs(seed, num_workers=0, build_first=False):
        if not build_first: set_seed(seed)
        dl = loader(big, p=2, k=4, mode=mode, num_workers=num_workers)
        return [batches(dl) for _ in range(2)]
    a,b,c = epochs(3),epochs(3),epochs(4)
    assert a==b and a!=c and a[0]!=a[1]
    assert a==epochs(3, num_workers=2)

def test_new_keeps_and_replaces():
    dl = loader(big, p=2, k=4, mode='random')
    for new in (dl.new(), dl.new(num_workers=0), dl.new(Toy(big[:64]))):
        assert type(new) is PKDataLoader and (new.p,new.k,new.mode,new.bs,new.shuffle)==(2,4,'random',8,True)
    assert len(dl.new(Toy(big[:64])))==8
    new = dl.new(p=4, k=3, mode='pk')
    assert (new.p,new.k,new.mode,new.bs)==(4,3,'pk',12)
    assert all(is_pk(y, 4, 3) for _,y in batches(new))
    valid = dl.new(shuffle=False, drop_last=False, bs=10)
    assert (valid.bs,valid.p,valid.k)==(10,2,4)
    assert [i for x,_ in batches(valid) for i in x]==list(range(len(big)))
    assert valid.new(shuffle=True).bs==8

def test_validation_is_a_plain_loader_in_order():
    labels = [-1,5,-1,2,2,0]
    dl = PKDataLoader(Toy(labels), p=40, k=40, bs=4, num_workers=0)
    assert len(dl)==2 and batches(dl)==[([0,1,2,3],[-1,5,-1,2]), ([4,5],[2,0])]
    dl.mode = 'random'
    assert batches(dl)==batches(dl)
    assert [i for x,_ in batches(dl.new(num_workers=2)) for i in x]==list(range(6))

@pytest.mark.parametrize('shuffle', [True,False])
def test_an_empty_data_set_gives_no_batch(shuffle):
    "As after `export`, where only the transforms are kept"
    dl = PKDataLoader(Toy([]), p=2, k=2, shuffle=shuffle, num_workers=0)
    assert dl.n==0 and batches(dl)==[]
    assert len(dl)==0

def test_one_batch():
    dl = loader(big, p=2, k=4, num_workers=2)
    assert is_pk(dl.one_batch()[1].tolist())
    dl.mode = 'random'
    assert chance(dl.one_batch()[1].tolist())

def test_an_epoch_left_early_and_a_new_one():
    dl = loader(big, p=2, k=4)
    for _ in dl: break
    assert len(batches(dl))==len(dl)

def test_labels_are_read_without_opening_an_image():
    class Closed(Toy):
        def __getitem__(self, i): raise AssertionError('opened')
    dl = loader(big)
    dl.dataset = Closed(big)
    assert len(dl.get_idxs())==len(dl)*6

def test_errors():
    for p,k in ((0,4), (2,0), (-1,4)):
        with pytest.raises(ValueError, match=f'p={p}, k={k}'): loader(big, p=p, k=k)
    with pytest.raises(ValueError, match='p=17.*has 16'): batches(loader(big, p=17, k=1))
    with pytest.raises(ValueError, match='p=2.*has 1'): pk_idxs([3,3,3,-1,-1], 2, 2, 1, random.Random(0))
    dl = loader(big, mode='balanced')
    with pytest.raises(ValueError, match="'balanced'.*'pk'.*'random'"): batches(dl)
    dl = loader(big, p=2, k=4)
    with pytest.raises(ValueError, match="'Random'"):
        for _ in dl: dl.mode = 'Random'

@settings(max_examples=100, deadline=None)
@given(st.integers(0,40), st.integers(1,8), st.integers(2,5), st.booleans())
def test_shares_of_validation(n, bs, ranks, drop_last):
    "All ranks take as many steps, and step by step their parts in order are all images, each once, less what filled up the last batch"
    dls = [PKDataLoader(Toy([0]*n), bs=bs, share=(r,ranks), drop_last=drop_last, num_workers=0) for r in range(ranks)]
    parts = [[x for x,_ in batches(dl)] for dl in dls]
    assert {len(o) for o in parts}=={len(dl) for dl in dls}=={n//(bs*ranks) if drop_last else -(-n//(bs*ranks))}
    whole = []
    for i,step in enumerate(zip(*parts)):
        assert len({len(o) for o in step})==1
        whole += sum(step, [])[:max(0, n-i*bs*ranks)]
    assert whole==list(range(n//(bs*ranks)*bs*ranks if drop_last else n))

@settings(max_examples=60, deadline=None)
@given(st.integers(1,3), st.integers(1,4), st.integers(2,4), st.lists(st.sampled_from(['pk','random']), min_size=9, max_size=9), st.integers(0,99))
def test_shares_of_training(p, k, ranks, plan, seed):
    "Ranks see together what one process sees with `p*ranks` people, whatever the modes; each has its people whole"
    def draw(p, share):
        dl,res = loader([l for l in range(12) for _ in range(9)], p=p, k=k, share=share),[]
        dl.rng.seed(seed)
        for (x,y),dl.mode in zip(dl, plan): res.append((x.tolist(),y.tolist()))
        return res
    one,parts = draw(p*ranks, (0,1)),[draw(p, (r,ranks)) for r in range(ranks)]
    assert [len(o) for o in parts]==[len(one)]*ranks
    for i,(step,(whole,_)) in enumerate(zip(zip(*parts), one)):
        assert sum((x for x,_ in step), [])==whole
        if (['pk']+plan)[i]=='pk':
            for _,y in step: assert Counter(Counter(y).values())=={k:p}

def test_too_few_people_for_all_ranks():
    dl = loader(big, p=9, k=1, share=(0,2))
    with pytest.raises(ValueError, match='p=9 identities on each of 2 ranks.*has 16.*p=8 or less'): batches(dl)
    assert (dl.new().share, dl.new(share=(0,1)).share)==((0,2),(0,1))
