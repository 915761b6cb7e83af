"""The pool, its plan, and the classifier that loads a member's weights."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saltern.pipeline.casm.algorithm.pool import Confuser, Pool
from saltern.pipeline.casm.algorithm.thinning import THINNINGS, draws, plan
from saltern.pipeline.masknet.members import Member
from saltern.schemas.errors import UserError


def filled(staged, half=False, count=3):
    net, pool = staged(), Pool(3, half)
    for step in range(count):
        torch.nn.init.normal_(net.fc.weight, generator=torch.Generator().manual_seed(step))
        net.conv[1].running_mean.fill_(step)
        pool.add(net, step, step)
    return net, pool


def test_a_snapshot_is_a_clone_with_its_buffers(staged):
    net, pool = filled(staged, count=1)
    before = pool.members[0].state["fc.weight"].clone()
    with torch.no_grad():
        net.fc.weight.add_(1)
        net.conv[1].running_mean.add_(5)
        net.conv[1].num_batches_tracked.add_(5)
    state = pool.members[0].state
    assert torch.equal(state["fc.weight"], before)
    assert state["conv.1.running_mean"].abs().max() == 0
    assert state["conv.1.num_batches_tracked"] == 0
    assert set(state) == set(net.state_dict())


def test_full_pool_overwrites_the_slot(staged):
    net, pool = filled(staged)
    pool.add(net, 9, 1)
    assert [member.step for member in pool.members] == [0, 9, 2]
    with pytest.raises(ValueError, match="slot 3"):
        pool.add(net, 10, 3)
    with pytest.raises(ValueError, match="slot 2"):
        Pool(5).add(net, 0, 2)


def test_the_confuser_judges_as_the_member_did(staged):
    net, pool = filled(staged)
    confuser = Confuser(net)
    x_BCHW = torch.randn(2, 3, 64, 64, requires_grad=True)
    for slot in (0, 2, 0, 1):
        past = staged()
        past.load_state_dict(dict(pool.members[slot].state))
        logits_BK = confuser.classify(x_BCHW, pool.members[slot])
        assert torch.equal(logits_BK, past.eval()(x_BCHW))
    (gradient,) = torch.autograd.grad(logits_BK.sum(), x_BCHW)
    assert gradient.abs().max() > 0
    assert all(weight.grad is None for weight in net.parameters())


def test_sixteen_bits(staged):
    net, pool = filled(staged, half=True)
    net.conv[1].running_var.fill_(1e6)  # beyond float16
    pool.add(net, 5, 0)
    state = pool.members[0].state
    assert state["fc.weight"].dtype == torch.float16
    assert state["conv.1.running_var"].dtype == torch.float32
    torch.testing.assert_close(state["fc.weight"].float(), net.fc.weight.detach(), rtol=1e-3, atol=1e-5)
    logits_BK = Confuser(net).classify(torch.randn(1, 3, 64, 64), pool.members[0])
    assert logits_BK.dtype == torch.float32


@pytest.mark.parametrize("half", [False, True])
def test_needs_is_what_it_takes(staged, half):
    net, pool = filled(staged, half)
    held = sum(value.numel() * value.element_size() for member in pool.members for value in member.state.values())
    assert pool.needs(net) == held


@pytest.mark.parametrize("half", [False, True])
def test_restored_pool_is_the_same(staged, half, tmp_path):
    _, pool = filled(staged, half)
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    restored = Pool(3, half)
    restored.load_state_dict(torch.load(tmp_path / "pool.pt"), pool.manifest())
    assert restored.digest() == pool.digest()
    assert restored.manifest() == pool.manifest()


@pytest.mark.parametrize("pinned", [False, True])
def test_restored_members_are_pinned_where_the_device_needs_it(staged, monkeypatch, pinned):
    """Pinning needs CUDA, so a clone takes its place."""
    _, pool = filled(staged)
    taken = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda value: taken.append(value.clone()) or taken[-1])
    restored = Pool(3, pinned=pinned)
    restored.load_state_dict(pool.state_dict(), pool.manifest())
    values = [value for member in restored.members for value in member.state.values()]
    assert all((value is given) == pinned for value, given in zip(values, taken or values[::-1], strict=True))
    assert restored.digest() == pool.digest()


@pytest.mark.parametrize("read", [Pool.digest, Pool.manifest, Pool.state_dict])
def test_members_are_read_only_after_their_copy(staged, read):
    """On CUDA the copy of a snapshot goes on after `add`; an event that completes it takes the place of CUDA's."""
    _, pool = filled(staged, count=1)
    expected, weight = read(pool), pool.members[0].state["fc.weight"]
    complete = weight.clone()
    pool.members = [Member(0, pool.members[0].state)]  # forgets its digest
    weight.zero_()
    pool._copied = SimpleNamespace(synchronize=lambda: weight.copy_(complete))
    assert str(read(pool)) == str(expected)
    assert torch.equal(weight, complete)


