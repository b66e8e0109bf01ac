"""SVI in several processes, in Pyro. Each process has a part of the data, and every step averages the gradients.

torchrun --nproc-per-node 2 examples/pyro_processes.py [--smoke]
"""

import sys

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.nn import PyroModule
from torch.nn.parallel import DistributedDataParallel

from flowvi import LR
from flowvi.pyro import TraceFlow_ELBO

STEPS = 5 if "--smoke" in sys.argv else 300
NUM_DATA = 128


class Model(PyroModule):
    """Does a switch raise the mean of all observations?"""

    def forward(self, y):
        on = pyro.sample("on", dist.Bernoulli(0.5))
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", NUM_DATA, subsample_size=len(y)):  # scales the part of this process to all of the data
            pyro.sample("y", dist.Normal(mean + 2.0 * on, 1.0), obs=y)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(0.0))
        self.loc = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, y):
        pyro.sample("on", dist.Bernoulli(logits=self.logits))
        pyro.sample("mean", dist.Normal(self.loc, 0.1))


def main():
    torch.distributed.init_process_group("gloo")  # "nccl" on GPUs
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    pyro.set_rng_seed(0)
    data = 2.0 + torch.randn(NUM_DATA)
    part = data[rank::processes]

    pyro.set_rng_seed(1 + rank)  # different draws in each process
    elbo = TraceFlow_ELBO(num_particles=4, estimators={"on": LR()})
    loss = DistributedDataParallel(elbo(Model(), Guide()))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(loss(part))
        losses[-1].backward()
        optimizer.step()
    if rank == 0:
        found = {name.removeprefix("module.guide."): round(p.item(), 2) for name, p in loss.named_parameters()}
        print(f"{processes} processes, loss {losses[-1].item():.2f}, {found}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
