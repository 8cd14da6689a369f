import time, torch, cProfile, pstats
def test_over(tiny, capsys):
    import comfy.model_management
    m=tiny.load("tiny_sd3"); task=tiny.task(m); p=tiny.apply(m,task)
    with capsys.disabled(), torch.inference_mode():
            comfy.model_management.load_models_gpu([p])
            for _ in range(5): tiny.call_loaded(p)
            pr=cProfile.Profile(); pr.enable()
            for _ in range(40): tiny.call_loaded(p)
            pr.disable(); pstats.Stats(pr).sort_stats("tottime").print_stats(16)
            c=tiny.patching._carrier(m.model,tiny.patching.tasks_on(p))
            s=list(c._stacks.values())[8]; x=torch.randn(2,16,s.affiners[0].down.shape[1]); y=torch.randn(2,16,s.affiners[0].up.shape[0])
            from time import perf_counter as t
            best=9
            for _ in range(300):
                a=t(); s(x,y); best=min(best,t()-a)
            print(s.name, "stack us",best*1e6)
            f=s._folded; best=9
            import sys
            ap=sys.modules[type(s).__module__].apply_folded
            for _ in range(300):
                a=t(); ap(x,y,f,None,1); best=min(best,t()-a)
            print("apply_folded us",best*1e6)
