import importlib.util, sys, os, torch
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import measure
from measure import *
import headwise.attention.triton as pkg
from headwise.attention.triton import routed_attention
import headwise.attention.triton._hopper_bwd as current
def load(name):
    path=os.path.join(os.path.dirname(os.path.abspath(__file__)),name+".py")
    spec=importlib.util.spec_from_file_location("headwise.attention.triton."+name,path); m=importlib.util.module_from_spec(spec); sys.modules[spec.name]=m; spec.loader.exec_module(m); return m
torch.manual_seed(0)
names=sys.argv[1:]
def grads(q,k,v,active,det=False):
    out=routed_attention(q,k,v,active,deterministic=det); w=torch.ones_like(out); return torch.autograd.grad((out.float()*W).sum(),[q,k,v])
q,k,v=qkv(1,1111,8,2,grad=True); act=torch.rand(1,8,1111,device="cuda")<0.5; W=torch.randn(1,8,1111,128,device="cuda")
want=grads(q,k,v,act,True)
data={}
for N in (8192,32768):
    data[N]=(qkv(1,N,grad=True), torch.rand(1,H,N,device="cuda")<0.5)
for rnd in range(2):
  for name in names:
    m=load(name); pkg._hopper_bwd=m; sys.modules["headwise.attention.triton._hopper_bwd"]=m
    got=grads(q,k,v,act)
    errs=[relative(a,b) for a,b in zip(got,want)]
    line=[name, "err %.1e"%max(errs)]
    for N,((a,b,c),active) in data.items():
        out=routed_attention(a,b,c,active); w=torch.randn_like(out)
        ms=milliseconds(lambda: torch.autograd.grad(out,[a,b,c],w,retain_graph=True))
        line.append(f"N{N} bwd {ms:.3f} ms {0.5*2.5*dense_flops(1,N)/ms/1e9:.0f} TF")
    print(*line, flush=True)
from torch.profiler import profile, ProfilerActivity
(a,b,c),active=data[8192]
for i in range(2):
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(5):
            out=routed_attention(a,b,c,active); torch.autograd.grad(out,[a,b,c],w[:,:,:8192],)
        torch.cuda.synchronize()
print(prof.key_averages().table(sort_by="cuda_time_total",row_limit=14,max_name_column_width=50)[:4000])
