"""What runs cost: operations against torch's own counter, memory against what autograd keeps, physics against gymnasium."""

import contextlib

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dtlib import cost
from dtlib.model import build_model
from dtlib.pretrain import PretrainConfig, make_model, token_loss
from dtlib.runs import RunConfig
from dtlib.tasks import get_task

HOPPER = get_task("hopper")


@contextlib.contextmanager
def counted():
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the CPU's fused attention
        yield counter


def windows(batch, context):
    return (torch.randn(batch, context, HOPPER.state_dim), torch.randn(batch, context, HOPPER.action_dim),
            torch.randn(batch, context), torch.zeros(batch, context, dtype=torch.int64))


@pytest.mark.parametrize("size, context", [("mini", 20), ("mini", 1), ("tiny", 5), ("small", 20)])
def test_operations_and_parameters_are_those_of_the_model(size, context):
    model = build_model("random-matched", size, HOPPER, 0, (0.0, 0.0, 0.0))
    with counted() as counter:
        model(*windows(3, context)).sum().backward()
    assert cost.step(size, context, 3).operations == pytest.approx(counter.get_total_flops(), rel=0.1)
    with counted() as counter, torch.no_grad():
        model.act(*windows(3, context))
    assert cost.rollouts("hopper", size, context, np.array([1, 1, 1])).operations == pytest.approx(
        counter.get_total_flops(), rel=0.1)
    assert cost.parameters(size) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=0.02)


@pytest.mark.parametrize("size, context", [("mini", 20), ("small", 5)])
def test_memory_is_what_the_backward_pass_keeps(size, context):
    model, kept = build_model("random-matched", size, HOPPER, 0, (0.0, 0.0, 0.0)), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor stays alive, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*windows(64, context)).sum()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = sum(size for address, (size, _) in kept.items() if address not in own)
    config = RunConfig(size=size, context=context, batch_size=64, initialisation="random-matched")
    assert 4e-9 * 4 * cost.parameters(size) + 1e-9 * found == pytest.approx(cost.memory(config), rel=0.3)


@pytest.mark.parametrize("name", ["hopper", "halfcheetah", "walker2d"])
def test_physics_is_counted_as_gymnasium_steps_it(name):
    environment = get_task(name).make_environment().unwrapped
    work = cost.rollouts(name, "mini", 1, np.array([7, 9]))
    assert (work.physics, work.rounds) == (16 * environment.frame_skip * environment.model.nv, 9)


def test_a_runs_work_adds_up():
    config = RunConfig(size="mini", epochs=2, steps_per_epoch=5, context=4, batch_size=8, evaluation_episodes=3)
    training, evaluation = cost.of_run(config, [np.array([10, 20]), np.array([30])])
    assert training == pytest.approx(cost.step("mini", 4, 8).times(10))
    assert evaluation == pytest.approx(cost.rollouts("hopper", "mini", 4, np.array([10, 20])).plus(
        cost.rollouts("hopper", "mini", 4, np.array([30]))).plus(cost.forward("mini", 4, 512).times(2)))
    assert [lengths.tolist() for lengths in cost.expected_lengths(config)] == [[30] * 3, [500] * 3, [500] * 3]
    machine = cost.Machine("one", (1.0, 10.0, 100.0, 1000.0, 10_000.0))
    assert machine.seconds(cost.Work(1, 2, 3, 4, 5)) == 1 + 20 + 300 + 4000 + 50_000


def test_pretraining_is_counted_as_torch_does():
    config = PretrainConfig("markov", size="tiny", steps=7)
    model = make_model(config, 100)
    sequences = torch.randint(100, (config.batch_size, config.sequence + 1))
    with counted() as counter:
        token_loss(model, sequences).backward()
    assert cost.of_pretraining(config).operations == pytest.approx(7 * counter.get_total_flops(), rel=0.1)
    one, two = (cost.of_pretraining(PretrainConfig("language", tokens=amount)) for amount in ("1M", "2M"))
    assert two == pytest.approx(one.times(2), rel=0.01)


def test_a_plan_is_said_in_numbers():
    configs = [RunConfig(size="gpt2", initialisation="random-matched", seed=seed) for seed in (0, 1)]
    said = cost.say_plan("gpu", configs, configs[1:], [PretrainConfig("language", size="gpt2")])
    assert "The gpu profile asks for 2 runs, 1 of them new, after 1 new starting points." in said
    assert f"{cost.disk(configs[0]):.1f} GB on the disk" in said
    hours = [line for line in said.splitlines() if "hours of runs" in line]
    assert len(hours) == len(cost.MACHINES)
