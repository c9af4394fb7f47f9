"The script that trains the shipped model: in stages, stopped and resumed, and what it writes"
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]/'benchmarks'))
import light_model

from pyramidreid.all import load_embedder, load_pretrained, synth_persons


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    return synth_persons(tmp_path_factory.mktemp('people'), n_train=16, n_test=4, size=(48,24))

def test_stages():
    assert light_model.stage('192x96:20')==((192,96), 20, 1., None)
    assert light_model.stage('96x48:3:0.5')==((96,48), 3, .5, None)
    assert light_model.stage('96x48:3::0.2')==((96,48), 3, 1., .2)
    with pytest.raises(Exception, match='is not like'): light_model.stage('192')

@pytest.mark.parametrize('more', [['--test', '--hold-out', '0.2'], ['--save', 'model']])
def test_what_contradicts_is_refused(more, capsys):
    with pytest.raises(SystemExit): light_model.parse(['--data', 'x', '--run', 'y', *more])
    assert '--test' in capsys.readouterr().err

@pytest.mark.slow
def test_stopped_resumed_and_written(tmp_path, people, monkeypatch):
    "Stopped after the first epoch; the same command then goes on, tests once, and writes a model that is read again"
    monkeypatch.setattr(light_model, 'results', tmp_path)
    args = ['--data', str(people), '--run', str(tmp_path/'run'), '--arch', 'resnet10', '--n-parts', '3']
    args += ['--emb-sz', '8', '--stages', '48x24:2', '96x48:1:0.5', '--mix', '0.5', '--threads', '1', '--test']
    args += ['--also', str(people), '--save', str(tmp_path/'model')]
    with pytest.raises(SystemExit, match='Stopped in stage 1'): light_model.main([*args, '--minutes', '1e-6'])
    assert not (tmp_path/'run'/'stages.json').exists()
    light_model.main(args)
    note = json.loads((tmp_path/'light-model.json').read_text())
    assert list(note['cards'])==['plain', 'flip', 'flip, re-ranked', people.name] and len(note['minutes'])==2
    assert note['cards']['plain']['mAP']==note['cards'][people.name]['mAP']
    model = load_embedder(tmp_path/'model')
    weights = [p.numel() for name,p in model.model.named_parameters() if 'classify' not in name]
    assert note['parameters']==sum(weights) and note['macs']>1e6
    assert model.size==(96,48) and model.about['neck'] and 'research only' in model.about['licence']
    assert '96×48 pixels' in (tmp_path/'model'/'README.md').read_text()

@pytest.mark.parametrize('flip', [False, True])
def test_onnxruntime_embeds_as_pytorch_does(flip, tmp_path, people):
    import pyramidreid.all as lib
    args = light_model.parse(['--data', str(people), '--run', str(tmp_path), '--arch', 'resnet10', '--n-parts', '3',
                              '--emb-sz', '8', '--stages', '48x24:1', '--threads', '1'])
    learn = light_model.make_learner(args, lib, 0, [])
    by_onnx = light_model.with_onnx(learn, args)(learn.dls.valid, flip)
    assert torch.allclose(by_onnx, learn.embed(learn.dls.valid, flip=flip).cpu(), atol=1e-5)

@pytest.mark.slow
def test_a_pretrained_model_goes_on(tmp_path, people, monkeypatch):
    "Its stages and minutes count, and training starts at its weights: at hardly any learning rate, they stay the same"
    monkeypatch.setattr(light_model, 'results', tmp_path)
    before = dict(command='python before.py', stages=[[96,48,18,1.]], minutes=[20.], trained_on=['a core'])
    (tmp_path/'light-model.json').write_text(json.dumps(before))
    args = ['--data', str(people), '--run', str(tmp_path/'run'), '--start', 'market1501-lite0', '--threads', '1']
    args += ['--stages', '96x48:1:1e-9:0.2', '--test', '--save', str(tmp_path/'model'), '--out', 'more']
    light_model.main(args)
    note = json.loads((tmp_path/'more.json').read_text())
    assert note['stages']==[[96,48,18,1.], [96,48,1,1e-9]] and note['minutes'][0]==20. and len(note['minutes'])==2
    assert note['command'].startswith('python before.py && python')
    assert note['trained_on'][0]=='a core' and note['trained_on'][1].endswith('1 threads')
    assert f"minutes on a core, {note['trained_on'][1]} (" in (tmp_path/'model'/'README.md').read_text()
    shipped,model = load_pretrained('market1501-lite0').model,load_embedder(tmp_path/'model').model
    for name,p in shipped.named_parameters():
        if 'classify' not in name: torch.testing.assert_close(dict(model.named_parameters())[name], p)
