"A filter gives what pandas' `eval` gives, and is never executed"
import random
import time

import numpy as np
import pandas as pd
import pytest

from pyramidreid.gallery.entries import filter_mask, typed_table
from pyramidreid.gallery.filters import FilterError, table_filter
from pyramidreid.gallery.milvus import milvus_filter

times = ["a secret of the module"]

def random_table(rng, n=40):
    "Columns of every kind with gaps, as a gallery keeps them"
    def column(values): return [rng.choice(values) for _ in range(n)]
    table = dict(key=[f'k{i}' for i in range(n)], pid=column([0,1,2,-1,None]), age=column([3,4,5]),
                 score=column([0.,.25,.5,1.,None]), cam=column(['door','hall','Hof','日本',None]),
                 coat=column(['hall','x']), ok=column([True,False,None]),
                 time=column([pd.Timestamp('2026-11-23 08:00'),pd.Timestamp('2026-11-23 09:30:00.5'),None]))
    table['first seen'] = column([1,2,None])
    return typed_table(pd.DataFrame(table), {})[0]

def random_number(rng, depth):
    "An expression that gives numbers"
    if depth<=0 or rng.random()<.5:
        return rng.choice(['pid','age','score','`first seen`','0','1','2','.25','-1','key.str.len()'])
    left,right = random_number(rng, depth-1),random_number(rng, depth-1)
    return rng.choice([f'({left}+{right})', f'{left}-{right}', f'{left}*{right}', f'({left})/2', f'({left})%3',
                       f'({left})//2', f'-({left})', f'({left})**2'])

def random_column(rng): return rng.choice(['pid','age','score','`first seen`'])

def random_comparison(rng):
    sign,equal = rng.choice(['==','!=','<','<=','>','>=']),rng.choice(['==','!='])
    column,number = random_column(rng),random_number(rng, 2)
    text,texts = rng.choice(['cam','coat']),rng.choice(['"hall"',"'日本'",'"none"','"a|b & @c"'])
    inside = rng.choice(['in','not in'])
    return rng.choice([
        f'{column}{sign}{number}', f'{number}{sign}{column}', f'0 {sign} {column} {equal} {number}',
        f'{column}+1<{number}<=3', f'{text}{equal}{texts}', f'{texts}{equal}{text}',
        f'{text} {inside} [{texts}, "Hof"]', f'{text} {inside} {texts}', f'cam{equal}coat',
        f'{column} {inside} [1, -1]', f'{column} {inside} (0,2,)', f'{column}{equal}[1,2]', f'{text}<"i"',
        f'ok{equal}{rng.choice(["True","False"])}', 'ok', f'time{rng.choice(["<","<=",">",">="])}"2026-11-23 09:00"',
        '"2026-11-23T08:00"<time', f'{text}.isna()', f'{column}.notna()', 'time.isnull()', f'{column}.isin([1,2])',
        f'{column}.between(0,1)', f'{column}.between(0, 1, inclusive="left")', f'{text}.str.startswith("h")',
        f'{text}.str.endswith("l")', f'{text}.str.contains("a", regex=False)', f'{text}.str.contains("al")',
        f'{text}.str.lower()=="hof"', f'{text}.str.upper() {inside} ["HOF"]', f'{column}.abs()>=1', 'time.dt.hour>8',
        f'{text}.str.len(){sign}4'])

def random_condition(rng, depth=3):
    if depth<=0 or rng.random()<.35: return random_comparison(rng)
    left,right = random_condition(rng, depth-1),random_condition(rng, depth-1)
    return rng.choice([f'{left} and {right}', f'{left} or {right}', f'({left}) & ({right})', f'{left} | {right}',
                       f'not {left}', f'not ({left})', f'~({left})', f'({left})', f'{left} and not {right}'])

def passes(values, n):
    "Which rows pass, as a search sees it"
    values = pd.Series(values) if np.shape(values)==(n,) else None
    assert values is not None and pd.api.types.is_bool_dtype(values.dropna().convert_dtypes())
    return values.fillna(False).to_numpy(bool)

def by_pandas(table, where):
    "What pandas gives; None if it cannot compute it"
    try: return passes(table.eval(where, engine='python'), len(table))
    except Exception: return None

@pytest.mark.parametrize('seed', range(4))
def test_side_by_side_with_pandas(seed):
    rng = random.Random(seed)
    compared = found = 0
    for _ in range(150):
        table,where = random_table(rng),random_condition(rng)
        expected = by_pandas(table, where)
        if expected is None: continue
        assert passes(table_filter(table, where), len(table)).tolist()==expected.tolist(), where
        compared,found = compared+1,found+(0<expected.sum()<len(table))
    assert compared>100 and found>60, (compared,found)

