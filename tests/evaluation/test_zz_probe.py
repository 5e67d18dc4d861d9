import importlib.util, numpy as np
from lowprec.search import open_job
def test_p(small_config):
    sp=importlib.util.spec_from_file_location('t','/tmp/race_probe_src.py'); t=importlib.util.module_from_spec(sp); sp.loader.exec_module(t)
    job=open_job(small_config()); plans=t.random_plans(job.units,8)
    names=["y","yy_s","yy_r","changed","predicted"]+["gap."+n for n in ("e","ee_s","ey_s","ee_r","ey_r")]+["kl."+n for n in ("e","ee_s","ey_s","ee_r","ey_r")]+["loss","moments"]
    tog=t.lap(job,plans,(0,3),((1,),(0,2)),3); bad={}
    for k,p in enumerate(plans):
        al=t.lap(job,[p],(0,3),((1,),(0,2)),3)
        for n,x,y in zip(names,t.arrays(tog.only([k])),t.arrays(al)):
            if x.tobytes()!=y.tobytes(): bad.setdefault(n,[]).append((k,float(np.abs(x/y-1).max())))
    for n,v in bad.items(): print(n,v)
    pair=t.lap(job,plans[:2],(0,3),((1,),(0,2)),3)
    print("2 vs 8:",[n for n,x,y in zip(names,t.arrays(tog.only([0,1])),t.arrays(pair)) if x.tobytes()!=y.tobytes()])
