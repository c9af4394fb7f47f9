"Released checkpoints: which names are known, and what is missing"
import pytest
import torch

from pyramidreid.models.released import released_state_dict


def branch_weights(branch, nf=4, emb_sz=2, n_ids=3):
    "The weights of a branch with the authors' names"
    conv,fc = f'pyramid_conv_list0.{branch}',f'pyramid_fc_list0.{branch}'
    batch_norm = {f'{conv}.1.{name}':torch.rand(emb_sz) for name in ('weight','bias','running_mean','running_var')}
    return {f'{conv}.0.weight':torch.rand(emb_sz,nf,1,1), f'{conv}.0.bias':torch.rand(emb_sz), **batch_norm,
            f'{fc}.weight':torch.rand(n_ids,emb_sz), f'{fc}.bias':torch.rand(n_ids)}

@pytest.fixture
def checkpoint():
    "Two branches and a piece of a backbone"
    return {'base.conv1.weight':torch.rand(4,3,7,7), 'base.layer4.0.bn2.bias':torch.rand(4),
            **branch_weights(0), **branch_weights(1)}

def test_backbone_and_head_get_our_names(checkpoint):
    sd = released_state_dict(checkpoint)
    assert torch.equal(sd['body.0.weight'], checkpoint['base.conv1.weight'])
    assert torch.equal(sd['body.7.0.bn2.bias'], checkpoint['base.layer4.0.bn2.bias'])
    assert torch.equal(sd['head.reduce.weight'][1], checkpoint['pyramid_conv_list0.1.0.weight'][:,:,0,0].T)
    assert torch.equal(sd['head.bn.running_var'][2:], checkpoint['pyramid_conv_list0.1.1.running_var'])
    assert torch.equal(sd['head.classify.bias'][0], checkpoint['pyramid_fc_list0.0.bias'])

def test_names_may_begin_with_module(checkpoint):
    want = released_state_dict(checkpoint)
    sd = released_state_dict({f'module.{name}':value for name,value in checkpoint.items()})
    assert sd.keys()==want.keys() and all(torch.equal(sd[name], want[name]) for name in want)

def test_the_unused_pyramid_and_the_classifier_of_the_backbone_are_dropped(checkpoint):
    unused = {'pyramid_conv_list1.0.0.weight':torch.zeros(1), 'pyramid_fc_list1.0.bias':torch.zeros(1),
              'base.fc.weight':torch.zeros(1)}
    assert released_state_dict({**checkpoint, **unused}).keys()==released_state_dict(checkpoint).keys()

@pytest.mark.parametrize('name', ['head.weight','base.layer5.weight','base.conv1','pyramid_conv_list2.0.0.weight'])
def test_unknown_names_are_refused(checkpoint, name):
    checkpoint[name] = torch.zeros(1)
    with pytest.raises(ValueError, match=f'1 names .*: {name}. Other projects'): released_state_dict(checkpoint)

def test_a_missing_weight_is_named(checkpoint):
    del checkpoint['pyramid_conv_list0.0.1.running_mean']
    message = 'lacks 1 weights .*branches.0.bn.running_mean'
    with pytest.raises(ValueError, match=message): released_state_dict(checkpoint)

def test_a_missing_backbone_is_an_error():
    with pytest.raises(ValueError, match='no backbone'): released_state_dict(branch_weights(0))
    with pytest.raises(ValueError, match='incomplete'): released_state_dict({})