def test_times_are_read_as_times():
    "pandas compares them as text by == and in, so the expected values are counted by hand"
    table = pd.DataFrame(dict(at=pd.to_datetime(['2026-11-23 08:00','2026-11-23 09:30',None])))
    zoned = pd.DataFrame(dict(at=pd.to_datetime(['2026-11-23 08:00Z','2026-11-23 09:30Z',None])))
    for where,expected in [('at=="2026-11-23T08:00"',[1,0,0]), ('"2026-11-23 08:00"==at',[1,0,0]),
                           ('at!="2026-11-23 08:00"',[0,1,1]), ('at in ["2026-11-23 09:30","2026-11-24"]',[0,1,0]),
                           ('at not in ["2026-11-23 09:30"]',[1,0,1]), ('at.isin(["2026-11-23 08:00"])',[1,0,0]),
                           ('at.between("2026-11-23 08:30","2026-11-23 09:30")',[0,1,0])]:
        assert table_filter(table, where).tolist()==list(map(bool, expected)), where
        with pytest.raises(FilterError, match='time zone'): table_filter(zoned, where)
    assert table_filter(zoned, 'at=="2026-11-23 09:00+01:00"').tolist()==[True,False,False]
    for where in ('at>="soon"','at==5','at in ["soon"]','at>""'):
        with pytest.raises(FilterError, match='date and time'): table_filter(table, where)

# strangers

TABLE = typed_table(pd.DataFrame(dict(key=['a','b'], cam=['x','y'], pid=[1,2])), {})[0]
HOSTILE = {
    '@os.system("touch {file}")+pid==1':'@os', 'cam in @x':'@x', 'cam in @times':'@times',
    '@os.system("touch {file}")':'@os',
    '@pd.read_pickle("{file}")':'@pd', 'key.to_csv("{file}")':'to_csv', 'key.to_pickle("{file}")':'to_pickle',
    'key.map(print)':'map', 'pid.values.tofile("{file}")':'tofile', 'pid.apply("__import__")':'apply',
    'pid.agg("sum")==3':'agg', 'key.str.cat(others=key)':'cat', 'key.str.repeat(10**9)':'repeat',
    'key.str.pad(10**10)':'pad', 'key.str.encode("x")':'encode', '__import__("os")':'__import__',
    'open("{file}", "w")':'open', 'exec("1")':'exec', 'key.__class__':'__class__', 'key.str.__init__':'__init__',
    'cam.dt.__doc__':'__doc__', '().__class__.__bases__[0]':'__bases__', 'f"{pid}"=="1"':'pid',
    '(lambda: 1)()':'lambda', '[o for o in key]':'for', '(pid:=3)':'pid:=3', 'pid=3':'compare with ==',
    'pid if ok else cam':'if', 'pid[0]==1':'pid', 'index==0':'index', 'cam.str.contains("(x+)+$")':'regex=False',
    'cam.str.contains("x", regex=True)':'regex=False', 'cam.str.match("x")':'match', 'cam.str.startswith(key)':'text',
    'key*1000000000=="a"':'numbers', '"a"*1000000000==key':'numbers', '9**9**9==pid':'power', '9**60==pid':'64 bits',
    '"a"=="a"':'no column', 'pid==123456789012345678901234567890':'64 bits', 'pid==None':'isna', 'pid is 1':'==',
    'pid in cam':'list', 'pid in [1] == True':'no column', 'cam in [pid]':'list', 'not pid':'condition',
    'pid and cam=="x"':'conditions', 'cam.isna(1)':'arguments', 'pid.between(1)':'arguments',
    'cam.isna(inplace=True)':'arguments', 'cam.str.contains("x", flags=2)':'arguments', 'pid<"a"':'fails',
    '`pid==1':'not a valid', '':'not a valid', 'pid==1\x00':'not a valid', 'pid==1; pid':'not a valid',
    'import os':'not a valid', 'pid==1\npid==2':'not a valid', 'pid==1j':'1j', 'cam==b"x"':'b"x"',
    'cam==...':r'\.\.\.', 'print':'print', '*pid':'valid|not allowed', 'cam==`no`':'`no`',
    'await pid':'valid|not allowed', 'pid@pid':'variables', '(yield)':'not allowed'}

