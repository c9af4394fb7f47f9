"P×K batches for any labels, and a mode that takes effect on the very next batch, with and without workers"
import random
from collections import Counter

import pytest
from fastai.vision.all import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Toy

from pyramidreid.data.sampler import *


def identities(labels): return {label for label in labels if label>=0}

any_labels = st.lists(st.integers(-1,9), min_size=2, max_size=60).filter(lambda labels: len(identities(labels))>=2)
without_junk = any_labels.map(lambda labels: [abs(label) for label in labels]).filter(lambda labels: len(set(labels))>1)

def loader(labels, **kwargs):
    kwargs = {**dict(p=3, k=2, shuffle=True, num_workers=0), **kwargs}
    return PKDataLoader(Toy(labels), **kwargs)

def batches(dl): return [(x.tolist(),y.tolist()) for x,y in dl]

def check_pk(idxs, labels, p, k):
    "P people with K images each, side by side; an image twice only for people who have fewer than K"
    assert len(idxs)==p*k
    groups = [idxs[i:i+k] for i in range(0, p*k, k)]
    people = [labels[group[0]] for group in groups]
    assert len(set(people))==p and -1 not in people
    for person,group in zip(people, groups):
        assert all(labels[i]==person for i in group)
        n_images,counts = labels.count(person),Counter(group)
        assert len(counts)==min(n_images, k)
        assert max(counts.values())-min(counts.values())<=1

# Drawing

@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pk_idxs(data):
    labels = data.draw(any_labels)
    n_ids = len(identities(labels))
    p = data.draw(st.integers(1,n_ids))
    k = data.draw(st.integers(1,6))
    n_batches = data.draw(st.integers(1,8))
    seed = data.draw(st.integers(0,99))
    idxs = pk_idxs(labels, p, k, n_batches, random.Random(seed))
    assert len(idxs)==n_batches*p*k
    assert idxs==pk_idxs(labels, p, k, n_batches, random.Random(seed))
    for start in range(0, len(idxs), p*k): check_pk(idxs[start:start+p*k], labels, p, k)

    # Nobody is far ahead: every pile of people is used up, except for the fewer than p who are left over
    turns = Counter(labels[i] for i in idxs[::k])
    n_piles = n_batches//max(1,n_ids//p)+1
    assert max(turns.values())-min(turns[label] for label in identities(labels))<=n_piles

@settings(max_examples=60, deadline=None)
@given(st.integers(1,4), st.integers(1,4), st.integers(1,4), st.integers(1,3), st.integers(0,99))
def test_even_coverage_when_everything_divides(p, k, people_in_p, images_in_k, seed):
    "Over an epoch every person, and every image, comes equally often"
    n_ids,n_images = p*people_in_p,k*images_in_k
    labels = [label for label in range(n_ids) for _ in range(n_images)]
    idxs = pk_idxs(labels, p, k, people_in_p*images_in_k, random.Random(seed))
    assert sorted(idxs)==list(range(len(labels)))

unique_items = st.lists(st.integers(), min_size=1, max_size=12, unique=True)

@settings(max_examples=100, deadline=None)
@given(unique_items, st.lists(st.integers(1,15), min_size=1, max_size=20), st.integers(0,99))
def test_shuffled_deck(items, takes, seed):
    "Items of one draw are distinct if there are enough, otherwise repeated evenly"
    deck = ShuffledDeck(items, random.Random(seed))
    for k in takes:
        taken = deck.take(k)
        counts = Counter(taken)
        assert len(taken)==k and set(taken)<=set(items)
        assert len(counts)==min(k,len(items))
        assert max(counts.values())-min(counts.values())<=1

def test_labels_are_read_without_opening_an_image():
    class Closed(Toy):
        def __getitem__(self, i): raise AssertionError('opened')
    dl = loader(big)
    dl.dataset = Closed(big)
    assert len(dl.get_idxs())==len(dl)*6

