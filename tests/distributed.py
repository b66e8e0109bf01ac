"""A program with every kind of estimator in two processes under DistributedDataParallel, which test_scaling.py runs.

Each process has half of the data. The first process prints the largest relative difference of the gradients from the mean gradients of
both halves, computed in one process. It also prints the difference from the gradients of the other half alone.
"""

import multiprocessing
import os
import sys

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.nn import PyroModule, PyroParam
from torch.nn.parallel import DistributedDataParallel

from flowvi import LR, RP, AdaptiveFlow, Enumerate, Flow
from flowvi.pyro import TraceFlow_ELBO

NAMES = ("pathwise", "score", "flow", "control")
ESTIMATORS = {
    **{"k": Enumerate(), "pathwise": RP(), "score": LR(), "flow": Flow(loc=lambda x, p: 0.5), "control": RP(control_variate="cubic")},
    "local": AdaptiveFlow(shared=True),
}


class Model(PyroModule):
    def forward(self, y):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        mean = sum(pyro.sample(name, dist.Normal(0.0, 1.0)) for name in NAMES)
        with pyro.plate("data", len(y)):
            local = pyro.sample("local", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(local + k, 0.5), obs=y)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logits = PyroParam(torch.tensor(0.3))
        self.locs = PyroParam(0.1 * torch.arange(4.0))
        self.local_loc = PyroParam(torch.tensor(0.2))

    def forward(self, y):
        pyro.sample("k", dist.Bernoulli(logits=self.logits))
        for loc, name in zip(self.locs, NAMES, strict=True):
            pyro.sample(name, dist.Normal(loc, 0.7))
        with pyro.plate("data", len(y)):
            pyro.sample("local", dist.Normal(self.local_loc, 0.6))


def gradients(rank, together):
    """The gradients by name, for the half of the data of a rank; ``together`` averages them over the processes."""
    pyro.clear_param_store()
    module = TraceFlow_ELBO(4, estimators=ESTIMATORS)(Model(), Guide())
    data = torch.linspace(-2.0, 2.0, 8).reshape(2, 4)[rank]
    module(data)  # creates the parameters of the estimators that learn
    own = {id(parameter) for parameter in module.parameters()}
    loss = DistributedDataParallel(module) if together else module
    pyro.set_rng_seed(rank)
    loss(data).backward()
    stored = {name: p.grad for name, p in pyro.get_param_store().named_parameters() if id(p) not in own}
    for gradient in stored.values() if together else ():
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    return {**{name: p.grad for name, p in module.named_parameters()}, **stored}


def difference(found, expected):
    return max(float(((found[name] - expected[name]).abs() / (1 + expected[name].abs())).max()) for name in found)


def work(rank):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    found = gradients(rank, together=True)
    if rank == 0:
        one, other = (gradients(half, together=False) for half in (0, 1))
        assert set(found) == set(one) == set(other)
        assert sum("control" in name or "velocity" in name for name in found) == 3
        print("mean of the halves", difference(found, {name: (one[name] + other[name]) / 2 for name in one}))
        print("another half", difference(found, other))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))