@pytest.mark.parametrize('where,piece', HOSTILE.items())
def test_nothing_is_executed(where, piece, tmp_path):
    file = tmp_path/'written'
    with pytest.raises(ValueError, match=piece) as error:
        filter_mask(TABLE, where=where.replace('{file}', str(file)))
    assert not file.exists()
    assert 'A filter may use' in str(error.value)

DEEP = dict(brackets='('*5000+'pid'+')'*5000, signs='-'*9000+'pid==1', nots='not '*4000+'(pid==1)',
            sums='1+'*8000+'pid==1', commas='pid in ['+'['*150+']'*150+']', quotes="'"*19_999, odd_quotes="a'"*9_000,
            long='pid==1 or '*5000+'pid==2', calls='pid'+'.abs()'*2000+'==1', powers='pid'+'**2'*3000+'==1',
            backquotes='`'*19_999, ats='"@"'*6000, digits='9'*19_990+'==pid',
            hexadecimal='0x'+'f'*19_000+'==pid', lambdas='lambda:'*2800+'1',
            ifs='1 if 1 else '*1600+'1', dots='pid'+'.str'*4000, accents='é'*19_000,
            comparisons='pid'+'<1'*9000+'<cam', strings='cam in ['+'"",'*6000+'pid]')

@pytest.mark.parametrize('where', DEEP.values(), ids=DEEP)
def test_long_and_deep_expressions(where):
    start = time.process_time()
    with pytest.raises(ValueError): filter_mask(TABLE, where=where)
    assert time.process_time()-start<2

def test_a_list_of_a_thousand_is_not_deep():
    assert filter_mask(TABLE, where=f'pid in {list(range(2, 1002))}').tolist()==[False,True]

def test_random_characters_give_only_value_errors():
    rng = random.Random(0)
    pieces = [
        'pid','cam','key',' ','(',')','[',']','"',"'",'`','@','&','|','~','-','.','str','isna()','==','<','in','not ',
        '1','2.5','and ','or ','lambda:','\\','\n','#',',',':','{','}','é','\x00','isin','dt','hour','**','"x"']
    for _ in range(3000):
        where = ''.join(rng.choice(pieces) for _ in range(rng.randint(1, 9)))
        try: filter_mask(TABLE, where=where)
        except ValueError: pass

def test_functions_and_other_types():
    assert filter_mask(TABLE, where=lambda t: t.pid==1).tolist()==[True,False]
    for where in (['pid==1'],b'pid==1',3):
        with pytest.raises(ValueError, match='expression as text'): filter_mask(TABLE, where=where)

# Milvus

KINDS = {'key':'text', 'cam':'text', 'pid':'number', 'time':'time', 'first seen':'number', 'like':'number',
         'ok':'truth'}

@pytest.mark.parametrize('where,expected', [
    ('pid==1 & not cam in ["x","y"]', '((pid==1) and (not (cam in ["x", "y"])))'),
    ('1<=pid<9', '((1<=pid) and (pid<9))'),
    ('cam=="a\\"b" or ok', r'((cam=="a\"b") or ok)'),
    ('key=="a%b"', '(key=="a%25b")'),
    ('key in ["a\\nb"]', '(key in ["a%0Ab"])'),
    ('cam=="a%b"', '(cam=="a%b")'),
    ('`first seen`>1 and `like`==-2', '(($meta["first seen"]>1) and ($meta["like"]==-2))'),
    ('cam.isna() or time.notna()', '((not exists cam) or (exists time))'),
    ('time=="1970-01-01 00:00:01"', '(time==1000000)'),
    ('pid.between(1,2)', '((pid>=1) and (pid<=2))'),
    ('(pid+1)%2==0', '(((pid + 1) % 2)==0)'),
    ('ok==True', '(ok==true)')])
def test_translated_for_milvus(where, expected):
    assert milvus_filter(KINDS, where=where)==expected

@pytest.mark.parametrize('where', [
    'pid==1) or (pid>0', '$meta["x"]>1', 'exists pid', 'json_contains(cam, 1)', 'cam like "%"', 'embedding==1',
    'pid is not null', 'TEXT_MATCH(cam, "x")', 'pid==1 // 2', 'cam=="x" or @y', 'pid in cam', 'pid in [cam]',
    'cam.str.lower()=="x"', 'key.isna()', 'pid<1e999', '1', 'cam+"x"=="y"', 'random_sample(0.1)', 'pid==1 && pid==2',
    'pid < [1]'])
def test_not_sent_to_milvus(where):
    with pytest.raises(ValueError, match='where='): milvus_filter(KINDS, exclude_cam='door', where=where)