# Loaders

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_batch_of_an_epoch_is_pk(data):
    labels = data.draw(without_junk)
    p,k = data.draw(st.integers(1,len(set(labels)))),data.draw(st.integers(1,5))
    dl = loader(labels, p=p, k=k)
    epoch = batches(dl)
    assert len(epoch)==len(dl)==max(1, len(labels)//(p*k))
    for x,y in epoch:
        check_pk(x, labels, p, k)
        assert y==[labels[i] for i in x]

@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_epoch_of_random_batches_repeats_no_image(data):
    labels = data.draw(without_junk)
    p,k = data.draw(st.integers(1,len(set(labels)))),data.draw(st.integers(1,5))
    dl = loader(labels, p=p, k=k, mode='random')
    epoch = batches(dl)
    assert len(epoch)==len(dl)==max(1, len(labels)//(p*k))
    seen = [i for x,_ in epoch for i in x]
    if len(labels)<p*k: assert set(seen)==set(range(len(labels)))
    else: assert len(set(seen))==len(seen)==len(epoch)*p*k

def test_random_mode_gives_every_image_the_same_chance():
    labels = [0]*1 + [1]*3 + [2]*20
    dl = loader(labels, p=3, k=2, mode='random')
    counts = Counter(i for _ in range(50) for x,_ in batches(dl) for i in x)
    assert counts=={i:50 for i in range(24)} # 24 images, 4 batches of 6

big = [label for label in range(16) for _ in range(8)]

def is_pk(y, p=2, k=4): return sorted(Counter(y).values())==[k]*p

def is_random(y):
    "Eight random images of 16 people are practically never of three people or fewer"
    return len(set(y))>3

@pytest.mark.parametrize('num_workers', [0,2])
def test_a_mode_takes_effect_on_the_very_next_batch(num_workers):
    "Workers prepare batches ahead; a switch must not wait for those"
    set_seed(1)
    dl = loader(big, p=2, k=4, num_workers=num_workers)
    plan = ['pk','random','random','pk','random','pk','pk','pk']
    plan += ['random','random','pk','random','pk','random','pk','random']
    assert len(dl)==len(plan)
    dl.mode = plan[0]
    drawn = []
    for (_,y),next_mode in zip(dl, [*plan[1:],'pk']):
        drawn.append(y.tolist())
        dl.mode = next_mode
    assert [is_pk(y) for y in drawn]==[mode=='pk' for mode in plan]
    assert [is_random(y) for y in drawn]==[mode=='random' for mode in plan]

def test_a_switch_repeats_no_image_within_a_mode():
    "The batches of each mode continue where that mode stopped, also if others came between"
    set_seed(0)
    dl = loader(big, p=2, k=4, mode='random')
    seen = []
    for i,(x,_) in enumerate(dl):
        if dl.mode=='random': seen += x.tolist()
        dl.mode = 'pk' if i%2 else 'random'
    assert len(seen)>40 and len(set(seen))==len(seen)

@pytest.mark.parametrize('mode', ['pk','random'])
def test_seeds_decide_the_batches(mode):
    def two_epochs(seed, num_workers=0):
        set_seed(seed)
        dl = loader(big, p=2, k=4, mode=mode, num_workers=num_workers)
        return [batches(dl) for _ in range(2)]
    first,again,other = two_epochs(3),two_epochs(3),two_epochs(4)
    assert first==again and first!=other
    assert first[0]!=first[1]
    assert first==two_epochs(3, num_workers=2)

def test_one_batch():
    dl = loader(big, p=2, k=4, num_workers=2)
    assert is_pk(dl.one_batch()[1].tolist())
    dl.mode = 'random'
    assert is_random(dl.one_batch()[1].tolist())

def test_an_epoch_left_early_and_a_new_one():
    dl = loader(big, p=2, k=4)
    for _ in dl: break
    assert len(batches(dl))==len(dl)

def settings_of(dl): return dict(p=dl.p, k=dl.k, mode=dl.mode, bs=dl.bs)

def test_new_keeps_the_settings():
    dl = loader(big, p=2, k=4, mode='random')
    for new in (dl.new(), dl.new(num_workers=0), dl.new(Toy(big[:64]))):
        assert type(new) is PKDataLoader and new.shuffle
        assert settings_of(new)==dict(p=2, k=4, mode='random', bs=8)
    assert len(dl.new(Toy(big[:64])))==8

def test_new_replaces_settings():
    dl = loader(big, p=2, k=4, mode='random')
    new = dl.new(p=4, k=3, mode='pk')
    assert settings_of(new)==dict(p=4, k=3, mode='pk', bs=12)
    assert all(is_pk(y, 4, 3) for _,y in batches(new))

def test_new_for_validation_and_back():
    dl = loader(big, p=2, k=4)
    valid = dl.new(shuffle=False, drop_last=False, bs=10)
    assert settings_of(valid)==dict(p=2, k=4, mode='pk', bs=10)
    assert [i for x,_ in batches(valid) for i in x]==list(range(len(big)))
    assert valid.new(shuffle=True).bs==8

def test_validation_is_a_plain_loader_in_order():
    labels = [-1,5,-1,2,2,0]
    dl = PKDataLoader(Toy(labels), p=40, k=40, bs=4, num_workers=0)
    in_order = [([0,1,2,3],[-1,5,-1,2]), ([4,5],[2,0])]
    assert len(dl)==2 and batches(dl)==in_order
    dl.mode = 'random'
    assert batches(dl)==in_order
    assert [i for x,_ in batches(dl.new(num_workers=2)) for i in x]==list(range(6))

@pytest.mark.parametrize('shuffle', [True,False])
def test_an_empty_dataset_gives_no_batch(shuffle):
    "As after `export`, where only the transforms are kept"
    dl = PKDataLoader(Toy([]), p=2, k=2, shuffle=shuffle, num_workers=0)
    assert dl.n==0 and batches(dl)==[]
    assert len(dl)==0

# Errors

@pytest.mark.parametrize('p,k', [(0,4), (2,0), (-1,4)])
def test_p_and_k_must_be_positive(p, k):
    with pytest.raises(ValueError, match=f'p={p}, k={k}'): loader(big, p=p, k=k)

def test_too_few_people():
    with pytest.raises(ValueError, match='p=17.*has 16'): batches(loader(big, p=17, k=1))
    with pytest.raises(ValueError, match='p=2.*has 1'): pk_idxs([3,3,3,-1,-1], 2, 2, 1, random.Random(0))

def test_unknown_modes():
    dl = loader(big, mode='balanced')
    with pytest.raises(ValueError, match="'balanced'.*'pk'.*'random'"): batches(dl)
    dl = loader(big, p=2, k=4)
    with pytest.raises(ValueError, match="'Random'"):
        for _ in dl: dl.mode = 'Random'

# Several ranks

def unpadded_steps(by_rank, n, global_bs):
    "The images of all ranks, step by step in order, without those that pad the last batch"
    images = []
    for i,step in enumerate(zip(*by_rank)):
        assert len({len(share) for share in step})==1
        images += sum(step, [])[:max(0, n-i*global_bs)]
    return images

@settings(max_examples=100, deadline=None)
@given(st.integers(0,40), st.integers(1,8), st.integers(2,5), st.booleans())
def test_shares_of_validation(n, bs, ranks, drop_last):
    "All ranks take the same number of steps, and their shares in order are all images, each once"
    global_bs = bs*ranks
    kwargs = dict(bs=bs, drop_last=drop_last, num_workers=0)
    dls = [PKDataLoader(Toy([0]*n), share=(rank,ranks), **kwargs) for rank in range(ranks)]
    by_rank = [[x for x,_ in batches(dl)] for dl in dls]
    n_steps = n//global_bs if drop_last else -(-n//global_bs)
    assert [len(dl) for dl in dls]==[len(share) for share in by_rank]==[n_steps]*ranks
    n_expected = n//global_bs*global_bs if drop_last else n
    assert unpadded_steps(by_rank, n, global_bs)==list(range(n_expected))

def epoch_in_modes(modes, seed, **kwargs):
    dl = loader([label for label in range(12) for _ in range(9)], **kwargs)
    dl.rng.seed(seed)
    epoch = []
    for (x,y),mode in zip(dl, modes):
        epoch.append((x.tolist(),y.tolist()))
        dl.mode = mode
    return epoch

nine_modes = st.lists(st.sampled_from(['pk','random']), min_size=9, max_size=9)

@settings(max_examples=60, deadline=None)
@given(st.integers(1,3), st.integers(1,4), st.integers(2,4), nine_modes, st.integers(0,99))
def test_shares_of_training(p, k, ranks, modes, seed):
    "Ranks together see what one process sees with `p*ranks` people, whatever the modes; each has its people whole"
    one = epoch_in_modes(modes, seed, p=p*ranks, k=k, share=(0,1))
    by_rank = [epoch_in_modes(modes, seed, p=p, k=k, share=(rank,ranks)) for rank in range(ranks)]
    assert [len(epoch) for epoch in by_rank]==[len(one)]*ranks
    for mode,(whole,_),step in zip(['pk',*modes], one, zip(*by_rank)):
        assert sum((x for x,_ in step), [])==whole
        if mode!='pk': continue
        for _,y in step: assert is_pk(y, p, k)

def test_too_few_people_for_all_ranks():
    dl = loader(big, p=9, k=1, share=(0,2))
    with pytest.raises(ValueError, match='p=9 identities on each of 2 ranks.*has 16.*p=8 or less'): batches(dl)

def test_new_keeps_and_replaces_the_share():
    dl = loader(big, share=(0,2))
    assert dl.new().share==(0,2)
    assert dl.new(share=(0,1)).share==(0,1)
