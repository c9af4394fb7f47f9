"Scores of identities against loops over pairs and pictures, and over all ways to match people with identities"
from itertools import combinations, permutations

import numpy as np
import pytest

from pyramidreid.evaluation.identities import identity_scores, identity_switches


def share(hits): return sum(hits)/len(hits) if hits else 1.

def plain_scores(pids, identities):
    pairs,n = list(combinations(range(len(pids)), 2)),range(len(pids))
    precision = share([pids[i]==pids[j] for i,j in pairs if identities[i]==identities[j]])
    recall = share([identities[i]==identities[j] for i,j in pairs if pids[i]==pids[j]])
    b_precision = np.mean([share([pids[i]==pids[j] for j in n if identities[i]==identities[j]]) for i in n])
    b_recall = np.mean([share([identities[i]==identities[j] for j in n if pids[i]==pids[j]]) for i in n])
    people,given = sorted(set(pids)),sorted(set(identities))
    given += [None]*max(0, len(people)-len(given))
    best = max(sum(dict(zip(people, chosen)).get(pid)==identity for pid,identity in zip(pids, identities))
               for chosen in permutations(given, len(people)))
    return precision,recall,b_precision,b_recall,best/len(pids)

@pytest.mark.parametrize('seed', range(30))
def test_scores_equal_plain_loops(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 14))
    pids,identities = rng.integers(0, rng.integers(1, 5), n).tolist(),rng.integers(0, rng.integers(1, 6), n).tolist()
    found = identity_scores(pids, identities)
    names = ('pair_precision','pair_recall','bcubed_precision','bcubed_recall','IDF1')
    assert [found[name] for name in names]==pytest.approx(plain_scores(pids, identities))

def test_extremes():
    pids = ['a']*3+['b']*2
    assert set(identity_scores(pids, [7,7,7,1,1]).values())=={1.}
    alone = identity_scores(pids, range(5))
    assert alone['pair_precision']==alone['bcubed_precision']==1 and alone['pair_recall']==0
    assert alone['IDF1']==pytest.approx(2/5) and alone['pair_F1']==0

@pytest.mark.parametrize('pids,identities,said', [
    ([1,2], [1], '2 pids and 1'), ([], [], 'nobody'), ([1,None], [1,2], 'missing'),
    ([1,2], [1,float('nan')], 'missing')])
def test_wrong_arguments(pids, identities, said):
    with pytest.raises(ValueError, match=said): identity_scores(pids, identities)

def test_kinds_of_values():
    assert identity_scores(np.array([1,1,2]), ['x','x','y'])['IDF1']==1

def test_switches_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    times = rng.permutation(80)
    pids,identities = rng.integers(0, 4, 80),rng.choice([1,2,3,None], 80)
    last,expected = {},0
    for i in np.argsort(times):
        if identities[i] is None: continue
        expected += last.get(pids[i], identities[i])!=identities[i]
        last[pids[i]] = identities[i]
    assert identity_switches(pids, identities, times)==expected>0
