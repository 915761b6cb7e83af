"""The training step equals a naive one; its log; resume; ranks."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from naive_casm import NaiveCasm

from saltern.pipeline.casm.algorithm.control import Lambda
from saltern.pipeline.casm.algorithm.hyperparameters import Hyperparameters
from saltern.pipeline.casm.algorithm.step import Training
from saltern.pipeline.casm.algorithm.thinning import THINNINGS, draws, plan, thinning_named
from saltern.schemas.errors import UserError

SEED = 9  # whose draws under L100 pick the current one, both slots, and members that replaced others
L2 = replace(THINNINGS["L100"], save_every=2)  # of L100's kind, so that 6 iterations fill and overwrite a pool of two


def thinning(name):
    return L2 if name == "L100" else THINNINGS[name]


def hyperparameters(name="L100", **options):
    defaults = {"lr_classifier": 0.02, "lr_mask": 0.001, "pool_size": 2, "seed": SEED}
    return Hyperparameters(thinning=thinning(name), **(defaults | options))


def naive(net, training, name, score, fault="", pull=None):
    state = {key: value.clone() for key, value in training.decoder.state_dict().items()}
    weights = {}
    for i in range(4):
        parts = (("conv", "0.weight"), ("gamma", "1.weight"), ("beta", "1.bias"))
        weights |= {f"{short}{i + 1}": state[f"stages.{i}.{long}"].requires_grad_() for short, long in parts}
    weights |= {"last": state["last.weight"].requires_grad_(), "bias": state["last.bias"].requires_grad_()}
    every = thinning(name).save_every
    return NaiveCasm(net, weights, name, score, every, 2, training.hyperparameters.lr_classifier, 0.001, fault, pull)


def deviation(training, slow):
    ours = [training.decoder.last.weight, training.decoder.last.bias]
    theirs = [slow.decoder["last"], slow.decoder["bias"]]
    for i, (conv, norm, _) in enumerate(training.decoder.stages, 1):
        ours += [conv.weight, norm.weight, norm.bias]
        theirs += [slow.decoder[f"conv{i}"], slow.decoder[f"gamma{i}"], slow.decoder[f"beta{i}"]]
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def both(staged, batches, name, score, fault=""):
    training = Training(staged(), hyperparameters(name, score=score))
    with torch.no_grad():
        training.decoder.last.weight.mul_(0.05)  # far from 0 and 1, where the sigmoid has a slope
    slow = naive(staged(), training, name, score, fault)
    lines = []
    for step, (x_BCHW, label_B) in enumerate(batches(6)):
        expected = slow.step(x_BCHW, label_B, *draws(SEED, step))
        lines.append((training.step(x_BCHW, label_B).floats(), expected))
    return training, slow, lines


@pytest.mark.slow
@pytest.mark.parametrize("score", ["entropy", "classification"])
@pytest.mark.parametrize("name", ["F", "L", "FL", "L100"])
def test_agrees_with_the_naive_one(staged, batches, name, score):
    training, slow, lines = both(staged, batches, name, score)
    for found, expected in lines:
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert deviation(training, slow) < 1e-4
    for key, value in slow.net.state_dict().items():
        torch.testing.assert_close(training.classifier.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    assert len(training.pool) == len(slow.pool)
    for member, kept in zip(training.pool.members, slow.pool, strict=True):
        for key, value in kept.state_dict().items():
            torch.testing.assert_close(member.state[key], value, rtol=1e-4, atol=1e-5)
    planned = [plan(training.hyperparameters.thinning, 2, SEED, step) for step in range(6)]
    assert [found["member"] for found, _ in lines] == [todo.member for todo in planned]


@pytest.mark.parametrize("area", [0.3, 0.65])  # at 0.5 some gradients are nearly 0, and Adam enlarges rounding errors
def test_the_pull_agrees_with_the_naive_one(staged, batches, area, monkeypatch):
    monkeypatch.setattr(Lambda, "observe", lambda self, area: None)  # the naive one has a fixed lambda
    training = Training(staged(), hyperparameters(lam="auto", pull=2.0, mask_area=area, init_scale=0.05))
    slow = naive(staged(), training, "L100", "entropy", pull=(2.0, area))
    for step, (x_BCHW, label_B) in enumerate(batches(6)):
        expected = slow.step(x_BCHW, label_B, *draws(SEED, step))
        found = training.step(x_BCHW, label_B).floats()
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert found["pull_term"] > 0
    assert deviation(training, slow) < 1e-4


def test_a_fixed_lambda_has_no_pull(staged, batches):
    found = Training(staged(), hyperparameters(lam=3.0, pull=2.0)).step(*batches(1)[0]).floats()
    assert found["pull_term"] == 0


def test_the_comparison_covers_what_it_should(staged, batches):
    training, slow, lines = both(staged, batches, "L100", "entropy")
    members = {found["member"] for found, _ in lines}
    assert members == {-1, 0, 1}
    assert len(slow.replaced) == 2
    assert [member.step for member in training.pool.members] != [0, 1]
    assert len({found["confused"] for found, _ in lines}) > 1
    assert any(found["size_term"] < -0.1 for found, _ in lines)
    assert all(0 < found["right"] <= 1 for found, _ in lines)


@pytest.mark.parametrize("fault", ["late", "or", "alias"])
def test_a_wrong_step_would_show(staged, batches, fault):
    training, slow, _ = both(staged, batches, "L100", "entropy", fault)
    assert deviation(training, slow) > 1e-3


def test_fixed_classifier_is_left_alone(staged, batches):
    net = staged()
    before = copy.deepcopy(net.state_dict())
    training = Training(net, hyperparameters("F"))
    for x_BCHW, label_B in batches(2):
        training.step(x_BCHW, label_B)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not len(training.pool)


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False])
def test_resume_is_exact(staged, batches, share, tmp_path):
    # With dropout and replaced members. The global generator has another state after the resume.
    chosen = hyperparameters(share_encoder=share, lam="auto", steps=9)
    whole = Training(staged(0.3), chosen)
    data = batches(9)
    logs = [whole.step(*batch).floats() for batch in data]
    half = Training(staged(0.3), chosen)
    for batch in data[:4]:
        half.step(*batch)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(99)
    resumed = Training(staged(0.3), chosen)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert [resumed.step(*batch).floats() for batch in data[4:]] == logs[4:]
    assert resumed.pool.digest() == whole.pool.digest()
    for (_, ours), (_, theirs) in zip(resumed._parts(), whole._parts(), strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_masks_between_steps_change_nothing(staged, batches):
    data = batches(3)
    plain, watched = Training(staged(0.3), hyperparameters()), Training(staged(0.3), hyperparameters())
    for x_BCHW, label_B in data:
        plain.step(x_BCHW, label_B)
        watched.step(x_BCHW, label_B)
        mask_B1hw = watched.masks(x_BCHW)
    assert mask_B1hw.shape == (4, 1, 16, 16)
    assert not mask_B1hw.requires_grad
    torch.testing.assert_close(plain.decoder.state_dict(), watched.decoder.state_dict(), rtol=0, atol=0)


def two_ranks(staged, chosen, data):
    """Run both ranks as threads, each with half of every batch. A barrier joins what they share."""
    barrier, shared, failed = threading.Barrier(2), [None, None], []
    ranks, logs = [None, None], [[], []]

    def work(rank):
        def average(tensors):
            shared[rank] = [tensor.clone() for tensor in tensors]
            barrier.wait(30)
            for tensor, first, second in zip(tensors, *shared, strict=True):
                tensor.copy_((first + second) / 2)
            barrier.wait(30)

        try:
            ranks[rank] = Training(nets[rank], chosen, rank=rank, average=average)
            for x_BCHW, label_B in data:
                part = slice(2 * rank, 2 * rank + 2)
                logs[rank].append(ranks[rank].step(x_BCHW[part], label_B[part]).floats())
        except Exception as error:
            failed.append(error)
            barrier.abort()

    nets = [staged(), staged()]
    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert ranks[0].pool.digest() == ranks[1].pool.digest()
    states = [{name: part.state_dict() for name, part in one._parts()} for one in ranks]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    return logs


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "sum"])
def test_two_ranks_are_one(staged, batches, mode):
    chosen = hyperparameters(batch_norm="eval", classifier_loss=mode, lam="auto", pull=1.0)
    data = batches(6)
    alone = Training(staged(), chosen)
    expected = [alone.step(*batch).floats() for batch in data]
    logs = two_ranks(staged, chosen, data)
    assert logs[0] == logs[1]
    for found, wanted in zip(logs[0], expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_ranks_with_members_of_their_own_stay_together(staged, batches):
    logs = two_ranks(staged, hyperparameters(batch_norm="eval", pool_draw="per-rank"), batches(12))
    members = [[line["member"] for line in lines] for lines in logs]
    assert members[0] != members[1]
    assert [member < 0 for member in members[0]] == [member < 0 for member in members[1]]


def test_sum_halves_both_terms_in_one_step(staged, batches):
    (x_BCHW, label_B), *_ = batches(1)
    net = staged()
    training = Training(net, hyperparameters("L", classifier_loss="sum", momentum=0, weight_decay=0, batch_norm="eval"))
    mask_B1HW = training.masks(x_BCHW).repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = staged().eval()
    losses = [torch.nn.functional.cross_entropy(before(x), label_B) for x in (x_BCHW, x_BCHW * (1 - mask_B1HW))]
    gradient = torch.autograd.grad(sum(losses) / 2, before.fc.weight)[0]
    training.step(x_BCHW, label_B)
    torch.testing.assert_close(net.fc.weight, before.fc.weight - 0.02 * gradient)


def test_own_trunk_learns_from_the_mask_alone(staged, batches):
    net = staged()
    training = Training(net, hyperparameters("F", share_encoder=False))
    before = copy.deepcopy(training.encoder.state_dict())
    training.step(*batches(1)[0])
    after = training.encoder.state_dict()
    assert not torch.equal(after["stage4.0.weight"], before["stage4.0.weight"])
    assert torch.equal(after["fc.weight"], before["fc.weight"])  # no mask depends on it
    assert torch.equal(net.stage4[0].weight, before["stage4.0.weight"])


def test_bf16_uses_the_weights_of_the_moment(staged, batches):
    # The caller's autocast caches bf16 copies of weights; the step must not use copies from before its SGD.
    exact = Training(staged(), hyperparameters("L"))
    rounded = Training(staged(), hyperparameters("L", precision="bf16"))
    wrapped = Training(staged(), hyperparameters("L", precision="bf16"))
    for batch in batches(3):
        expected = exact.step(*batch).floats()
        found = rounded.step(*batch).floats()
        with torch.autocast("cpu", torch.bfloat16):
            inside = wrapped.step(*batch).floats()
        assert inside == found
        assert found["clean_loss"] == pytest.approx(expected["clean_loss"], rel=0.1)
        assert found != expected


def test_total_variation_counts_where_asked(staged, batches):
    batch = batches(1)[0]
    plain, smooth = (Training(staged(), hyperparameters(tv=weight)).step(*batch).floats() for weight in (0, 3.0))
    assert plain["tv_term"] == 0 < smooth["tv_term"]
    assert smooth["mask_loss"] == pytest.approx(smooth["score_term"] + smooth["size_term"] + smooth["tv_term"])


def test_spread_is_that_of_the_areas(staged, batches):
    x_BCHW, label_B = batches(1)[0]
    training = Training(staged(), hyperparameters("L", batch_norm="eval"))
    area_B = training.masks(x_BCHW).mean((1, 2, 3))
    found = training.step(x_BCHW, label_B).floats()
    assert found["mask_mean"] == pytest.approx(float(area_B.mean()), rel=1e-5)
    assert found["mask_std"] == pytest.approx(float(area_B.std(correction=0)), rel=1e-3)


def test_rates_fall_by_thirds():
    chosen = Hyperparameters(steps=9)
    assert [chosen.rate(step) for step in (0, 2, 3, 5, 6, 8, 9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
    assert Hyperparameters().rate(10**6) == 1


def test_published_lambdas():
    table = {"F": (2.5, 9), "L": (14, 18), "FL": (7.5, 11), "L1000": (10, 17), "L100": (10, 17)}
    for name, (entropy, classification) in table.items():
        assert Hyperparameters(thinning=thinning_named(name)).start_lambda() == entropy
        assert Hyperparameters(thinning=thinning_named(name), score="classification").start_lambda() == classification


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"score": "loss"}, "score"),
        ({"classifier_loss": "both"}, "classifier_loss"),
        ({"tv": -1}, "tv"),
        ({"mask_area": 1.0}, "mask_area"),
        ({"pool_size": 0}, "pool_size"),
        ({"lam": float("nan")}, "lambda"),
        ({"lr_mask": float("inf")}, "lr_mask"),
    ],
)
def test_hyperparameters_are_checked(wrong, said):
    with pytest.raises(UserError, match=said):
        Hyperparameters(**wrong)


def test_unknown_thinning():
    with pytest.raises(UserError, match="L1000"):
        thinning_named("L10")