def test_altered_members_are_refused(staged):
    _, pool = filled(staged)
    state, manifest = pool.state_dict(), pool.manifest()
    digest = pool.digest()
    weight = state["members"][1]["state"]["fc.weight"] = state["members"][1]["state"]["fc.weight"].clone()
    weight[0, 0] += 1e-6
    changed = Pool(3)
    with pytest.raises(UserError, match="classifier 1"):
        changed.load_state_dict(state, manifest)
    changed.load_state_dict(state)
    assert changed.digest() != digest
    with pytest.raises(UserError, match="names 2"):
        Pool(3).load_state_dict(state, manifest[:2])
    with pytest.raises(UserError, match="pool_size"):
        Pool(2).load_state_dict(state)


def test_digest_knows_the_order(staged):
    _, pool = filled(staged)
    before = pool.digest()
    pool.members.reverse()
    assert pool.digest() != before


@pytest.mark.parametrize("every", [None, 1, 2, 3, 100])
def test_the_count_before_a_step_is_known(every):
    thinning = replace(THINNINGS["L100"], save_every=every)
    for step in range(250):
        assert thinning.taken(step) == sum(thinning.snapshots(past) for past in range(step))


def test_published_snapshots():
    assert [step for step in range(301) if THINNINGS["L100"].snapshots(step)] == [0, 99, 199, 299]
    assert [step for step in range(301) if THINNINGS["FL"].snapshots(step)] == [0]
    assert not any(THINNINGS[name].snapshots(step) for name in "FL" for step in range(301))


def test_plan_of_a_filling_pool():
    thinning = replace(THINNINGS["L100"], save_every=2)
    plans = [plan(thinning, 3, 0, step) for step in range(2000)]
    slots = [todo.slot for todo in plans]
    assert slots[:4] == [0, 1, None, 2]
    assert all((slot is None) == (step % 2 == 0) for step, slot in enumerate(slots) if step)
    assert {todo.member for todo in plans[:1]} <= {-1, 0}
    assert set(Counter(slots[4:])) == {None, 0, 1, 2}
    replaced = Counter(slot for slot in slots[4:] if slot is not None)
    members = Counter(todo.member for todo in plans[4:])
    assert all(abs(replaced[slot] / 998 - 1 / 3) < 0.06 for slot in range(3))  # 4 standard deviations
    assert abs(members[-1] / 1996 - 0.5) < 0.045
    assert all(abs(members[slot] / 1996 - 1 / 6) < 0.035 for slot in range(3))


def test_draws_are_fixed_for_good():
    # A resumed training must draw these on any machine and under any version.
    assert draws(0, 0) == pytest.approx((0.1879416502131085, 0.16260538741510755, 0.33425398087507685))
    assert draws(0, 0) != draws(0, 1) != draws(1, 1)


def test_ranks_share_the_coin_and_pick_their_own():
    shared, own = draws(3, 7), [draws(3, 7, rank) for rank in range(4)]
    assert {(one.coin, one.slot) for one in own} == {(shared.coin, shared.slot)}
    assert len({one.pick for one in own}) == 4
